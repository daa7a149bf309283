"""How a checkpoint wants its hidden states pooled: the `1_Pooling/config.json` that sentence-transformers writes."""

from __future__ import annotations

from pathlib import Path

from pace.checkpoint.config_json import checkpoint_file, read_json
from pace.errors import CheckpointError

__all__ = ["POOLING_CONFIG", "read_pooling"]

POOLING_CONFIG = "1_Pooling/config.json"

_MODES = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}


def read_pooling(directory: Path) -> str:
    """ "last" or "mean"; "last" where the checkpoint says nothing.

    Raises:
        CheckpointError: the file is malformed, or asks for what pace does not have.
    """
    folder, name = POOLING_CONFIG.split("/")
    path = checkpoint_file(directory / folder, name)
    if path is None:
        return "last"
    values = read_json(path)
    asked = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if len(asked) != 1 or asked[0] not in _MODES:
        raise CheckpointError(
            f"{path} asks for {', '.join(asked) or 'no pooling'}, expected one of {', '.join(_MODES)}; name a pooling "
            "in the request"
        )
    return _MODES[asked[0]]
