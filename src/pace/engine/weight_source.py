"""Where the weights of a model come from: its checkpoint, a pack of it, or nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pace.checkpoint import ModelFiles
from pace.checkpoint.pack_file import PackFile, pack_in
from pace.config import EngineConfig
from pace.engine.guard import Measured
from pace.engine.pack_cache import PackCache
from pace.engine.packing import PackedSink, invent_weights
from pace.engine.packs import formats_in, measured_in, orders_in, weights_in
from pace.errors import ConfigError, WeightsError, show
from pace.log import logger
from pace.models.decoder import lower
from pace.models.formats import formats_of, with_formats, with_orders
from pace.models.plan import Plan, WeightFormat
from pace.models.spec import DecoderSpec
from pace.models.weight_map import WeightMap

__all__ = ["WeightSource", "open_weights"]


class WeightSource:
    """Invented weights, and what other sources share.

    Args:
        spec: of the config.
        formats: of matrices, by weight name.
        by_group: those whose columns stand by group.

    Attributes:
        measured: what the guard has measured of these weights before, None: nothing.
    """

    measured: Measured | None = None

    def __init__(
        self, spec: DecoderSpec, formats: dict[str, WeightFormat], by_group: frozenset[str] = frozenset()
    ) -> None:
        self.spec = spec
        self.formats = formats
        self.by_group = by_group

    def lower(self, max_model_len: int, taps: tuple[int, ...] = ()) -> Plan:
        """The plan of these weights, on bf16 rows; arguments as those of `decoder.lower`."""
        return self._held(lower(self.spec, max_model_len, taps))

    def _held(self, plan: Plan) -> Plan:
        return with_formats(with_orders(plan, self.by_group), self.formats)

    def fill(self, plan: Plan, sink: PackedSink, show_progress: bool | None) -> None:
        """Give a sink the plan's weights; the plan is one that `lower` made."""
        invent_weights(plan, sink)

    @property
    def is_stored(self) -> bool:
        """Whether `store` wants what was filled."""
        return False

    def store(self, weights: Mapping[str, Any], measured: Measured | None) -> None:
        """Keep packed weights for the next time."""


class _Packed(WeightSource):
    """Weights of a pack."""

    def __init__(self, spec: DecoderSpec, pack: PackFile) -> None:
        # As `settle_head` would: a head of its own is used.
        spec = replace(spec, tied=False) if "lm_head" in pack else spec
        plan = lower(spec, 1)
        known = {name for name, shape in plan.weights.items() if shape.k is not None and not shape.mapped}
        # `weights_in` refuses others by name.
        formats = {name: form for name, form in formats_in(pack).items() if name in known}
        super().__init__(spec, formats, orders_in(pack))
        self.measured = measured_in(pack)
        self._weights = weights_in(pack, self._held(plan))

    def fill(self, plan: Plan, sink: PackedSink, show_progress: bool | None) -> None:
        for name, weight in self._weights.items():
            sink.packed(name, weight)


@contextmanager
def open_weights(
    config: EngineConfig,
    files: ModelFiles,
    values: dict[str, Any],
    spec: DecoderSpec,
    weight_map: WeightMap,
    *,
    quantization: str | None,
    random_weights: bool = False,
) -> Iterator[WeightSource]:
    """The weights of a model; its files are open as long as the block runs.

    Args:
        config: whose pack_cache is used.
        values, spec, weight_map: of its config.json.
        quantization: what is to be made of a bf16 checkpoint.

    Raises:
        CheckpointError: there are none, or they are not what the config says.
        ConfigError: the option and the weights contradict each other.
    """
    if random_weights:
        formats = {} if quantization is None else formats_of(lower(spec, 1), quantization)
        yield WeightSource(spec, formats)
        return
    path = pack_in(files.path)
    if path is not None:
        pack = PackFile(path)
        made_with = pack.about.get("quantization")
        if quantization not in (None, made_with):
            raise ConfigError(
                f"quantization is {quantization}, but {path} was packed with {show(made_with)}; leave the option out, or "
                "pack the checkpoint with it"
            )
        yield _Packed(spec, pack)
        return
    cache = None if config.pack_cache is None else PackCache(config.pack_cache, files, values, quantization)
    cached = None if cache is None else _cached(cache, spec)
    if cached is not None:
        yield cached
        return
    from pace.engine.tensor_source import open_tensors  # brings every layout of weights; a pack has its own

    with open_tensors(files, values, spec, weight_map, quantization, cache) as source:
        yield source


def _cached(cache: PackCache, spec: DecoderSpec) -> WeightSource | None:
    pack = cache.find()
    if pack is None:
        return None
    try:
        return _Packed(spec, pack)
    except WeightsError as error:
        logger.info("%s; it is written anew", error)
        return None
