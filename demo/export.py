"""Write the trained target as an ordinary Hugging Face checkpoint, weights in bfloat16.

python demo/export.py --work build/demo --out src/pace/demo/target
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from shapes import generation_config, model_config
from train import state_path


def export(work: Path, folder: Path) -> int:
    """Write the checkpoint folder; its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.load(state_path(work), weights_only=True)["model"]
    state.pop("lm_head.weight", None)  # tied to model.embed_tokens.weight
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", model_config()), ("generation_config", generation_config())):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / name, folder / name)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="the training state")
    parser.add_argument("--out", type=Path, default=Path("src/pace/demo/target"))
    args = parser.parse_args()
    print(f"{export(args.work, args.out)} bytes")


if __name__ == "__main__":
    main()
