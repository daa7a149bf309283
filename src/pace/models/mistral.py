"""Mistral 7B (v0.1 with its sliding window, v0.2 and v0.3 without), Nemo, Small (and Sarvam-M); Ministral; Ministral 3."""

from __future__ import annotations

from pace.errors import CheckpointError
from pace.models import llama as base
from pace.models import rope
from pace.models.common import decoder, layer_kinds, one_window, windows
from pace.models.config import Config
from pace.models.spec import DecoderSpec
from pace.models.weight_map import WeightMap


def mistral(config: Config) -> DecoderSpec:
    """Llama without biases, with one sliding window for every layer or none; Ministral: for those of `layer_types`.

    attention_bias and mlp_bias are not read, as in transformers: a bias in the file would be an unexpected tensor.
    """
    # transformers reads a missing key as 4096 and null as "no window": the difference must not be guessed.
    if "sliding_window" not in config.values:
        raise CheckpointError(
            f"{config.where} has no 'sliding_window'; write null for none, or its length in tokens"
        )
    spec = decoder(config)
    window = config.optional_integer("sliding_window")
    kinds = layer_kinds(config, len(spec.layers), lambda i: window is not None)
    return spec.with_mixers(window=windows(config, kinds, window))


MINISTRAL_ROPE = {
    "type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def ministral3(config: Config) -> DecoderSpec:
    """Mistral whose queries grow with the logarithm of the position, in steps of the original context."""
    config = config.family({"head_dim": 128})
    extra = ("llama_4_scaling_beta", "max_position_embeddings", "original_max_position_embeddings")
    spec = decoder(config, ropes=rope.reader(extra=extra, default=MINISTRAL_ROPE))
    parameters = rope.parameters(config, default=MINISTRAL_ROPE)[0]
    beta = parameters.number("llama_4_scaling_beta")
    floor = float(parameters.integer("original_max_position_embeddings"))
    window = config.optional_integer("sliding_window")
    return spec.with_mixers(
        window=one_window(config, len(spec.layers), window), temperature=(beta, floor, 0.0)
    )


WEIGHTS: WeightMap = base.WEIGHTS
