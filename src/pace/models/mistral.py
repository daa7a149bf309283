"""Mistral 7B (v0.1 with its sliding window, v0.2 and v0.3 without) and Mistral Nemo."""

from __future__ import annotations

from dataclasses import replace

from pace.errors import CheckpointError
from pace.models import llama as base
from pace.models.spec import Config, DecoderSpec, LayerSpec, refuse_foreign
from pace.models.weights import WeightMap


def mistral(config: Config) -> DecoderSpec:
    """Llama without biases, with one sliding window for every layer or none.

    attention_bias and mlp_bias are not read, as in transformers: a bias in the file would be an unexpected tensor.
    """
    refuse_foreign(config, also={"layer_types": ()})
    # transformers reads a missing key as 4096 and null as "no window": the difference must not be guessed.
    if "sliding_window" not in config.values:
        raise CheckpointError(
            f"{config.where} has no 'sliding_window'; write null for none, or its length in tokens"
        )
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    spec = base.decoder(config)
    return replace(spec, layers=(LayerSpec(window=window),) * len(spec.layers))


WEIGHTS: WeightMap = base.WEIGHTS
