"""Weights in few bits: what checkpoints hold, read exactly, and what `pace quantize` writes."""
