"""EXAONE 4."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models import olmo
from pace.models.common import SLIDING, decoder, layer_kinds, windows
from pace.models.config import Config
from pace.models.spec import DecoderSpec, HeadNorm, Placement
from pace.models.weight_map import WeightMap


def exaone4(config: Config) -> DecoderSpec:
    """Norms behind attention and MLP only, norms on q and k heads; beside a window, full layers don't rotate."""
    spec = replace(decoder(config), placement=Placement.POST)
    window = config.optional_integer("sliding_window", default=4096)
    kinds = layer_kinds(config, len(spec.layers), lambda i: slides(config, window, i))
    rotates = [window is None or kind == SLIDING for kind in kinds]
    return spec.with_mixers(
        norm=HeadNorm(), window=windows(config, kinds, window), rope=[0 if r else None for r in rotates]
    )


def slides(config: Config, window: int | None, i: int) -> bool:
    """Whether layer i of a file without `layer_types` has the window."""
    return window is not None and (i + 1) % config.integer("sliding_window_pattern", default=4) != 0


WEIGHTS: WeightMap = {**olmo.WEIGHTS, **base.QK_NORMS}
