"""GGUF files: what they say about themselves (`header`), and from that what a folder from the hub would hold: its config
(`config`), its tokenizer (`tokenizer`), its tensors under their original names (`names`, `tensors`)."""

from __future__ import annotations

from pace.checkpoint.gguf.files import GgufModel

__all__ = ["GgufModel"]
