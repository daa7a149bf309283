"""What families with experts share: the reading of their config, and names of routers and shared experts."""

from __future__ import annotations

from pace.models import llama as base
from pace.models.common import MAX_WIDTH, activation
from pace.models.config import Config
from pace.models.spec import DenseSpec, MoESpec, RouterSpec
from pace.models.weight_map import OneOf, Part, WeightMap, expert_weights

MAX_EXPERTS = 1 << 16


def experts(
    config: Config,
    router: RouterSpec,
    *,
    count: tuple[str, ...] = ("num_experts", "num_local_experts"),
    top_k: str = "num_experts_per_tok",
    width: str = "moe_intermediate_size",
    act: str = "hidden_act",
) -> MoESpec:
    """Gated experts of one width, from the keys of that name.

    Args:
        count: names of one key; where a file has several they must agree.

    Raises:
        CheckpointError: a key is missing, or more experts are chosen than there are.
    """
    n_experts = config.integer(next((key for key in count if config.has(key)), count[0]), high=MAX_EXPERTS)
    for key in count:
        config.only(key, n_experts)
    k = config.integer(top_k)
    if k > n_experts:
        raise config.error(top_k, k, f"at most the number of experts ({n_experts})")
    return MoESpec(n_experts, k, config.integer(width, high=MAX_WIDTH), activation(config, act), router)


def interleaved_layers(config: Config, n_layers: int) -> list[bool]:
    """Which layers have experts: every `decoder_sparse_step`-th without those of `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", default=1)
    dense = layer_indices(config, "mlp_only_layers", n_layers) or set()
    return [i not in dense and (i + 1) % step == 0 for i in range(n_layers)]


def layer_indices(config: Config, key: str, n_layers: int) -> set[int] | None:
    """A list of layers; None where the key is absent or null."""
    if not config.has(key):
        config.skip(key)
        return None
    return set(config.indices(key, n_layers))


def sigmoid_router(config: Config, scale: float) -> RouterSpec:
    """Scores by themselves, a bias for the choice, groups; weights renormalised unless `norm_topk_prob` is false.

    Args:
        scale: `routed_scaling_factor` of a config without it.
    """
    groups = config.integer("n_group", default=1)
    kept = config.integer("topk_group", default=1, high=groups)
    return RouterSpec(
        "sigmoid",
        choice=True,
        n_groups=groups,
        top_groups=kept,
        renormalise=config.flag("norm_topk_prob", default=True),
        scale=config.number("routed_scaling_factor", default=scale),
    )


def check_groups(config: Config, experts: MoESpec) -> MoESpec:
    """The experts, if their groups are of one size and large enough.

    Raises:
        CheckpointError: they are not.
    """
    size, rest = divmod(experts.n_experts, experts.router.n_groups)
    if rest or size < 2:
        expected = f"a divisor of the number of experts ({experts.n_experts}), at least two in each"
        raise config.error("n_group", experts.router.n_groups, expected)
    if experts.top_k > size * experts.router.top_groups:
        raise config.error(
            "topk_group", experts.router.top_groups, f"groups enough for {experts.top_k} experts"
        )
    return experts


def shared(at: str) -> WeightMap:
    """Names of an expert that every row takes."""
    return {
        "layers.{i}.shared.gate_up": (
            Part(f"{at}.gate_proj.weight", "gate"),
            Part(f"{at}.up_proj.weight", "up"),
        ),
        "layers.{i}.shared.down": (Part(f"{at}.down_proj.weight"),),
    }


def dense_spec(experts: MoESpec, width: int) -> DenseSpec:
    """An MLP that is gated like the experts."""
    return DenseSpec(width, experts.activation)


WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    **expert_weights(f"{base.MLP}.experts"),
    "layers.{i}.router": (Part(f"{base.MLP}.gate.weight"),),
}
"""A Llama whose MLPs are experts under `mlp`."""

_BLOCK = f"{base.LAYER}.block_sparse_moe"
BLOCK_WEIGHTS: WeightMap = {
    **base.WEIGHTS,
    **expert_weights(f"{_BLOCK}.experts", f"{base.MLP}.experts", own="{e}.w1"),
    "layers.{i}.router": OneOf(((Part(f"{_BLOCK}.gate.weight"),), (Part(f"{base.MLP}.gate.weight"),))),
    "layers.{i}.router.choice": OneOf(
        (
            (Part(f"{_BLOCK}.e_score_correction_bias"),),
            (Part(f"{base.MLP}.e_score_correction_bias"),),
        )
    ),
}
"""The same under `block_sparse_moe`, and as transformers 5 saves it."""
