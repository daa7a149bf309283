"""Make logits.npz and families.npz: transformers' float32 logits of every case in tiny.py and families.py. And errors.json:
how far the reference and the executor are from them at every position.

    python tests/golden/make.py [--new]

With --new only cases that are not stored yet are run. Needs torch and transformers. Tests only read the result.
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

NEW = "--new" in sys.argv


def load(directory: Path) -> Any:
    """transformers' model of a checkpoint, float32, eager attention; no tensor may be missing or left over."""
    multimodal = (directory / "config.json").read_text().find("text_config") >= 0
    auto = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    towers: tuple[str, ...] = ("model.vision", "model.audio", "model.multi_modal", "model.embed_vision")
    towers += ("model.embed_audio", "vision_model.", "multi_modal_projector.")
    missing = [key for key in info["missing_keys"] if not key.startswith(towers) and key != "lm_head.weight"]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{directory}: {missing=}, {info['unexpected_keys']=}, {info['mismatched_keys']=}")
    return model.eval()


def logits_of(model: Any, token_ids: list[int]) -> tiny.F32Array:
    """transformers' logits [n_tokens, vocab_size] f32 of one prompt."""
    # Llama 4's multimodal class wants an image.
    model = model.language_model if type(model).__name__ == "Llama4ForConditionalGeneration" else model
    with torch.no_grad():
        result = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return np.asarray(result.numpy(), np.float32)


def measure(
    directory: Path, case: tiny.Case, tokens: list[int], want: tiny.F32Array, team: ops.Team
) -> dict[str, Any]:
    """Errors at every position: of the reference beside transformers, of the executor beside the reference with the
    executor's choices of experts; and how often the best token is transformers'.
    """
    model = harness.apart(harness.load(directory, case.max_model_len))
    runner = pack_model(team, model).runner(team)
    got = harness.prefill(runner, tokens)
    choices = harness.choices_of(runner)
    exact, rounded = (harness.prefill(harness.followed(model, choices, r), tokens) for r in (None, "bf16"))
    reference = harness.prefill(model.reference(), tokens)
    limit = max(2 * harness.relative_error(rounded, exact), harness.bf16_tolerance(len(model.spec.layers)))
    return {
        "reference": float(f"{harness.relative_error(reference, want):.2e}"),
        "executor": round(harness.relative_error(got, exact), 5),
        "tolerance": round(limit, 5),
        "agree": int((got.argmax(-1) == want.argmax(-1)).sum()),
        "positions": len(tokens),
    }


def make(
    cases: dict[str, tiny.Case], vocab_size: int, file: Path, errors: dict[str, Any] | None = None
) -> None:
    """Run the cases and store the logits of some rows; into `errors` goes what was measured, from it what was before."""
    golden: dict[str, Any] = {}
    if NEW:
        with np.load(file) as stored:
            golden = {name: stored[name] for name in stored.files if name in cases}
    team = ops.Team(2)
    for name, case in cases.items():
        if name in golden and (errors is None or name in errors):
            continue
        with tempfile.TemporaryDirectory() as directory:
            model = load(tiny.write(name, Path(directory), case))
            tokens = tiny.prompt(name, vocab_size)
            logits = logits_of(model, tokens)
            if errors is not None:
                errors[name] = measure(Path(directory), case, tokens, logits, team)
        golden[name] = logits[list(tiny.GOLDEN_ROWS)]
        print(f"{name:36} max |logit| {np.abs(logits).max():.3f}")
    np.savez_compressed(file, **{name: golden[name] for name in cases})
    team.close()
    print(f"{file.name}: {file.stat().st_size} bytes")


def main() -> None:
    """Write the files beside this script."""
    transformers.logging.set_verbosity_error()
    make(tiny.CASES, tiny.VOCAB_SIZE, tiny.GOLDEN_FILE)
    errors: dict[str, Any] = json.loads(families.ERRORS_FILE.read_text())["cases"] if NEW else {}
    errors = {name: found for name, found in errors.items() if name in families.CASES}
    make(families.CASES, families.VOCAB_SIZE, families.GOLDEN_FILE, errors)
    versions = f"torch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}"
    document = {
        "tier": ops.isa(),
        "versions": versions,
        "cases": {name: errors[name] for name in families.CASES},
    }
    families.ERRORS_FILE.write_text(json.dumps(document, indent=1) + "\n")
    print(versions)


if __name__ == "__main__":
    main()
