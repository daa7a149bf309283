"""PARD adaptation: a small causal model learns to guess several tokens in one pass (`pace train pard`).

Only this package uses torch and transformers (the extra `pace[train]`); nothing of pace imports it but the command line.
`cod.py` lays out what is learnt, in numpy; `data.py` makes the documents; `model.py`, `loss.py` and `trainer.py` are the
torch side; `acceptance.py` counts what a draft would have had accepted.
"""

from __future__ import annotations
