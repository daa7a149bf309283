"""SmolLM3."""

from __future__ import annotations

from dataclasses import replace

from pace.models import llama as base
from pace.models import rope
from pace.models.common import SLIDING, decoder, layer_kinds, windows
from pace.models.config import Config
from pace.models.spec import DecoderSpec
from pace.models.weight_map import WeightMap


def smollm3(config: Config) -> DecoderSpec:
    """Llama in which every fourth layer does not rotate (`no_rope_layers` has 1 where a layer *does*)."""
    spec = decoder(config, ropes=rope.reader(theta=2e6), tied=True)
    n = len(spec.layers)
    interval = config.integer("no_rope_layer_interval", default=4)
    rotates = [(i + 1) % interval != 0 for i in range(n)]
    if config.has("no_rope_layers"):
        rotates = list(config.bits("no_rope_layers", n))
    slides = config.flag("use_sliding_window", default=False)
    window = config.optional_integer("sliding_window") if slides else None
    config.skip("sliding_window")
    kinds = layer_kinds(config, n, lambda i: window is not None and not rotates[i])
    if SLIDING in kinds and not slides:
        raise config.error("use_sliding_window", slides, f"true, as layer_types has {SLIDING}")
    spec = replace(spec, bias=base.biases(config))
    return spec.with_mixers(window=windows(config, kinds, window), rope=[0 if r else None for r in rotates])


WEIGHTS: WeightMap = base.WEIGHTS
