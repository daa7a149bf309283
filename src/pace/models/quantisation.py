"""A checkpoint's `quantization_config`, whatever tool wrote it: what it says of each module, for the readers."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pace.checkpoint.files import ModelFiles, TensorFiles
from pace.errors import CheckpointError, UnsupportedModel, WeightsError, show
from pace.models.config import Config
from pace.models.tensors import Checkpoint, Found, Quantised
from pace.quant.matrices import Matrix
from pace.quant.modules import Module, modules
from pace.quant.nvfp4 import ENDS
from pace.quant.readers import READERS
from pace.quant.scheme import Layout, Scheme

__all__ = ["CONFIG_KEYS", "Quantisation", "quantisation", "quantised_in", "with_own_file"]

Fits = Callable[[str], bool]
"""Whether a module's name is meant."""

CONFIG_KEYS: Final = ("quantization_config", "compression_config")
"""Of `config.json`; the second is an old name."""
_MAX_PATTERN: Final = 256


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the modules of a checkpoint are quantised.

    Args:
        method: the tool's name for it.
        rules: the first that fits a module counts; None: it is not quantised.
        whole: every linear layer that no rule leaves out is quantised, so that a plain one contradicts the config.
    """

    method: str
    rules: tuple[tuple[Fits, Scheme | None], ...]
    whole: bool = False

    def find(self, checkpoint: Checkpoint) -> Iterator[Found]:
        """The quantised matrices of a checkpoint, by its tensors' names and dtypes."""
        for module in modules(checkpoint.names(), checkpoint):
            members = tuple(tensor.name for tensor in module.members.values())
            yield Found(f"{module.name}.weight", members, functools.partial(self._open, module))

    def names(self, modules: Iterable[str]) -> bool:
        """Whether a module, by any of its names, has to be quantised."""
        return self.whole and self._scheme(modules) is not None

    def _scheme(self, names: Iterable[str]) -> Scheme | None:
        names = tuple(names)
        return next((scheme for fits, scheme in self.rules if any(map(fits, names))), None)

    def _open(self, module: Module, names: tuple[str, ...]) -> Matrix:
        scheme = self._scheme(names)
        if scheme is None:
            raise WeightsError(
                f"{module.name} is quantised ({', '.join(sorted(module.members))}), but quantization_config leaves it out; "
                "correct the list that names it, or take the original config"
            )
        foreign = sorted(set(ENDS) & set(module.members)) if scheme.layout != "nvfp4" else []
        if foreign:
            raise WeightsError(
                f"the tensor {module.name}.{foreign[0]} is unexpected: quantization_config names no NVFP4"
            )
        return READERS[scheme.layout](module.name, module.members, scheme)


def quantisation(values: Mapping[str, Any], where: str = "config.json") -> Quantisation | None:
    """What a `config.json` says of quantised weights; None: nothing, or MXFP4, which the families with experts read.

    Raises:
        CheckpointError: a value is malformed.
        UnsupportedModel: nothing that pace reads.
    """
    config = Config(values, where)
    key = next((key for key in CONFIG_KEYS if values.get(key)), None)
    if key is None and isinstance(values.get("text_config"), Mapping):
        config = config.table("text_config")
        key = next((key for key in CONFIG_KEYS if config.values.get(key)), None)
    if key is None:
        return None
    settings = config.table(key)
    method = settings.text("quant_method")
    if method == "mxfp4":
        return None
    if method in _CONVERT:
        raise UnsupportedModel(f"{settings.where}: quant_method {method!r} is not read; {_CONVERT[method]}")
    read = _METHODS.get(method)
    if read is None:
        known = ", ".join([*_METHODS, "mxfp4"])
        raise UnsupportedModel(
            f"{settings.where}: quant_method is {show(method)}; supported are {known}, or take the original checkpoint"
        )
    return read(settings, method)


@dataclass(frozen=True, slots=True)
class FileTypes:
    """Quantised matrices of a file that says of each tensor how it is stored (GGUF)."""

    matrices: Mapping[str, Matrix]

    def find(self, checkpoint: Checkpoint) -> Iterator[Found]:
        """The matrices."""
        for name, matrix in self.matrices.items():
            yield Found(name, (name,), functools.partial(self._open, matrix))

    def names(self, modules: Iterable[str]) -> bool:
        """Whether a module has to be quantised: the file may store any tensor as it likes."""
        return False

    @staticmethod
    def _open(matrix: Matrix, names: tuple[str, ...]) -> Matrix:
        return matrix


def quantised_in(checkpoint: TensorFiles, values: Mapping[str, Any]) -> Quantised | None:
    """What is known of a checkpoint's quantised weights: of its file, else of its config.json; errors as `quantisation`."""
    return FileTypes(checkpoint.matrices) if checkpoint.matrices else quantisation(values)


def with_own_file(values: dict[str, Any], files: ModelFiles) -> dict[str, Any]:
    """A `config.json` with the quantization_config of the file beside it, where it has none of its own.

    AutoGPTQ, AutoAWQ and modelopt wrote such files. AutoAWQ's has other names of the same keys.
    """
    if any(values.get(key) is not None for key in CONFIG_KEYS):
        return values
    for name, method in _OWN_FILES.items():
        own = files.json(name)
        if own is None:
            continue
        found = {_AUTO_AWQ.get(key, key): value for key, value in own.items()}
        return {**values, "quantization_config": {"quant_method": method, **found}}
    return values


_OWN_FILES: Final = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_AUTO_AWQ: Final = {"w_bit": "bits", "q_group_size": "group_size"}


def _compressed_tensors(config: Config, method: str) -> Quantisation:
    """llm-compressor: `config_groups` of targets, but for `ignore`."""
    everywhere = config.text("format", default="")
    groups = config.table("config_groups")
    exact: list[tuple[Fits, Scheme | None]] = []
    patterns: list[tuple[Fits, Scheme | None]] = []
    linear: list[tuple[Fits, Scheme | None]] = []
    for name in groups.values:
        group = groups.table(name)
        scheme = _compressed_scheme(group, everywhere)
        for target in _names(group, "targets"):
            into = linear if target == "Linear" else patterns if target.startswith("re:") else exact
            into.append((_CLASSES.get(target) or _named(target), scheme))
    ignored = [(_named(name), None) for name in _names(config, "ignore")]
    return Quantisation(method, (*ignored, *exact, *patterns, *linear[:1]), whole=bool(linear))


_NVFP4: Final = Scheme("nvfp4", 4, "float", True, (1, 16))
_FORMATS: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def _compressed_scheme(group: Config, everywhere: str) -> Scheme:
    weights = group.table("weights")
    kind, bits = weights.text("type", default="int"), weights.integer("num_bits", default=8, high=16)
    form = group.text("format", default=everywhere)
    if group.has("output_activations"):
        raise UnsupportedModel(
            f"{group.where}: output_activations are not read; pace rounds inputs of layers alone"
        )
    if form == "nvfp4-pack-quantized" and (kind, bits, weights.integer("group_size", default=16)) == (
        "float",
        4,
        16,
    ):
        return _NVFP4
    if (
        form not in _FORMATS
        or kind not in ("int", "float")
        or not (bits == 8 or (kind == "int" and 2 <= bits < 8))
    ):
        raise UnsupportedModel(
            f"{group.where}: format {show(form)} with weights of {bits} bits of type {show(kind)} is not read; supported "
            f"are {', '.join(_FORMATS)} with integers of 2 to 8 bits or FP8, and NVFP4"
        )
    size = weights.integer("group_size", default=-1, low=-1)
    inferred = "group" if size > 0 else "channel" if weights.has("group_size") else "tensor"
    strategy = weights.text("strategy", default=inferred)
    if strategy == "block":
        rows, columns = _block(weights, "block_structure")
        block: tuple[int | None, int | None] = (rows, columns)
    elif strategy == "group" and size > 0:
        block = (1, size)
    elif strategy in ("tensor", "channel"):
        block = (None if strategy == "tensor" else 1, None)
    else:
        raise UnsupportedModel(
            f"{weights.where}: strategy {show(strategy)} is not read; supported are tensor, channel, group and block"
        )
    symmetric = kind == "float" or weights.flag("symmetric", default=True)
    layout: Layout = "packed" if form == "pack-quantized" else "plain"
    return Scheme(layout, bits, "float" if kind == "float" else "int", symmetric, block)


def _gptq(config: Config, method: str) -> Quantisation:
    """AutoGPTQ and GPTQModel; `dynamic` has exceptions by pattern."""
    zero_at = 0 if config.text("checkpoint_format", default="gptq") == "gptq_v2" else 1
    rules: list[tuple[Fits, Scheme | None]] = []
    if config.has("dynamic"):
        exceptions = config.table("dynamic")
        for pattern in exceptions.values:
            fits = _named("re:" + pattern.removeprefix("-:").removeprefix("+:"), exceptions.where)
            own = None if pattern.startswith("-:") else exceptions.table(pattern)
            rules.append((fits, None if own is None else _integers("gptq", config, own, zero_at)))
    rules += [(_part_of(name), None) for name in _names(config, "modules_to_not_convert")]
    return Quantisation(method, (*rules, (_anything, _integers("gptq", config, config, zero_at))))


def _awq(config: Config, method: str) -> Quantisation:
    """AutoAWQ."""
    version = config.text("version", default="gemm").lower()
    if version != "gemm":
        raise UnsupportedModel(
            f"{config.where}: AWQ of version {show(version)} is not read; supported is 'gemm', quantise again with it"
        )
    if config.integer("bits", default=4) != 4:
        raise config.error("bits", config.values["bits"], "4, as AWQ has no other")
    left = [(_part_of(name), None) for name in _names(config, "modules_to_not_convert")]
    return Quantisation(method, (*left, (_anything, _integers("awq", config, config, 0))))


def _auto_round(config: Config, method: str) -> Quantisation:
    """AutoRound, in the layout of GPTQ or AWQ; `extra_config` has exceptions by name."""
    packing = config.text("packing_format", default="auto_round:auto_gptq")
    layout = {"awq": "awq", "gptq": "gptq"}.get(next((x for x in ("awq", "gptq") if x in packing), ""), "")
    if not layout and packing not in ("auto_round", "auto_round:exllamav2", "auto_round:tritonv2"):
        raise UnsupportedModel(
            f"{config.where}: packing_format {show(packing)} is not read; export it with --format auto_gptq or auto_awq"
        )
    _integers_only(config)
    # Without "gptq" in the name, zero points are stored as they are.
    zero_at, used = int(layout == "gptq"), "awq" if layout == "awq" else "gptq"
    rules: list[tuple[Fits, Scheme | None]] = []
    if config.has("extra_config"):
        extra = config.table("extra_config")
        for name in extra.values:
            own = extra.table(name)
            _integers_only(own)
            bits = own.integer("bits", default=config.integer("bits", default=4), high=32)
            scheme = None if bits >= 16 else _integers(used, config, own, zero_at)
            rules.append((_either_named(name, extra.where), scheme))
    return Quantisation(method, (*rules, (_anything, _integers(used, config, config, zero_at))))


def _integers_only(config: Config) -> None:
    kind = config.text("data_type", default="int")
    if kind != "int":
        raise UnsupportedModel(f"{config.where}: data_type {show(kind)} is not read; supported is 'int'")


def _integers(layout: str, config: Config, own: Config, zero_at: int) -> Scheme:
    """Of GPTQ or AWQ; keys that a module does not have are everybody's."""
    first = own if own.has("bits") else config
    bits = first.integer("bits", default=4, low=2, high=8)
    if bits not in (2, 3, 4, 8):
        raise first.error("bits", bits, "2, 3, 4 or 8")
    sized = own if own.has("group_size") else config
    size = sized.integer("group_size", default=128, low=-1)
    if size == 0:
        raise sized.error("group_size", size, "-1, or columns that share a scale")
    symmetric = (own if own.has("sym") else config).flag("sym", default=layout == "gptq")
    return Scheme(
        "awq" if layout == "awq" else "gptq",
        bits,
        "int",
        symmetric,
        (1, None if size == -1 else size),
        zero_at,
    )


def _fp8(config: Config, method: str) -> Quantisation:
    """FP8 in blocks, as DeepSeek and Qwen publish it, or with a scale a tensor or a row."""
    for key in ("fmt", "scale_fmt"):
        known = {"fmt": ("e4m3", "float8_e4m3fn"), "scale_fmt": ("ue8m0", "float")}[key]
        if config.has(key) and config.text(key) not in known:
            raise UnsupportedModel(
                f"{config.where}: {key} is {show(config.text(key))}; supported is {known[0]!r}"
            )
    block = _block(config, "weight_block_size") if config.has("weight_block_size") else None
    left = [
        (_part_of(name), None)
        for key in ("modules_to_not_convert", "ignored_layers")
        for name in _names(config, key)
    ]
    return Quantisation(method, (*left, (_anything, Scheme("plain", 8, "float", True, block))))


def _modelopt(config: Config, method: str) -> Quantisation:
    """NVIDIA's: FP8 and NVFP4."""
    inner = config.table("quantization") if config.has("quantization") else config
    algorithm = inner.text("quant_algo", default="")
    scheme = _ALGORITHMS.get(algorithm.upper())
    if scheme is None:
        raise UnsupportedModel(
            f"{inner.where}: quant_algo is {show(algorithm)}; supported are 'FP8' and 'NVFP4'; take the original checkpoint"
        )
    left = [(_glob(n), None) for key in ("exclude_modules", "ignore") for n in _names(inner, key)]
    return Quantisation(method, (*left, (_anything, scheme)))


_ALGORITHMS: Final = {
    "FP8": Scheme("plain", 8, "float"),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("plain", 8, "float"),
    "NVFP4": _NVFP4,
}
_QUARK: Final = {"fp8_e4m3": "float", "int8": "int"}


def _quark(config: Config, method: str) -> Quantisation:
    """AMD's, where it is FP8 or int8 a tensor or a row."""
    rules: list[tuple[Fits, Scheme | None]] = [(_glob(name), None) for name in _names(config, "exclude")]
    if config.has("layer_quant_config"):
        layers = config.table("layer_quant_config")
        rules += [(_glob(name), _quark_scheme(layers.table(name))) for name in layers.values]
    everywhere = config.table("global_quant_config")
    return Quantisation(method, (*rules, (_anything, _quark_scheme(everywhere))))


def _quark_scheme(config: Config) -> Scheme | None:
    if not config.has("weight"):
        return None
    weight = config.table("weight") if isinstance(config.values["weight"], Mapping) else None
    dtype = None if weight is None else weight.text("dtype", default="")
    scheme = None if weight is None else weight.text("qscheme", default="")
    if weight is None or dtype not in _QUARK or scheme not in ("per_tensor", "per_channel"):
        raise UnsupportedModel(
            f"{config.where}: weight is {show(config.values['weight'])}; supported are fp8_e4m3 and int8, per_tensor or "
            "per_channel"
        )
    symmetric = _QUARK[dtype] == "float" or weight.flag("symmetric", default=True)
    return Scheme("plain", 8, "float" if dtype == "fp8_e4m3" else "int", symmetric)


_METHODS: Final[Mapping[str, Callable[[Config, str], Quantisation]]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "quark": _quark,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
}

_AGAIN: Final = (
    "take the original checkpoint, which pace quantises while it loads it (--quantization int8 or int4)"
)
_CONVERT: Final = {
    "bitsandbytes": f"dequantise it with transformers (model.dequantize()), or {_AGAIN}",
    "hqq": _AGAIN,
    "torchao": _AGAIN,
    "quanto": _AGAIN,
    "aqlm": _AGAIN,
    "vptq": _AGAIN,
    "higgs": _AGAIN,
    "spqr": _AGAIN,
    "eetq": _AGAIN,
    "fbgemm_fp8": _AGAIN,
    "bitnet": _AGAIN,
}


def _names(config: Config, key: str) -> tuple[str, ...]:
    """A list of strings, or none."""
    return config.texts(key) if config.has(key) else ()


def _block(config: Config, key: str) -> tuple[int, int]:
    """Rows and columns that share a scale; old files have "128x128"."""
    value = config.values.get(key)
    if isinstance(value, str):
        value = [int(part) if part.isdecimal() else part for part in value.split("x")]
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(v) is int and 0 < v < 1 << 31 for v in value)
    ):
        raise config.error(key, value, "[rows, columns] that share a scale")
    return value[0], value[1]


def _anything(name: str) -> bool:
    return True


def _named(target: str, where: str = "quantization_config") -> Fits:
    """A module by its whole name, or by a pattern behind "re:" that fits from the start."""
    if not target.startswith("re:"):
        return target.__eq__
    try:
        # A quantified group is what makes a pattern take for ever on a name it does not fit.
        if len(target) > _MAX_PATTERN or re.search(r"\)[*+{]", target):
            raise ValueError("it is long, or repeats a group")
        pattern = re.compile(target[3:])
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: the pattern {show(target)} cannot be used: {error}") from None
    return lambda name: pattern.match(name) is not None


def _either_named(name: str, where: str) -> Fits:
    """AutoRound's names, which are patterns where they have what patterns have."""
    return _named(name if re.fullmatch(r"[\w.-]+", name) else f"re:{name}", where)


_CLASSES: Final[Mapping[str, Fits]] = {
    "Linear": _anything,
    "Embedding": lambda name: name.rpartition(".")[2].startswith("embed"),
}
"""Targets that are classes of modules."""


def _part_of(part: str) -> Fits:
    """Modules with that in their name."""
    return lambda name: part in name


def _glob(pattern: str) -> Fits:
    """Modules by a shell's pattern; NVIDIA's end where a module's submodules begin."""
    return lambda name: fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
