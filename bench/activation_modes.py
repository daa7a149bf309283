"""What int8 rows cost in accuracy where the weights are MXFP4: error of the output beside that of bf16 rows.

    python bench/activation_modes.py

The error is |y - exact| over |exact|, Euclidean over all outputs, where exact is float64 on the rows as they were before
they were rounded. Rows: 256 of 2880 columns. Weights: normal numbers rounded to MXFP4.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from ext.kit import build, put, rng, rows_batch

from pace import ops
from pace.models import plan as ir
from pace.reference import MXFP4_VALUES, dequantise_mxfp4

ROWS, N, K = 256, 256, 2880


def to_mxfp4(w: Any) -> tuple[Any, Any]:
    """Blocks and scales of [n, k]: the scale puts the largest magnitude of 32 between 4 and 8, the rest is nearest."""
    groups = w.reshape(len(w), -1, 32)
    scales = np.floor(np.log2(np.abs(groups).max(-1))).astype(np.int32) - 2
    x = groups / np.exp2(scales)[..., None]
    codes = np.abs(np.abs(x)[..., None] - MXFP4_VALUES).argmin(-1) + 8 * (x < 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8), (scales + 127).astype(np.uint8)


def rows_of(kind: str) -> Any:
    """Activations of one kind."""
    r = rng(kind)
    x = r.standard_normal((ROWS, K))
    if kind == "student-t, 3 degrees":
        return r.standard_t(3, (ROWS, K))
    if kind == "silu(a) * b":
        return x / (1 + np.exp(-x)) * r.standard_normal((ROWS, K))
    for name, factor in (("x 30", 30), ("x 100", 100), ("x 1000", 1000)):
        if kind.endswith(name):
            x[:, r.choice(K, 9, replace=False)] *= factor
    return x


def main() -> None:
    """Print a table."""
    blocks, scales = to_mxfp4(rng("weights").standard_normal((N, K)))
    w = dequantise_mxfp4(blocks, scales)
    team = ops.Team(ops.default_threads()[0])
    matrix = ops.PackedMatrix(team, N, K, format="mxfp4")
    matrix.pack_mxfp4(blocks, scales)
    slots = [ir.Slot("a", K, "bf16", "tokens"), ir.Slot("q", K, "int8", "tokens")]
    slots += [ir.Slot(c, N, "f32", "tokens") for c in ("bf16", "int8")]
    chain: list[ir.Op] = [
        ir.Gemm("g", "a", "bf16", "w"),
        ir.Quantise("q", "a", "q"),
        ir.Gemm("h", "q", "int8", "w"),
    ]
    plan = build(team, chain, slots, {"w": matrix})
    print(f"{'activations':32} {'bf16':>9} {'int8':>9}")
    for kind in (
        "normal",
        "silu(a) * b",
        "student-t, 3 degrees",
        "normal, 9 columns x 30",
        "normal, 9 columns x 100",
        "normal, 9 columns x 1000",
    ):
        x = rows_of(kind)
        put(plan, "a", x)
        plan.step(rows_batch(ROWS))
        # Columns with outliers dominate the output of the last kinds; what the others lose shows without them.
        big = np.abs(x).max(0) > 12 if "columns" in kind else np.zeros(K, bool)
        exact, kept = x @ w.T, x[:, ~big] @ w[:, ~big].T
        errors = [np.linalg.norm(plan.slot(mode)[:ROWS] - exact) for mode in ("bf16", "int8")]
        shares = [error / np.linalg.norm(exact) for error in errors]
        line = f"{kind:32} {shares[0]:9.5f} {shares[1]:9.5f}"
        if big.any():
            line += "   of the other columns' share: " + " ".join(
                f"{e / np.linalg.norm(kept):.4f}" for e in errors
            )
        print(line)


if __name__ == "__main__":
    main()
