"""Make logits.npz: transformers' float32 logits of every case in tiny.py.

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

from golden import tiny


def logits_of(directory: Path, token_ids: list[int]) -> tiny.F32Array:
    """transformers' logits [n_tokens, vocab_size] f32 of one prompt, eager attention."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        result = model.eval()(torch.tensor([token_ids]), use_cache=False).logits[0]
    return np.asarray(result.numpy(), np.float32)


def main() -> None:
    """Write logits.npz beside this script."""
    torch.manual_seed(0)
    golden: dict[str, Any] = {}
    for name in tiny.CASES:
        with tempfile.TemporaryDirectory() as directory:
            logits = logits_of(tiny.write(name, Path(directory)), tiny.prompt(name))
        golden[name] = logits[list(tiny.GOLDEN_ROWS)]
        print(f"{name:28} max |logit| {np.abs(logits).max():.3f}")
    np.savez_compressed(tiny.GOLDEN_FILE, **golden)
    print(f"{tiny.GOLDEN_FILE.name}: {tiny.GOLDEN_FILE.stat().st_size} bytes")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
