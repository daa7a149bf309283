"""What a decoder is, as enums and numbers.

`DecoderSpec` is what `decoder.py` lowers; architectures (`llama.py`, ...) are functions from a `config.json` to
it. What never varies between layers stands in `DecoderSpec`; what may, in the `LayerSpec` of each: how a layer
mixes tokens and what it does to each by itself. Equal layers share one object. A field exists when an architecture
needs it; another kind of mixer or feed-forward is another class beside `AttentionSpec` or `DenseSpec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, Flag, auto
from typing import Any, Literal

from pace.models.plan import Activation, NormKind, NormScope, RouterOrder, WeightFormat

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]


class Placement(Enum):
    """Where the norms of a layer stand; f is attention, then the feed-forward."""

    PRE = "x += f(norm(x))"
    POST = "x += norm(f(x))"
    SANDWICH = "x += norm(f(norm(x)))"
    STREAM = "x = norm(x + f(x))"
    PARALLEL = "h = norm(x); x += attention(h) + mlp(h)"


class Bias(Flag):
    """Which projections carry a bias."""

    NONE = 0
    QKV = auto()
    OUT = auto()
    MLP = auto()
    HEAD = auto()


@dataclass(frozen=True, slots=True)
class NormSpec:
    """The norms over the residual stream.

    Args:
        kind: "rms", "rms1" (RMS whose factor is 1 + weight) or "layer" (LayerNorm).
        eps: added to the mean square or variance.
        weight, bias: whether the norms have them.
    """

    kind: NormKind
    eps: float
    weight: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Normalisation of queries and keys, with the epsilon of the other norms.

    Args:
        kind: as of `NormSpec`; never with a bias.
        scope: "head": each head by itself, one weight for all; "head_own": each with its own weight; "full": one
            norm over all heads of q, and one over those of k.
        after_rope: the rotation comes first.
        weight: whether it has weights.
    """

    kind: NormKind = "rms"
    scope: NormScope = "head"
    after_rope: bool = False
    weight: bool = True


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One rotary embedding as the config describes it; `rope.build` turns it into a table of frequencies.

    Args:
        theta: base period.
        rotary_dim: columns of a head that rotate (even, <= head_dim).
        max_len: the config's max_position_embeddings (tokens).
        original_len: context length before the extension (tokens); max_len when the config has none.
        factor: context extension factor; 1.0 for the default kind.
        share: of the pairs, those that turn (proportional); the others keep angle 0.
        attention_factor: multiplier of cos and sin; None where the kind derives it.
        long_factor, short_factor: longrope's divisors, [rotary_dim / 2] each.
    """

    theta: float
    rotary_dim: int
    max_len: int
    original_len: int
    kind: RopeKind = "default"
    interleaved: bool = False
    factor: float = 1.0
    share: float = 1.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """A layer that mixes tokens by attention.

    Args:
        n_heads, n_kv_heads: query and key/value heads; n_heads is a multiple of n_kv_heads.
        head_dim: columns of a head, 2 to 512.
        window: tokens that a query sees, its own included; None: all.
        chunk: of all positions; a query sees what lies in its own. None: all.
        rope: index into `DecoderSpec.ropes`, or None for no rotation.
        norm: of queries and keys, or None.
        v_norm: weightless RMS norm of each value head.
        k_is_v: there is no v projection; v is k before its norm and rotation.
        kv_from: the layer whose keys and values this one reads instead of its own; None: it has its own.
        temperature: (scale, floor, offset): queries times 1 + scale * log(1 + floor((position + offset) / floor)).
        sinks: a logit per head joins the softmax, and nothing is read for it.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int | None = None
    chunk: int | None = None
    rope: int | None = 0
    norm: HeadNorm | None = None
    v_norm: bool = False
    k_is_v: bool = False
    kv_from: int | None = None
    temperature: tuple[float, float, float] | None = None
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """An MLP: down(act(gate(x)) * up(x)) when gated, down(act(up(x))) otherwise.

    Args:
        width: columns between its two halves.
    """

    width: int
    activation: Activation
    gated: bool = True


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How a row chooses experts, and what each of them weighs. l are its logits.

    softmax: p = softmax(l), the best of p.
    chosen: the best of l, and the softmax of those.
    sigmoid: s = sigmoid(l), the best of s + choice; s weighs.

    Args:
        bias: of the logits.
        choice: a bias of the scores, for the choice alone.
        n_groups, top_groups: experts stand in groups of equal size, and only those count that have the best sums of their
            two best scores.
        renormalise: weights are divided by their sum.
        scale: of the weights, after that.
        own_norm: the router reads scale * weightless RMS norm of the stream * dim^-0.5, and each expert has a number that
            its weight is multiplied by.
    """

    order: RouterOrder = "softmax"
    bias: bool = False
    choice: bool = False
    n_groups: int = 1
    top_groups: int = 1
    renormalise: bool = False
    scale: float = 1.0
    own_norm: bool = False


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A mixture of gated MLPs, of which each row takes some.

    Args:
        n_experts, top_k: how many there are, and how many a row takes.
        width: columns between the halves of an expert.
        clamp: (alpha, limit): (up + 1) * gate * sigmoid(alpha * gate) in place of the activation, gate at most limit and up
            within it; None: act(gate) * up.
        on_input: a weight multiplies its expert's input; otherwise the result.
        bias: of the experts' projections.
        shared: an MLP that every row takes, or None.
        shared_gate: its result is multiplied by sigmoid(W h).
        dense: an MLP beside all that, whose result and the experts' each pass a norm of their own before they are added;
            the experts then have a norm of the stream of their own. None: there is none.
        format: of the experts' matrices.
    """

    n_experts: int
    top_k: int
    width: int
    activation: Activation
    router: RouterSpec
    clamp: tuple[float, float] | None = None
    on_input: bool = False
    bias: bool = False
    shared: DenseSpec | None = None
    shared_gate: bool = False
    dense: DenseSpec | None = None
    format: WeightFormat = "bf16"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer.

    Args:
        scalar: the layer's result is multiplied by a stored number.
    """

    mixer: AttentionSpec
    ffn: DenseSpec | MoESpec
    scalar: bool = False


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """A table of positions added to the embedding.

    Args:
        n: rows, those before `offset` included.
        offset: row of position 0.
    """

    n: int
    offset: int


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder: embedding, layers, head.

    Args:
        dim: width of the residual stream.
        max_len: context length in tokens that the checkpoint supports, RoPE extension included.
        scale: of the attention scores.
        tied: the LM head multiplies by the embedding table.
        placement: of the layers' norms.
        softcap: attention scores s become softcap * tanh(s / softcap).
        embed_scale: of the embedding's rows.
        embed_dim: their width where it isn't `dim`: projections stand before the first and after the last layer.
        residual_scale: of what attention and MLP add to the stream.
        positions: learned positions, or None.
        per_layer_dim: columns of the inputs that each layer gets from a table of its own, or None.
        final_norm: whether a norm stands before the head.
        logit_scale, logit_cap: logits l become cap * tanh(scale * l / cap).
    """

    dim: int
    vocab_size: int
    max_len: int
    norm: NormSpec
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    scale: float
    tied: bool
    placement: Placement = Placement.PRE
    bias: Bias = Bias.NONE
    softcap: float | None = None
    embed_scale: float = 1.0
    embed_dim: int | None = None
    residual_scale: float = 1.0
    positions: LearnedPositions | None = None
    per_layer_dim: int | None = None
    final_norm: bool = True
    logit_scale: float = 1.0
    logit_cap: float | None = None

    def with_mixers(self, **changes: Any) -> DecoderSpec:
        """A copy whose layers' mixers have these values: a list holds one for each layer."""
        return self._with("mixer", changes)

    def with_ffns(self, **changes: Any) -> DecoderSpec:
        """The same for the feed-forwards."""
        return self._with("ffn", changes)

    def with_experts(self, experts: MoESpec, sparse: Sequence[bool] | None = None) -> DecoderSpec:
        """A copy whose layers, or those that are sparse, have experts."""
        layers = [
            replace(layer, ffn=experts) if sparse is None or sparse[i] else layer
            for i, layer in enumerate(self.layers)
        ]
        shared: dict[LayerSpec, LayerSpec] = {}
        return replace(self, layers=tuple(shared.setdefault(layer, layer) for layer in layers))

    def _with(self, part: str, changes: dict[str, Any]) -> DecoderSpec:
        shared: dict[LayerSpec, LayerSpec] = {}
        layers = []
        for i, layer in enumerate(self.layers):
            own = {key: value[i] if isinstance(value, list) else value for key, value in changes.items()}
            changed = replace(layer, **{part: replace(getattr(layer, part), **own)})
            layers.append(shared.setdefault(changed, changed))
        return replace(self, layers=tuple(layers))
