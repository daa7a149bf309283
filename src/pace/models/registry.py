"""The architectures that exist: `config.json` to spec and weight map.

Adding one of a known shape is a file of data and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from pace.errors import CheckpointError, UnsupportedModel, show
from pace.models import llama, mistral, qwen2, qwen3
from pace.models.spec import Config, DecoderSpec
from pace.models.weights import WeightMap


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture.

    Args:
        model_type: the config's model_type that belongs to it.
        spec: reads the config.
        weights: plan weight name -> checkpoint tensors.
    """

    model_type: str
    spec: Callable[[Config], DecoderSpec]
    weights: WeightMap


ARCHITECTURES: Final[Mapping[str, Architecture]] = MappingProxyType(
    {
        "LlamaForCausalLM": Architecture("llama", llama.llama, llama.WEIGHTS),
        "MistralForCausalLM": Architecture("mistral", mistral.mistral, mistral.WEIGHTS),
        "Qwen2ForCausalLM": Architecture("qwen2", qwen2.qwen2, qwen2.WEIGHTS),
        "Qwen3ForCausalLM": Architecture("qwen3", qwen3.qwen3, qwen3.WEIGHTS),
    }
)


def parse_config(values: object, where: str = "config.json") -> tuple[DecoderSpec, WeightMap]:
    """Find the architecture of a parsed `config.json` and read its spec.

    Args:
        values: the JSON document.
        where: how error messages call the file.

    Returns:
        The decoder's spec and the map from plan weights to checkpoint tensors.

    Raises:
        CheckpointError: not an object, or a value is missing, of the wrong type or out of range.
        UnsupportedModel: an unknown architecture, or a value that pace's mathematics does not cover.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where} holds {show(values)}, expected a JSON object")
    config = Config(values, where)
    architecture = _architecture(config)
    return architecture.spec(config), architecture.weights


def _architecture(config: Config) -> Architecture:
    """By `architectures`; by model_type where that is missing, as some mergers leave it out."""
    found = config.values.get("architectures")
    if found is None or found == []:
        model_type = config.text("model_type")
        for architecture in ARCHITECTURES.values():
            if architecture.model_type == model_type:
                return architecture
        found = [model_type]
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
        raise config.error("architectures", found, f"a list with one of {', '.join(ARCHITECTURES)}")
    known = ARCHITECTURES.get(
        found[0].removeprefix("FSDP")
    )  # which sharded training puts before the class's name
    if known is None:
        raise UnsupportedModel(
            f"{config.where}: architecture {show(found[0])} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    model_type = config.text("model_type", default=known.model_type)
    if model_type != known.model_type:
        raise config.error("model_type", model_type, f"{known.model_type!r} for {found[0]}")
    return known
