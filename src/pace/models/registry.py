"""The architectures that exist: `config.json` to spec and weight map.

Adding one of a known shape is a file of data and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Final

from pace.errors import CheckpointError, UnsupportedModel, show
from pace.models.config import Config
from pace.models.quantisation import CONFIG_KEYS, quantisation
from pace.models.spec import DecoderSpec
from pace.models.weight_map import WeightMap


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture.

    Its family's file is imported when it is asked for: together they take 10 to 30 ms.

    Args:
        model_type: the config's model_type that belongs to it.
        reader: what reads the config, as "file.function" of `pace.models`; of a multimodal one "".
        table: in the same file.
        text: of a multimodal one, the architectures that its text model may have; only that is run.
        tied: of a multimodal one, whether it ties its embeddings where the config doesn't say.
    """

    model_type: str
    reader: str = ""
    table: str = "WEIGHTS"
    text: tuple[str, ...] = ()
    tied: bool = True

    @property
    def spec(self) -> Callable[[Config], DecoderSpec]:
        """Reads the config."""
        if self.text:
            return lambda config: _text_tower(config, self.text, self.tied)
        _, _, function = self.reader.partition(".")
        reader: Callable[[Config], DecoderSpec] = getattr(self._family, function)
        return reader

    @property
    def weights(self) -> WeightMap:
        """Plan weight name -> checkpoint tensors. Every text model that a multimodal one may hold has the same."""
        if self.text:
            return ARCHITECTURES[self.text[0]].weights
        table: WeightMap = getattr(self._family, self.table)
        return table

    @property
    def _family(self) -> ModuleType:
        return import_module(f"pace.models.{self.reader.partition('.')[0]}")


ARCHITECTURES: Final[Mapping[str, Architecture]] = MappingProxyType(
    {
        "LlamaForCausalLM": Architecture("llama", "llama.llama"),
        "MistralForCausalLM": Architecture("mistral", "mistral.mistral"),
        "MinistralForCausalLM": Architecture("ministral", "mistral.mistral"),
        "Ministral3ForCausalLM": Architecture("ministral3", "mistral.ministral3"),
        "Mistral3ForConditionalGeneration": Architecture(
            "mistral3", text=("MistralForCausalLM", "Ministral3ForCausalLM")
        ),
        "Qwen2ForCausalLM": Architecture("qwen2", "qwen2.qwen2"),
        "Qwen3ForCausalLM": Architecture("qwen3", "qwen3.qwen3"),
        "Gemma2ForCausalLM": Architecture("gemma2", "gemma.gemma2", "WEIGHTS2"),
        "Gemma3ForCausalLM": Architecture("gemma3_text", "gemma.gemma3", "WEIGHTS3"),
        "Gemma3ForConditionalGeneration": Architecture("gemma3", text=("Gemma3ForCausalLM",)),
        "Gemma4ForCausalLM": Architecture("gemma4_text", "gemma4.gemma4"),
        "Gemma4ForConditionalGeneration": Architecture("gemma4", text=("Gemma4ForCausalLM",)),
        "Gemma4UnifiedForCausalLM": Architecture("gemma4_unified_text", "gemma4.gemma4_unified"),
        "Gemma4UnifiedForConditionalGeneration": Architecture(
            "gemma4_unified", text=("Gemma4UnifiedForCausalLM",)
        ),
        "PhiForCausalLM": Architecture("phi", "phi.phi"),
        "Phi3ForCausalLM": Architecture("phi3", "phi3.phi3"),
        "OPTForCausalLM": Architecture("opt", "opt.opt"),
        "GPTJForCausalLM": Architecture("gptj", "gptj.gptj"),
        "Olmo2ForCausalLM": Architecture("olmo2", "olmo.olmo2"),
        "Olmo3ForCausalLM": Architecture("olmo3", "olmo.olmo3"),
        "GraniteForCausalLM": Architecture("granite", "granite.granite"),
        "SmolLM3ForCausalLM": Architecture("smollm3", "smollm3.smollm3"),
        "StableLmForCausalLM": Architecture("stablelm", "stablelm.stablelm"),
        "HunYuanDenseV1ForCausalLM": Architecture("hunyuan_v1_dense", "hunyuan.hunyuan"),
        "SeedOssForCausalLM": Architecture("seed_oss", "seed_oss.seed_oss"),
        "Exaone4ForCausalLM": Architecture("exaone4", "exaone4.exaone4"),
        "Glm4ForCausalLM": Architecture("glm4", "glm4.glm4"),
        "Ernie4_5ForCausalLM": Architecture("ernie4_5", "ernie4_5.ernie4_5"),
        "Cohere2ForCausalLM": Architecture("cohere2", "cohere2.cohere2"),
        "Qwen2MoeForCausalLM": Architecture("qwen2_moe", "qwen_moe.qwen2_moe", "WEIGHTS2"),
        "Qwen3MoeForCausalLM": Architecture("qwen3_moe", "qwen_moe.qwen3_moe", "WEIGHTS3"),
        "MixtralForCausalLM": Architecture("mixtral", "mixtral.mixtral"),
        "GptOssForCausalLM": Architecture("gpt_oss", "gpt_oss.gpt_oss"),
        "Llama4ForCausalLM": Architecture("llama4_text", "llama4.llama4"),
        "Llama4ForConditionalGeneration": Architecture("llama4", text=("Llama4ForCausalLM",), tied=False),
        "Glm4MoeForCausalLM": Architecture("glm4_moe", "glm4_moe.glm4_moe"),
        "SarvamMoEForCausalLM": Architecture("sarvam_moe", "glm4_moe.sarvam", "SARVAM_WEIGHTS"),
        "OlmoeForCausalLM": Architecture("olmoe", "olmo.olmoe", "MOE_WEIGHTS"),
        "GraniteMoeForCausalLM": Architecture("granitemoe", "granite.granite_moe", "MOE_WEIGHTS"),
        "MiniMaxM2ForCausalLM": Architecture("minimax_m2", "mixtral.minimax_m2", "MINIMAX_WEIGHTS"),
    }
)


def architectures() -> tuple[str, ...]:
    """The architectures that exist, by the names that `config.json` has for them."""
    return tuple(ARCHITECTURES)


def parse_config(values: object, where: str = "config.json") -> tuple[DecoderSpec, WeightMap]:
    """Find the architecture of a parsed `config.json` and read its spec.

    Args:
        values: the JSON document.
        where: how error messages call the file.

    Returns:
        The decoder's spec and the map from plan weights to checkpoint tensors.

    Raises:
        CheckpointError: not an object, or a value is missing, of the wrong type or out of range.
        UnsupportedModel: an unknown architecture, a value that pace's mathematics does not cover, or weights quantised as
            nothing here reads them.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where} holds {show(values)}, expected a JSON object")
    config = Config(values, where)
    architecture = _architecture(config)
    if quantisation(values, where) is not None:
        config.skip(*CONFIG_KEYS)
    spec = architecture.spec(config)
    config.refuse_unread(spec.max_len)
    return spec, architecture.weights


def _text_tower(config: Config, allowed: tuple[str, ...], tied: bool) -> DecoderSpec:
    """The text model of a multimodal checkpoint; the parts that see and hear are not run."""
    text = config.table("text_config")
    config.skip("vision_config", "audio_config")
    if quantisation(config.values, config.where) is not None:
        text.skip(*CONFIG_KEYS)
    known = {ARCHITECTURES[name].model_type: ARCHITECTURES[name] for name in allowed}
    model_type = text.text("model_type", default=next(iter(known)))
    if model_type not in known:
        raise text.error("model_type", model_type, " or ".join(map(repr, known)))
    spec = known[model_type].spec(text)
    text.refuse_unread(spec.max_len)
    # The outer key counts; a file with a head of its own settles it.
    return replace(spec, tied=config.flag("tie_word_embeddings", default=tied))


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
