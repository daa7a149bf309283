"""`Recipe`: everything that a training run depends on, read strictly from a TOML file."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pace.errors import ConfigError, show

__all__ = ["PRESETS", "Cod", "Data", "Loss", "Models", "Recipe", "Training", "read_recipe"]

_FOLDER = Path(__file__).parent / "recipes"
PRESETS = tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


@dataclass(frozen=True, kw_only=True)
class Models:
    """Who learns from whom.

    Attributes:
        target: the model that will verify: a folder, a hub id, or "demo". It answers prompts and is the teacher of `kl`.
        draft: the model to adapt, of the same tokenizer; the same kinds of name.
        layers: take these layers of the draft, in this order, instead of all; a layer may come twice.
        intermediate_size: keep so many channels of each MLP, those of the greatest weights; None: all.
        vocab_size: learn to guess only so many tokens, those of answers first, the most frequent ones; None: all.
        mask_token_id: what asks for a further token; one id that no text contains. None: the draft's `pard_token`.
    """

    target: str
    draft: str
    layers: list[int] | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    mask_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.vocab_size is not None:
            _in("models.vocab_size", self.vocab_size, 1, 1 << 24)


@dataclass(frozen=True, kw_only=True)
class Data:
    """One source of documents.

    Attributes:
        file: JSON lines, each {"messages": [...]}, PARD's {"conversation": [{"human": ..., "assistant": ...}]},
            {"prompt": TEXT}, with "completion" where the file has the answers, or {"text": TEXT}.
        answers: "target": the target answers anew, whatever the file says; "file": as they stand.
        max_tokens: of an answer of the target.
        sampling: how the target answers, as in `SamplingParams`; greedy unless it says otherwise. What it leaves out are
            the checkpoint's defaults.
        limit: lines to read; None: all.
    """

    file: str
    answers: str = "target"
    max_tokens: int = 512
    sampling: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None

    def __post_init__(self) -> None:
        _one_of("data.answers", self.answers, "target", "file")
        _in("data.max_tokens", self.max_tokens, 1, 1 << 20)
        if self.limit is not None:
            _in("data.limit", self.limit, 1, 1 << 40)


@dataclass(frozen=True, kw_only=True)
class Cod:
    """Conditional drop-token: which anchors learn how deep.

    Attributes:
        k: tokens that the draft learns to guess at once, the next one included; K_train of the paper.
        retention: depth d (0: the next token) keeps the share max(retention ** d, min_retention) of the anchors.
        min_retention: see there. 1.0 keeps everything.
    """

    k: int = 8
    retention: float = 0.7
    min_retention: float = 0.2

    def __post_init__(self) -> None:
        _in("cod.k", self.k, 1, 33)
        _in("cod.retention", self.retention, 0.0, 1.0)
        _in("cod.min_retention", self.min_retention, 0.0, 1.0)

    def kept(self, depth: int) -> float:
        """Share of the anchors that learn to guess at `depth`."""
        return max(self.retention**depth, self.min_retention)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What is minimised: ce x cross-entropy + kl x KL(target || draft).

    Attributes:
        ce, kl: the weights; with kl the target runs beside the draft.
        normalization: "subtask": the mean over depths of each depth's mean (the paper); "pooled": the mean over all
            guesses, so that a depth weighs what COD keeps of it (PARD's code).
        cat: weigh each guess by the probability that the target gives to the tokens between its anchor and it (PARD-2).
    """

    ce: float = 1.0
    kl: float = 0.0
    normalization: str = "subtask"
    cat: bool = False

    def __post_init__(self) -> None:
        _in("loss.ce", self.ce, 0.0, 1e6)
        _in("loss.kl", self.kl, 0.0, 1e6)
        _one_of("loss.normalization", self.normalization, "subtask", "pooled")
        if self.ce == self.kl == 0.0:
            raise ConfigError("loss.ce and loss.kl are both 0, expected one above 0")

    @property
    def needs_teacher(self) -> bool:
        """Whether the target's predictions are part of it."""
        return self.kl > 0 or self.cat


@dataclass(frozen=True, kw_only=True)
class Training:
    """How it is minimised: AdamW over f32 weights.

    Attributes:
        epochs, steps: how long; steps, where given, decide.
        context_len: tokens of a sequence; longer documents are cut, shorter ones packed together.
        batch_size: sequences of one step. micro_batch_size: of them at once in memory; None: all on a GPU, one on a CPU,
            which padding costs more than small products do.
        lr, schedule, warmup_share, final_lr_share: linear warm-up, then "constant", or "cosine" down to a share of lr.
        betas, weight_decay (on matrices), clip_norm: AdamW's.
        dtype: of the arithmetic, "bf16", "f32", or "auto": bf16 where the device has instructions for it; the weights stay
            f32 until they are saved.
        device: "auto" (a GPU where torch has one), "cpu" or "cuda".
        freeze_embedding: leave the embedding as it is, and with it a head that is tied to it.
        threads: of torch and of the target's engine; None: the machine's.
        checkpointing: compute each layer twice to hold fewer activations.
        seed: of everything random.
        save_every, eval_every: steps between saved states, and between looks at the held-out documents.
    """

    epochs: float = 1.0
    steps: int | None = None
    context_len: int = 512
    batch_size: int = 64
    micro_batch_size: int | None = None
    lr: float = 3e-5
    schedule: str = "constant"
    warmup_share: float = 0.0
    final_lr_share: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    dtype: str = "auto"
    device: str = "auto"
    freeze_embedding: bool = False
    threads: int | None = None
    checkpointing: bool = False
    seed: int = 0
    save_every: int = 200
    eval_every: int = 200

    def __post_init__(self) -> None:
        for name in ("context_len", "batch_size", "save_every", "eval_every"):
            _in(f"training.{name}", getattr(self, name), 1, 1 << 24)
        for name in ("steps", "micro_batch_size", "threads"):
            if getattr(self, name) is not None:
                _in(f"training.{name}", getattr(self, name), 1, 1 << 24)
        _in("training.epochs", self.epochs, 1e-6, 1e6)
        _in("training.lr", self.lr, 0.0, 10.0)
        _in("training.warmup_share", self.warmup_share, 0.0, 1.0)
        _in("training.final_lr_share", self.final_lr_share, 0.0, 1.0)
        _in("training.weight_decay", self.weight_decay, 0.0, 10.0)
        _in("training.clip_norm", self.clip_norm, 1e-6, 1e6)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"training.betas is {show(self.betas)}, expected two numbers in [0, 1)")
        _in("training.seed", self.seed, 0, (1 << 31) - 1)
        _one_of("training.schedule", self.schedule, "constant", "cosine")
        _one_of("training.dtype", self.dtype, "auto", "bf16", "f32")
        _one_of("training.device", self.device, "auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run.

    Attributes:
        data, held_out: where documents come from; the held-out ones are only looked at.
    """

    models: Models
    data: list[Data]
    held_out: list[Data] = field(default_factory=list)
    cod: Cod = field(default_factory=Cod)
    loss: Loss = field(default_factory=Loss)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("the recipe has no [[data]], expected at least one")
        if self.training.context_len <= self.cod.k:
            raise ConfigError(
                f"training.context_len is {self.training.context_len}, expected more than cod.k, {self.cod.k}"
            )

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; what a resumed run is compared with."""
        return dataclasses.asdict(self)


def read_recipe(path: str | Path) -> Recipe:
    """Read a TOML file. `preset = "NAME"` starts from a published recipe, whose values the file's own replace.

    Raises:
        ConfigError: it can't be read, or a value has the wrong name, type or range; the message names it.
    """
    values = _read_toml(Path(path))
    preset = values.pop("preset", None)
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"{path}: preset is {show(preset)}, expected one of {', '.join(PRESETS)}")
        values = _over(_read_toml(_FOLDER / f"{preset}.toml"), values)
    try:
        recipe: Recipe = _build(Recipe, values, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return recipe


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above` in place of its own, table by table."""
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            value = _over(below[name], value)
        below[name] = value
    return below


def _build(kind: Any, values: object, where: str) -> Any:
    """A dataclass of this module out of a TOML table."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {show(values)}, expected a table")
    prefix = f"{where}." if where else ""
    hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{prefix}{name} is unknown, expected some of {', '.join(fields)}")
    for name, f in fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name} is missing")
    return kind(**{name: _read(hints[name], value, prefix + name) for name, value in values.items()})


def _read(hint: Any, value: object, where: str) -> Any:
    """A TOML value as a field of type `hint` takes it."""
    if isinstance(hint, UnionType):  # X | None; TOML has no null, a field is left out instead
        hint = next(part for part in get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is {show(value)}, expected a list")
        return [_read(get_args(hint)[0], part, where) for part in value]
    kind = get_origin(hint) or hint
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} is {show(value)}, expected {kind.__name__}")
    return value


def _one_of(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {show(value)}, expected one of {', '.join(allowed)}")


def _in(name: str, value: float, low: float, high: float) -> None:
    if math.isnan(value) or not low <= value <= high:
        raise ConfigError(f"{name} is {show(value)}, expected a number from {low:g} to {high:g}")
