"""Tiny checkpoints of every architecture, three or more of each, that flip every option a family reads.

Their tensors come from the family's own weight map, so `make.py` lets transformers load each file and refuses one
with a tensor missing or left over. Widths are odd where the family allows it; prompts are longer than every window.
"""

from __future__ import annotations

from golden import experts as _experts
from golden import llamas as _llamas
from golden import others as _others
from golden.kit import CASES, ERRORS_FILE, FULL, GOLDEN_FILE, SLIDING, VOCAB_SIZE

__all__ = ["CASES", "ERRORS_FILE", "FULL", "GOLDEN_FILE", "SLIDING", "VOCAB_SIZE"]
_ = (_llamas, _others, _experts)
