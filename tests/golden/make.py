"""Make logits.npz and families.npz: transformers' float32 logits of every case in tiny.py and families.py.

    python tests/golden/make.py

Needs torch and transformers. Tests only read the result.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import families, tiny


def load(directory: Path) -> Any:
    """transformers' model of a checkpoint, float32, eager attention; no tensor may be missing or left over."""
    multimodal = (directory / "config.json").read_text().find("text_config") >= 0
    auto = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    towers = ("model.vision", "model.audio", "model.multi_modal", "model.embed_vision", "model.embed_audio")
    missing = [key for key in info["missing_keys"] if not key.startswith(towers) and key != "lm_head.weight"]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{directory}: {missing=}, {info['unexpected_keys']=}, {info['mismatched_keys']=}")
    return model.eval()


def logits_of(model: Any, token_ids: list[int]) -> tiny.F32Array:
    """transformers' logits [n_tokens, vocab_size] f32 of one prompt."""
    with torch.no_grad():
        result = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return np.asarray(result.numpy(), np.float32)


def make(cases: dict[str, tiny.Case], vocab_size: int, file: Path) -> None:
    """Run the cases and store the logits of some rows."""
    golden: dict[str, Any] = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as directory:
            model = load(tiny.write(name, Path(directory), case))
            logits = logits_of(model, tiny.prompt(name, vocab_size))
        golden[name] = logits[list(tiny.GOLDEN_ROWS)]
        print(f"{name:36} max |logit| {np.abs(logits).max():.3f}")
    np.savez_compressed(file, **golden)
    print(f"{file.name}: {file.stat().st_size} bytes")


def main() -> None:
    """Write both files beside this script."""
    transformers.logging.set_verbosity_error()
    make(tiny.CASES, tiny.VOCAB_SIZE, tiny.GOLDEN_FILE)
    make(families.CASES, families.VOCAB_SIZE, families.GOLDEN_FILE)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
