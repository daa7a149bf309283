"""From a checkpoint to a folder that starts at once: `pace pack`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from pace.checkpoint import ModelFiles, model_files, resolve
from pace.checkpoint.pack_file import PACK_FILE, pack_bytes, pack_in, write_pack
from pace.config import EngineConfig
from pace.engine.build import make_team
from pace.engine.guard import measure
from pace.engine.loader import read_config
from pace.engine.packing import PackedSink
from pace.engine.packs import about, arrays_of
from pace.engine.weight_source import open_weights
from pace.errors import ConfigError
from pace.export.folder import check_room, copy_rest, new_folder
from pace.models.registry import parse_config
from pace.text.tokenizer import Tokenizer
from pace.text.tokenizer_json import MAX_TOKENIZER_BYTES

__all__ = ["pack_checkpoint"]


def pack_checkpoint(config: EngineConfig, out: Path) -> int:
    """Write a folder with a checkpoint's packed weights and all its other files; nothing is left where it fails.

    Args:
        config: the model, what rounds it, and the threads that pack.
        out: a folder that does not exist, or is empty.

    Returns:
        The bytes of the pack.

    Raises:
        CheckpointError: the model can't be read.
        ConfigError: it is packed already, `out` can't be used, or the disk is full.
    """
    files = model_files(resolve(config.model, config.revision))
    if pack_in(files.path) is not None:
        raise ConfigError(f"{files.path} is packed already; take the original checkpoint")
    values = read_config(files)
    spec, weight_map = parse_config(values, files.where("config.json"))
    config = replace(config, pack_cache=None)
    with (
        open_weights(config, files, values, spec, weight_map, quantization=config.quantization) as source,
        new_folder(out, 0) as folder,
    ):
        tokenizer = _tokenizer(config, files, source.spec.vocab_size, source.spec.max_len)
        plan = source.lower(1)
        team = make_team(config)
        try:
            sink = PackedSink(team)
            source.fill(plan, sink, None)
            measured = measure(plan, sink.weights, team, tokenizer)
        finally:
            team.close()
        arrays = arrays_of(sink.weights)
        check_room(folder, pack_bytes(arrays))
        with (folder / PACK_FILE).open("xb", buffering=0) as file:
            write_pack(file.fileno(), about(sink.weights, config.quantization, measured), arrays)
            n_bytes = os.fstat(file.fileno()).st_size
        copy_rest(files, folder)
    return n_bytes


def _tokenizer(config: EngineConfig, files: ModelFiles, vocab_size: int, max_len: int) -> Tokenizer | None:
    """The model's own, for the guard's text; the one that it will be loaded with, mostly."""
    if files.read("tokenizer.json", MAX_TOKENIZER_BYTES) is None:
        return None
    return Tokenizer(
        files, vocab_size=vocab_size, max_model_len=max_len, trust_patterns=config.trust_tokenizer
    )
