"""Rotary position embeddings: from `config.json` to a `RopeSpec`, and from that to the plan's table.

Every variant that transformers has for text decoders: default, linear, dynamic (NTK), llama3, yarn, longrope,
proportional; each with partial rotation, interleaved pairs and one set per layer type. transformers 4 files write
`rope_theta` and `rope_scaling`, transformers 5 files `rope_parameters`; both are read.

transformers recomputes dynamic and longrope tables when a sequence outgrows a threshold, which makes a
token's key depend on what came later. Here the choice is a constant of the engine: both depend on
`max_model_len` only, so that numbers do not depend on the company (DESIGN, law 1) and cached keys stay valid.

Frequencies are computed in float64 and rounded once to float32: within one unit in the last place of
transformers, which computes them in float32 throughout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pace.errors import CheckpointError, UnsupportedModel, show
from pace.log import logger
from pace.models.config import Config
from pace.models.plan import Rope
from pace.models.spec import RopeKind, RopeSpec

F64Array = npt.NDArray[np.float64]

# Keys that each kind reads. One that only another kind reads changes nothing, and transformers ignores it too: a warning.
# One that none reads may be something newer that changes the frequencies: it is refused.
_COMMON: Final = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_KEYS: Final[Mapping[RopeKind, frozenset[str]]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    # transformers 4 accepts original_max_position_embeddings for dynamic and does not use it.
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "original_max_position_embeddings",
            "finetuned",
        }
    ),
    "longrope": frozenset(
        {"factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"}
    ),
    "proportional": frozenset({"factor"}),
}


def reader(**options: Any) -> Callable[[Config, int], tuple[RopeSpec]]:
    """A reader of one embedding for all layers, with the options of `parse`."""
    return lambda config, head_dim: (parse(config, head_dim, **options),)


def parse(
    config: Config,
    head_dim: int,
    *,
    theta: float = 10000.0,
    theta_key: str = "rope_theta",
    layer_type: str | None = None,
    flat: bool = True,
    share: float | None = None,
    interleaved: bool = False,
    synonyms: Mapping[str, RopeKind] | None = None,
    extra: Iterable[str] = (),
    default: Mapping[str, object] | None = None,
) -> RopeSpec:
    """Read one rotary embedding.

    Args:
        config: the top level of `config.json`.
        head_dim: columns of a head.
        theta: base of a config that names none; 10000 is also that of files from before rope_theta existed.
        theta_key: its key at the top level.
        layer_type: which entry of a `rope_parameters` nested by layer type to read; None: it must be flat.
        flat: whether a flat `rope_scaling` is meant for this layer type too.
        share: partial_rotary_factor of a config that names none, where the architecture honours it. None: it does
            not, and refuses values below 1.
        interleaved: whether the architecture rotates neighbouring columns.
        synonyms: rope types that the architecture reads as another.
        extra: parameters that the architecture keeps here and reads itself.
        default: the parameters of a config without any.

    Raises:
        CheckpointError: a parameter is missing, of the wrong type, out of range or contradicted elsewhere.
        UnsupportedModel: an unknown rope type or parameter.
    """
    read = functools.partial(
        _read,
        config,
        head_dim=head_dim,
        theta=(theta, theta_key),
        nested=layer_type is not None,
        share=share,
        interleaved=interleaved,
        synonyms=synonyms or {},
        extra=frozenset(extra),
    )
    specs = [read(table) for table in parameters(config, layer_type, flat, default)]
    if specs[0] != specs[-1]:
        raise CheckpointError(f"{config.where}: rope_parameters and rope_scaling differ; keep one of them")
    return specs[0]


def _read(
    config: Config,
    scaling: Config,
    *,
    head_dim: int,
    theta: tuple[float, str],
    nested: bool,
    share: float | None,
    interleaved: bool,
    synonyms: Mapping[str, RopeKind],
    extra: frozenset[str],
) -> RopeSpec:
    """One rotary embedding from the object that holds its parameters."""
    max_len = config.integer("max_position_embeddings")
    kind = _kind(scaling, synonyms, extra)
    # Phi-3 and its relatives keep the pre-training length at the top level, which then has priority.
    outer = config if config.has("original_max_position_embeddings") else scaling
    turning = _share(config, scaling, share if kind != "proportional" else share or 1.0)
    spec = RopeSpec(
        theta=_theta(config, scaling, *theta, agree=not nested),
        rotary_dim=head_dim if kind == "proportional" else _rotary_dim(scaling, head_dim, turning),
        max_len=max_len,
        original_len=outer.integer("original_max_position_embeddings", default=max_len),
        kind=kind,
        interleaved=interleaved,
        share=turning if kind == "proportional" else 1.0,
    )
    spec = replace(spec, **_scaling(spec, scaling))
    if nested and not spec.truncate:
        # transformers looks for it beside the layer types and would go on truncating.
        raise UnsupportedModel(f"{scaling.where}: truncate is false, which is not read for one layer type")
    return spec


def context_len(spec: RopeSpec) -> int:
    """Tokens that a checkpoint with this embedding supports.

    llama3 and longrope files state the extended length; linear, dynamic and yarn files state the length
    before the extension (the reading that vLLM and llama.cpp share).
    """
    if spec.kind == "yarn":
        return max(spec.max_len, int(spec.original_len * spec.factor))
    if spec.kind in ("linear", "dynamic"):
        return int(spec.max_len * spec.factor)
    return spec.max_len


def length_note(spec: RopeSpec, max_model_len: int) -> str | None:
    """Which sequences get other frequencies than transformers gives them, which chooses by their length; None: none do."""
    if spec.kind == "dynamic" and max_model_len > spec.max_len:
        return (
            f"dynamic RoPE is scaled once, for max_model_len {max_model_len}, where transformers scales with the length of "
            f"the sequence: shorter ones differ from it; with max_model_len {spec.max_len} none does"
        )
    if (
        spec.kind == "longrope"
        and max_model_len > spec.original_len
        and spec.long_factor != spec.short_factor
    ):
        return (
            f"longrope takes its long factors for every sequence, as max_model_len is {max_model_len}, where transformers "
            f"takes the short ones up to {spec.original_len} tokens: such sequences differ from it; with max_model_len "
            f"{spec.original_len} none does"
        )
    return None


def build_all(specs: Iterable[RopeSpec], max_model_len: int) -> tuple[Rope, ...]:
    """`Plan.ropes` of an engine whose sequences have at most `max_model_len` tokens: all of a plan that depends on it."""
    return tuple(build(spec, max_model_len) for spec in specs)


def build(spec: RopeSpec, max_model_len: int) -> Rope:
    """The table of frequencies for an engine whose sequences have at most `max_model_len` tokens."""
    i = np.arange(0, spec.rotary_dim, 2, dtype=np.float64)  # [rotary_dim / 2]
    exponent = i / spec.rotary_dim
    attention_factor = 1.0
    if spec.kind == "dynamic":
        inv_freq = 1.0 / _ntk_theta(spec, max_model_len) ** exponent
    elif spec.kind == "longrope":
        divisors = spec.long_factor if max_model_len > spec.original_len else spec.short_factor
        inv_freq = 1.0 / (np.asarray(divisors) * spec.theta**exponent)
        attention_factor = _longrope_attention_factor(spec)
    else:
        inv_freq = 1.0 / spec.theta**exponent
        if spec.kind == "linear":
            inv_freq = inv_freq / spec.factor
        elif spec.kind == "llama3":
            inv_freq = _llama3(spec, inv_freq)
        elif spec.kind == "yarn":
            inv_freq = _yarn(spec, inv_freq)
            attention_factor = _yarn_attention_factor(spec)
        elif spec.kind == "proportional":
            # Pairs span the whole head, (i, i + d / 2), and the first of them turn.
            turning = np.arange(len(inv_freq)) < int(spec.share * spec.rotary_dim // 2)
            inv_freq = np.where(turning, inv_freq / spec.factor, 0.0)
    return Rope(inv_freq.astype(np.float32), attention_factor, spec.interleaved, spec.rotary_dim)


def _ntk_theta(spec: RopeSpec, max_model_len: int) -> float:
    """Dynamic NTK: a larger base once sequences may exceed the trained length."""
    seq_len = max(max_model_len, spec.max_len)
    stretch = spec.factor * seq_len / spec.max_len - (spec.factor - 1)
    return float(spec.theta * stretch ** (spec.rotary_dim / (spec.rotary_dim - 2)))


def _llama3(spec: RopeSpec, inv_freq: F64Array) -> F64Array:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between."""
    turns = spec.original_len * inv_freq / (2 * math.pi)  # full turns within the original context
    low, high = spec.low_freq_factor, spec.high_freq_factor
    # Llama 4 Scout has both at 1: a switch instead of a blend, where the lower bound itself is divided.
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else (turns > low).astype(float)
    return np.asarray((1 - smooth) * inv_freq / spec.factor + smooth * inv_freq)


def _yarn(spec: RopeSpec, inv_freq: F64Array) -> F64Array:
    """Interpolated below `beta_slow` turns, extrapolated above `beta_fast`, a ramp over columns between."""

    def column(turns: float) -> float:
        """The (fractional) pair of columns that makes `turns` turns within the original context."""
        return (spec.rotary_dim * math.log(spec.original_len / (turns * 2 * math.pi))) / (
            2 * math.log(spec.theta)
        )

    low, high = column(spec.beta_fast), column(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001  # transformers' guard against a division by zero
    ramp = np.clip((np.arange(spec.rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
    return np.asarray(inv_freq / spec.factor * ramp + inv_freq * (1 - ramp))


def _yarn_attention_factor(spec: RopeSpec) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * weight * math.log(spec.factor) + 1.0

    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return mscale(spec.mscale) / mscale(spec.mscale_all_dim)
    return mscale(1.0)


def _longrope_attention_factor(spec: RopeSpec) -> float:
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_len))


def parameters(
    config: Config,
    layer_type: str | None = None,
    flat: bool = True,
    default: Mapping[str, object] | None = None,
) -> list[Config]:
    """The objects that hold the parameters: of rope_parameters and rope_scaling those that say something, else
    `default`. Where both do, they must mean the same: readers disagree on which of them counts. See `parse`.
    """
    stated = [key for key in ("rope_parameters", "rope_scaling") if config.values.get(key)]
    tables = [_of_layer(config.table(key), key, layer_type, flat, default) for key in stated]
    return tables or [Config(default or {}, f"{config.where}: rope_scaling")]


def _of_layer(
    table: Config, key: str, layer_type: str | None, flat: bool, default: Mapping[str, object] | None
) -> Config:
    """The parameters of one type of layers, where there is a set for each."""
    nested = sorted(k for k, v in table.values.items() if isinstance(v, Mapping))
    if layer_type is None and nested:
        raise UnsupportedModel(
            f"{table.where} has one set per layer type ({', '.join(nested)}); "
            "this architecture has one for all layers"
        )
    if layer_type is None:
        return table
    if not nested and key == "rope_parameters":
        raise UnsupportedModel(f"{table.where} must have one set per layer type, such as {layer_type!r}")
    if not nested and flat:
        return table
    if layer_type in nested:
        return table.table(layer_type)
    if nested and layer_type not in table.values:
        raise CheckpointError(f"{table.where} has no {layer_type!r}, only {', '.join(nested)}; add it")
    return Config(default or {}, f"{table.where}: {layer_type}")  # null, or a flat set for other layers


def _kind(scaling: Config, synonyms: Mapping[str, RopeKind], extra: frozenset[str]) -> RopeKind:
    kind = scaling.text("rope_type", default=scaling.text("type", default="default"))
    old = scaling.text("type", default=kind)
    if synonyms.get(old, old) != synonyms.get(kind, kind):
        raise UnsupportedModel(
            f"{scaling.where}: rope_type is {show(kind)} but type is {show(old)}; they must agree"
        )
    kind = synonyms.get(kind, kind)
    for known in _KEYS:
        if kind == known:
            unread = sorted(k for k in set(scaling.values) - _COMMON - _KEYS[known] - extra if scaling.has(k))
            for key in unread:
                if not any(key in keys for keys in _KEYS.values()):
                    raise UnsupportedModel(
                        f"{scaling.where}: {show(key)} is not a parameter of rope type {known!r}; "
                        f"known are {', '.join(sorted(_COMMON | _KEYS[known]))}"
                    )
            if unread:
                logger.warning("%s: rope type %r does not use %s", scaling.where, known, ", ".join(unread))
            return known
    raise UnsupportedModel(
        f"{scaling.where}: rope type is {show(kind)}; supported are {', '.join(sorted(_KEYS))}"
    )


def _theta(config: Config, scaling: Config, default: float, key: str, agree: bool) -> float:
    """The base: the parameters' own, else the top level's; where one set serves all layers the two must agree."""
    outer = config.number(key, default=default, low=1.0)
    theta = scaling.number("rope_theta", default=outer, low=1.0)
    if agree and config.has(key) and theta != outer:
        raise CheckpointError(
            f"{config.where}: rope_theta is {outer:g} at the top level and {theta:g} in the rope parameters; "
            "they must agree"
        )
    return theta


def _share(config: Config, scaling: Config, default: float | None) -> float:
    """partial_rotary_factor, of which the rope parameters' own counts first."""
    outer = config.number("partial_rotary_factor", default=default or 1.0, high=1.0)
    share = scaling.number("partial_rotary_factor", default=outer, high=1.0)
    if share != 1.0 and default is None:
        raise UnsupportedModel(
            f"{config.where}: partial_rotary_factor is {share:g}; this architecture rotates whole heads (1.0)"
        )
    return share


def _rotary_dim(scaling: Config, head_dim: int, share: float) -> int:
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise scaling.error(
            "partial_rotary_factor", share, f"an even number of columns of head_dim ({head_dim})"
        )
    return rotary_dim


def _scaling(spec: RopeSpec, scaling: Config) -> dict[str, Any]:
    """The fields of a RopeSpec that belong to its kind."""
    kind, original = spec.kind, spec.original_len
    if kind == "default":
        return {}
    if kind == "proportional":
        return {"factor": _factor(scaling) if scaling.has("factor") else 1.0}
    if kind in ("linear", "dynamic", "llama3"):
        fields: dict[str, Any] = {"factor": _factor(scaling)}
    else:
        implied = spec.max_len / original
        fields = {"factor": _factor(scaling) if scaling.has("factor") else implied}
        if scaling.has("attention_factor"):
            fields["attention_factor"] = scaling.number("attention_factor", high=1e3)
    if kind == "dynamic" and spec.rotary_dim < 4:
        raise CheckpointError(
            f"{scaling.where}: dynamic scaling needs at least 4 rotary columns, got {spec.rotary_dim}"
        )
    if kind == "llama3":
        fields["low_freq_factor"] = low = scaling.number("low_freq_factor")
        fields["high_freq_factor"] = high = scaling.number("high_freq_factor")
        if high < low:
            raise scaling.error("high_freq_factor", high, f"at least low_freq_factor ({low:g})")
    if kind == "yarn":
        # -1e-9: zero is allowed and means "not given", as in transformers.
        fields["beta_fast"] = fast = scaling.number("beta_fast", default=0.0, low=-1e-9) or 32.0
        fields["beta_slow"] = slow = scaling.number("beta_slow", default=0.0, low=-1e-9) or 1.0
        if fast < slow:
            raise scaling.error("beta_fast", fast, f"at least beta_slow ({slow:g})")
        for key in ("mscale", "mscale_all_dim"):
            fields[key] = scaling.number(key, default=0.0, low=-1e-9)
        fields["truncate"] = scaling.flag("truncate", default=True)
    if kind == "longrope":
        if original < 2:
            raise scaling.error("original_max_position_embeddings", original, "at least 2 for longrope")
        for key in ("short_factor", "long_factor"):
            fields[key] = scaling.numbers(key, spec.rotary_dim // 2)
    return fields


def _factor(scaling: Config) -> float:
    factor = scaling.number("factor", high=1e6)
    if factor < 1.0:
        raise scaling.error("factor", factor, "a number of at least 1")
    return factor
