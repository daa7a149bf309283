"""Quantised checkpoints written from plain ones: `pace quantize`."""

from __future__ import annotations

from pace.export.quantize import SCHEMES, Calibration, Summary, quantize_checkpoint

__all__ = ["SCHEMES", "Calibration", "Summary", "quantize_checkpoint"]
