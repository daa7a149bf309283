"""The weights of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from pace.checkpoint import ModelFiles
from pace.console import progress_bar
from pace.engine.guard import Measured
from pace.engine.pack_cache import PackCache
from pace.engine.packing import PackedSink
from pace.engine.weight_source import WeightSource
from pace.errors import ConfigError
from pace.models.decoder import lower
from pace.models.formats import SCHEMES, formats_of
from pace.models.held import Held, held_formats
from pace.models.plan import Plan
from pace.models.quantisation import quantised_in
from pace.models.spec import DecoderSpec
from pace.models.weight_map import WeightMap
from pace.models.weights import Tensors, load_weights, settle_head

__all__ = ["open_tensors"]


@contextmanager
def open_tensors(
    files: ModelFiles,
    values: dict[str, Any],
    spec: DecoderSpec,
    weight_map: WeightMap,
    quantization: str | None,
    cache: PackCache | None,
) -> Iterator[WeightSource]:
    """The weights of a checkpoint that is no pack; arguments as `open_weights`.

    Args:
        cache: where they are kept once they are packed.

    Raises:
        CheckpointError, ConfigError: as `open_weights`.
    """
    with closing(files.tensors()) as checkpoint:
        tensors = Tensors(checkpoint, weight_map, len(spec.layers), quantised_in(checkpoint, values))
        spec = settle_head(spec, tensors)
        yield _Tensors(spec, _held(quantization, spec, tensors), tensors, cache)


class _Tensors(WeightSource):
    """Weights of a checkpoint."""

    def __init__(
        self,
        spec: DecoderSpec,
        held: Held,
        tensors: Tensors,
        cache: PackCache | None,
    ) -> None:
        super().__init__(spec, held.formats, held.by_group)
        self._tensors = tensors
        self._cache = cache

    def fill(self, plan: Plan, sink: PackedSink, show_progress: bool | None) -> None:
        with _progress_bar(show_progress) as progress:
            load_weights(plan, self._tensors, sink, progress)

    @property
    def is_stored(self) -> bool:
        return self._cache is not None

    def store(self, weights: Mapping[str, Any], measured: Measured | None) -> None:
        if self._cache is not None:
            self._cache.store(weights, measured)


def _held(quantization: str | None, spec: DecoderSpec, tensors: Tensors) -> Held:
    """The formats that the checkpoint has, and those that the option asks for."""
    plan = lower(spec, 1)
    held = held_formats(plan, tensors)
    if quantization is None:
        return held
    if tensors.quantised and SCHEMES[quantization].matrices is not None:
        raise ConfigError(
            f"quantization is {quantization}, but the checkpoint is quantised already; leave the option out, or take "
            "int8-head, which rounds the LM head where the file leaves it in 16 bits"
        )
    formats = formats_of(plan, quantization)
    if formats.keys() & (held.formats.keys() | held.rounded):
        raise ConfigError(
            f"quantization is {quantization}, but the checkpoint's LM head is quantised already; leave the option out"
        )
    return held._replace(formats=held.formats | formats)


@contextmanager
def _progress_bar(show: bool | None) -> Iterator[Callable[[int, int], None] | None]:
    bar = progress_bar(show, desc="loading", unit="B", unit_scale=True, leave=False)
    if bar is None:
        yield None
        return
    with bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
