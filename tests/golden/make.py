"""Make logits.npz and families.npz: transformers' float32 logits of every case in tiny.py and families.py. And errors.json:
how far the reference and the executor are from them at every position.

    python tests/golden/make.py

Needs torch and transformers. Tests only read the result.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ext.kit import pack_model
from golden import families, harness, tiny

from pace import ops


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


def measure(
    directory: Path, case: tiny.Case, tokens: list[int], want: tiny.F32Array, team: ops.Team
) -> dict[str, Any]:
    """Errors of the reference and the executor at every position, and how often the best token is the same."""
    model = harness.load(directory, case.max_model_len)
    exact, rounded = (harness.prefill(model.reference(rounding=r), tokens) for r in (None, "bf16"))
    got = harness.prefill(pack_model(team, model).runner(team), tokens)
    limit = max(2 * harness.relative_error(rounded, exact), harness.bf16_tolerance(len(model.spec.layers)))
    return {
        "reference": float(f"{harness.relative_error(exact, want):.2e}"),
        "executor": round(harness.relative_error(got, want), 5),
        "tolerance": round(limit, 5),
        "agree": int((got.argmax(-1) == want.argmax(-1)).sum()),
        "positions": len(tokens),
    }


def make(
    cases: dict[str, tiny.Case], vocab_size: int, file: Path, errors: dict[str, Any] | None = None
) -> None:
    """Run the cases and store the logits of some rows; into `errors` goes what was measured."""
    golden: dict[str, Any] = {}
    team = ops.Team(2)
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as directory:
            model = load(tiny.write(name, Path(directory), case))
            tokens = tiny.prompt(name, vocab_size)
            logits = logits_of(model, tokens)
            if errors is not None:
                errors[name] = measure(Path(directory), case, tokens, logits, team)
        golden[name] = logits[list(tiny.GOLDEN_ROWS)]
        print(f"{name:36} max |logit| {np.abs(logits).max():.3f}")
    np.savez_compressed(file, **golden)
    team.close()
    print(f"{file.name}: {file.stat().st_size} bytes")


def main() -> None:
    """Write the files beside this script."""
    transformers.logging.set_verbosity_error()
    make(tiny.CASES, tiny.VOCAB_SIZE, tiny.GOLDEN_FILE)
    errors: dict[str, Any] = {}
    make(families.CASES, families.VOCAB_SIZE, families.GOLDEN_FILE, errors)
    versions = f"torch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}"
    document = {"tier": ops.isa(), "versions": versions, "cases": errors}
    families.ERRORS_FILE.write_text(json.dumps(document, indent=1) + "\n")
    print(versions)


if __name__ == "__main__":
    main()
