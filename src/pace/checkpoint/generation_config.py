"""Sampling defaults and EOS ids that a checkpoint states in `generation_config.json` and `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pace.checkpoint.files import ModelFiles, model_files
from pace.errors import CheckpointError, RequestError, show
from pace.params import SamplingParams

__all__ = ["GenerationDefaults", "load_generation_defaults"]

GENERATION_CONFIG = "generation_config.json"
MAX_EOS_IDS = 64

# generation_config.json's name -> ours; the same that vLLM takes.
_SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint says about generation.

    Attributes:
        sampling: values for `SamplingParams.merged_with`.
        eos_token_ids: ids that end an output, from every file that names some.
        eos_token_id: the one of them that is meant where only one is: the tokenizer's, else the first that
            is named.
    """

    sampling: Mapping[str, Any]
    eos_token_ids: frozenset[int]
    eos_token_id: int | None = None


def load_generation_defaults(
    directory: Path | ModelFiles,
    config: Mapping[str, Any],
    *,
    vocab_size: int,
    tokenizer_eos_id: int | None = None,
    source: str = "auto",
) -> GenerationDefaults:
    """Read the sampling defaults, and the union of the EOS ids of config.json, generation_config.json and
    tokenizer.

    Args:
        directory: the checkpoint's folder or files; generation_config.json may be absent.
        config: the parsed config.json.
        vocab_size: rows of the embedding; EOS ids must be below it.
        tokenizer_eos_id: id of the tokenizer's eos_token; None where it has none.
        source: of the sampling defaults: "auto": this folder; "vllm": none; else another folder, whose
            generation_config.json adds its EOS ids, too.

    Raises:
        CheckpointError: a value has the wrong type or is out of range; the message names file and value.
    """
    files = model_files(directory)
    path = files.where(GENERATION_CONFIG)
    own = generation = files.json(GENERATION_CONFIG) or {}
    if source == "vllm":
        generation = {}
    elif source != "auto":
        other = model_files(Path(source).expanduser())
        found = other.json(GENERATION_CONFIG)
        if found is None:
            raise CheckpointError(
                f"generation_config: {source} has no {GENERATION_CONFIG}; name a folder that has one, auto or vllm"
            )
        path, generation = other.where(GENERATION_CONFIG), found
    sampling = {
        ours: generation[theirs]
        for theirs, ours in _SAMPLING_FIELDS.items()
        if generation.get(theirs) is not None
    }
    do_sample = generation.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise CheckpointError(f"{path}: do_sample is {show(do_sample)}, expected true or false")
    if do_sample is False:
        sampling["temperature"] = 0.0
    try:
        SamplingParams(**sampling)
    except RequestError as error:
        raise CheckpointError(f"{path}: {error}") from None

    eos: list[int] = []
    if tokenizer_eos_id is not None:
        eos += _eos_ids(files.where("tokenizer_config.json"), {"eos_token_id": tokenizer_eos_id}, vocab_size)
    eos += _eos_ids(files.where("config.json"), config, vocab_size)
    text_config = config.get("text_config")
    if isinstance(text_config, Mapping):
        eos += _eos_ids(files.where("config.json"), text_config, vocab_size)
    eos += _eos_ids(files.where(GENERATION_CONFIG), own, vocab_size)
    eos += _eos_ids(path, generation, vocab_size)
    return GenerationDefaults(MappingProxyType(sampling), frozenset(eos), eos[0] if eos else None)


def _eos_ids(path: str, values: Mapping[str, Any], vocab_size: int) -> list[int]:
    value = values.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > MAX_EOS_IDS:
        raise CheckpointError(f"{path}: eos_token_id has {len(ids)} ids, expected at most {MAX_EOS_IDS}")
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f"{path}: eos_token_id has {show(token_id)}, expected ids from 0 to {vocab_size - 1}"
            )
    return ids
