"""Speculative decoding: drafters propose tokens, the target verifies them, and the output stays what it is without."""

from __future__ import annotations

from typing import Any

from pace.config import EngineConfig
from pace.engine import loader as target_loader
from pace.engine.loader import Loaded

__all__ = ["load"]


def load(config: EngineConfig, **options: Any) -> Loaded:
    """Load a model with the speculation that its config asks for.

    Args:
        options: of `engine.loader.load`.

    Raises:
        CheckpointError, ConfigError, CapacityError: see the parts.
    """
    speculative = config.speculative
    if speculative is None or speculative.num_speculative_tokens == 0:
        return target_loader.load(config, **options)
    from pace.speculative.loader import make_maker  # brings every drafter; most engines have none

    return target_loader.load(config, speculation=make_maker(config, speculative, **options), **options)
