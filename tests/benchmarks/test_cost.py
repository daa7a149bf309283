"""The denominators of the roof shares, against counts by hand."""

from __future__ import annotations

import pytest

from pace.benchmarks.cost import op_costs, step_cost
from pace.benchmarks.roofline import StepRoofs
from pace.models.decoder import lower
from pace.models.formats import with_formats
from pace.models.plan import Attention, Plan
from pace.models.registry import parse_config

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}

QKV = 2048 * (2048 + 2 * 512)
REST = 2048 * 2048 + 3 * 2048 * 8192  # o_proj and the MLP
HEAD = 2048 * 128256


@pytest.fixture(scope="module")
def plan() -> Plan:
    return lower(parse_config(LLAMA_1B)[0], 8192)


def test_decode_reads_the_weights_and_every_cache(plan: Plan) -> None:
    cost = step_cost(plan, [1, 1], [100, 1], 2)
    kv_bytes = 16 * 2 * 8 * 64 * 2 * 101
    assert cost.n_bytes == 2 * (16 * (QKV + REST) + HEAD) + kv_bytes + 2 * 2048 * 2
    assert cost.n_flops == 2 * 2 * (16 * (QKV + REST) + HEAD) + 16 * 4 * 32 * 64 * 101


def test_prefill_runs_the_end_of_the_last_layer_on_one_row(plan: Plan) -> None:
    cost = step_cost(plan, [512], [512], 1)
    linear = 2 * (512 * (16 * QKV + 15 * REST) + REST + HEAD)
    attention = 16 * 4 * 32 * 64 * 512 * 513 / 2
    assert cost.n_flops == linear + attention


def test_products_with_int8_rows_are_held_against_their_own_roof(plan: Plan) -> None:
    """The head on bf16 rows, the layers on int8 rows, whose roof is twice as high; attention is always bf16."""
    layers = {name: "int8g32" for name in plan.weights if name.startswith("layers.") and "norm" not in name}
    mixed = with_formats(plan, layers, "int8")  # type: ignore[arg-type]  # values are names of formats
    whole, cost = step_cost(plan, [512], [512], 1), step_cost(mixed, [512], [512], 1)
    assert cost.n_flops == whole.n_flops and whole.n_int8 == 0
    assert cost.n_int8 == 2 * (512 * (16 * QKV + 15 * REST) + REST)
    roofs = StepRoofs(1e10, 1e12, 2e12)
    assert roofs.dot_s(whole) == whole.n_flops / 1e12
    assert roofs.dot_s(cost) == pytest.approx((cost.n_flops - cost.n_int8) / 1e12 + cost.n_int8 / 2e12)
    assert 1.8e12 < roofs.dot(cost) < 2e12 and roofs.dot(whole) == pytest.approx(1e12)


def test_a_chunk_without_logits_reads_no_head(plan: Plan) -> None:
    whole, chunk = step_cost(plan, [16], [16], 1), step_cost(plan, [16], [16], 0)
    assert whole.n_bytes - chunk.n_bytes == 2 * (HEAD + REST)


def test_a_window_bounds_what_is_read() -> None:
    config = LLAMA_1B | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 64,
    }
    windowed = lower(parse_config(config)[0], 8192)
    full = step_cost(windowed, [1], [64], 1)
    assert step_cost(windowed, [1], [5000], 1) == full
    assert step_cost(windowed, [1], [32], 1).n_bytes < full.n_bytes
    # Row by row or all at once: the same products.
    rows = [step_cost(windowed, [1], [n], 0).n_flops for n in range(1, 101)]
    assert step_cost(windowed, [100], [100], 0).n_flops == sum(rows)


GEMMA_4 = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 16,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["full_attention"] * 4,
    "hidden_activation": "gelu_pytorch_tanh",
}


def test_layers_that_share_keys_attend_with_the_last_rows_only() -> None:
    own, shared = (
        step_cost(lower(parse_config(GEMMA_4 | {"num_kv_shared_layers": n})[0], 64), [50], [50], 1)
        for n in (0, 2)
    )
    per_row = (
        2 * 64 * (2 * 64 + 3 * 64)
    )  # what a row passes in a layer without keys of its own: q, o and the MLP
    keys = 2 * 2 * 64 * 16
    pairs = 4 * 4 * 16 * (50 * 51 / 2 - 50)  # attention of all rows against that of one
    # The layer before the shared ones now ends behind its attention, as the last one did.
    assert own.n_flops - shared.n_flops == 2 * (49 * per_row + 50 * keys + pairs)


def test_each_operator_is_counted_by_its_own_shape() -> None:
    changes = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 64,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
    }
    plan = lower(parse_config(GEMMA_4 | changes)[0], 64)
    flops = [cost.n_flops for op, cost in op_costs(plan, [50], [50], 1) if isinstance(op, Attention)]
    per_pair, pairs = 4 * 4 * 16, 50 * 51 // 2
    # Windowed, twice as wide though it sees the same pairs; then one row each, which reads the keys of those two.
    assert flops == [per_pair * pairs, 2 * per_pair * pairs, per_pair * 50, 2 * per_pair * 50]


QWEN_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def test_a_step_reads_the_experts_that_its_rows_chose() -> None:
    moe = lower(parse_config(QWEN_MOE)[0], 64)
    one, nine = (step_cost(moe, [1] * n, [1] * n, n) for n in (1, 9))
    expert, dense = 3 * 64 * 32, 64 * (2 * 64 + 2 * 32) + 64 * 16  # q, o, k, v and the router
    head, kv, row = 64 * 128, 2 * 2 * 2 * 16 * 2, 64 * 2
    assert one.n_bytes == 2 * (2 * (dense + 4 * expert) + head) + kv + row
    assert nine.n_bytes == 2 * (2 * (dense + 16 * expert) + head) + 9 * (kv + row)
    assert nine.n_flops == 9 * one.n_flops
    names = [op.name for op in moe.ops if op.operator.startswith("experts_")]
    told = step_cost(moe, [1] * 9, [1] * 9, 9, experts=dict.fromkeys(names, 7))
    assert nine.n_bytes - told.n_bytes == 2 * 2 * (16 - 7) * expert


def test_four_bits_count_as_four_bits() -> None:
    config = QWEN_MOE | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "intermediate_size": 64,
        "num_local_experts": 16,
        "sliding_window": 32,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    for key in (
        "num_experts",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    ):
        del config[key]
    oss = lower(parse_config(config)[0], 64)
    names = [op.name for op in oss.ops if op.operator.startswith("experts_")]
    few, many = (step_cost(oss, [1], [1], 1, experts=dict.fromkeys(names, n)) for n in (4, 5))
    assert many.n_bytes - few.n_bytes == 2 * 3 * 64 * 64 * 4.25 / 8
