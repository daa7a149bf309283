"""The loader: strict both ways before anything is allocated, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from golden import tiny

from pace.errors import WeightsError
from pace.models import tensors as module
from pace.models.decoder import lower
from pace.models.plan import Plan, WeightShape, gated_rows
from pace.models.registry import ARCHITECTURES, parse_config
from pace.models.weight_map import expand
from pace.models.weights import DenseSink, SourceDtype, SourcePart, Tensors, WeightMap, load_weights, to_f32

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Info:
    """Dtype and shape, as a checkpoint's header gives them."""

    dtype: str
    shape: tuple[int, ...]


class Memory:
    """A checkpoint in memory that counts how many tensors are alive at once."""

    def __init__(self, arrays: dict[str, Array], dtypes: dict[str, str] | None = None) -> None:
        self.arrays = arrays
        self.dtypes = dtypes or {}
        self.alive: set[str] = set()
        self.peak = 0
        self.dropped: list[str] = []

    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def info(self, name: str) -> Info:
        default = {"uint16": "BF16", "float16": "F16", "float32": "F32"}.get(
            self.arrays[name].dtype.name, "U8"
        )
        return Info(self.dtypes.get(name, default), self.arrays[name].shape)

    def tensor(self, name: str) -> Array:
        self.alive.add(name)
        self.peak = max(self.peak, len(self.alive))
        return self.arrays[name]

    def drop(self, name: str) -> None:
        self.alive.remove(name)
        self.dropped.append(name)


class NoSink:
    """A sink that must never be called."""

    def matrix(self, name: str, shape: WeightShape, parts: Iterator[SourcePart]) -> None:
        raise AssertionError(f"matrix {name} was loaded from a broken checkpoint")

    def vector(self, name: str, values: npt.NDArray[np.float32]) -> None:
        raise AssertionError(f"vector {name} was loaded from a broken checkpoint")

    def table(self, name: str, rows: module.SourceArray, dtype: SourceDtype) -> None:
        raise AssertionError(f"table {name} was loaded from a broken checkpoint")


def plan_of(name: str) -> tuple[Plan, WeightMap]:
    spec, weight_map = parse_config(tiny.CASES[name].config)
    return lower(spec, 64), weight_map


def refused(name: str, arrays: dict[str, Array], dtypes: dict[str, str] | None = None) -> str:
    """The message with which a checkpoint is refused before the sink is called."""
    plan, weight_map = plan_of(name)
    with pytest.raises(WeightsError) as caught:
        load_weights(plan, Tensors(Memory(arrays, dtypes), weight_map, len(plan.kv)), NoSink())
    message = str(caught.value)
    assert "\n" not in message
    return message


Q = "model.layers.1.self_attn.q_proj.weight"


def test_missing_and_unexpected_are_listed_together() -> None:
    arrays: dict[str, Array] = dict(tiny.tensors("llama-mha"))
    arrays["model.layers.1.self_attn.q.weight"] = arrays.pop(Q)
    message = refused("llama-mha", arrays)
    assert f"{Q!r} missing" in message
    assert "'model.layers.1.self_attn.q.weight' unexpected" in message


def test_long_lists_are_cut() -> None:
    message = refused("llama-mha", {})
    assert "and 17 more missing" in message  # 2 layers x 9 + 3 = 21 tensors, 4 shown
    assert len(message) < 500


@pytest.mark.parametrize("name", sorted(tiny.tensors("qwen3")))
def test_every_tensor_is_required(name: str) -> None:
    arrays: dict[str, Array] = dict(tiny.tensors("qwen3"))
    del arrays[name]
    assert f"{name!r} missing" in refused("qwen3", arrays)


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.2.input_layernorm.weight",  # a layer more than the config says
        "model.layers.0.self_attn.q_proj.bias",  # a bias that the config denies
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate_proj.weight_scale",
        "lm_head.bias",
    ],
)
def test_unexpected_tensors_are_refused(extra: str) -> None:
    arrays: dict[str, Array] = dict(tiny.tensors("llama-mha"))
    arrays[extra] = np.zeros(4, np.uint16)
    assert f"{extra!r} unexpected" in refused("llama-mha", arrays)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (Q, (64, 128), "[128, 128]"),
        ("model.layers.0.mlp.down_proj.weight", (208, 128), "[128, 208]"),
        ("model.layers.0.input_layernorm.weight", (128, 1), "[128]"),
        ("model.embed_tokens.weight", (308, 128), "[307, 128]"),
        ("lm_head.weight", (307,), "[307, 128]"),
    ],
)
def test_wrong_shapes_are_refused(name: str, shape: tuple[int, ...], expected: str) -> None:
    arrays: dict[str, Array] = dict(tiny.tensors("llama-mha"))
    arrays[name] = np.zeros(shape, np.uint16)
    assert f"{name} is {list(shape)}, expected {expected}" in refused("llama-mha", arrays)


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "U8"])
def test_wrong_dtypes_are_refused(dtype: str) -> None:
    message = refused("llama-mha", dict(tiny.tensors("llama-mha")), {Q: dtype})
    assert f"{Q} has dtype {dtype}, expected BF16, F16 or F32" in message


def test_a_view_that_contradicts_its_header_is_refused() -> None:
    arrays: dict[str, Array] = dict(tiny.tensors("llama-mha"))
    plan, weight_map = plan_of("llama-mha")
    with pytest.raises(WeightsError, match="was read as uint16"):
        load_weights(plan, Tensors(Memory(arrays, {Q: "F16"}), weight_map, len(plan.kv)), DenseSink())


def test_old_and_redundant_tensors_are_ignored() -> None:
    arrays: dict[str, Array] = dict(tiny.tensors("llama-gqa4-tied"))
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(32, np.float32)
    arrays["model.rotary_emb.inv_freq"] = np.zeros(32, np.float32)
    arrays["model.rotary_emb.original_inv_freq"] = np.zeros(32, np.float32)
    arrays["model.layers.1.self_attn.rotary_emb.cos_cached"] = np.zeros((64, 64), np.float32)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    plan, weight_map = plan_of("llama-gqa4-tied")
    sink = DenseSink()
    load_weights(plan, Tensors(Memory(arrays), weight_map, len(plan.kv)), sink)
    assert "lm_head" not in sink.weights


@pytest.mark.parametrize("name", ["llama-head80-biases", "qwen3", "qwen2-tied"])
def test_one_tensor_at_a_time_with_progress(name: str) -> None:
    arrays: dict[str, Array] = dict(tiny.tensors(name))
    checkpoint, sink = Memory(arrays), DenseSink()
    plan, weight_map = plan_of(name)
    seen: list[tuple[int, int]] = []
    load_weights(
        plan,
        Tensors(checkpoint, weight_map, len(plan.kv)),
        sink,
        lambda done, total: seen.append((done, total)),
    )
    total = sum(a.nbytes for a in arrays.values())
    assert checkpoint.peak == 1
    assert sorted(checkpoint.dropped) == sorted(arrays)
    assert seen[-1] == (total, total)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    for key, shape in plan.weights.items():
        assert sink.weights[key].shape == ((shape.n,) if shape.k is None else (shape.n, shape.k))
        assert np.isfinite(sink.weights[key]).all()


def test_fused_rows_land_where_the_plan_says() -> None:
    arrays = tiny.tensors("llama-head80-biases")
    plan, weight_map = plan_of("llama-head80-biases")
    sink = DenseSink()
    load_weights(plan, Tensors(Memory(dict(arrays)), weight_map, len(plan.kv)), sink)

    def source(name: str) -> Array:
        return to_f32(arrays[f"model.layers.1.{name}"], "bf16")

    for suffix, key in ((".weight", ""), (".bias", ".bias")):
        qkv = [source(f"self_attn.{part}_proj{suffix}") for part in "qkv"]
        np.testing.assert_array_equal(sink.weights[f"layers.1.qkv{key}"], np.concatenate(qkv))
        fused = sink.weights[f"layers.1.gate_up{key}"]
        np.testing.assert_array_equal(fused[gated_rows(208, "gate")], source(f"mlp.gate_proj{suffix}"))
        np.testing.assert_array_equal(fused[gated_rows(208, "up")], source(f"mlp.up_proj{suffix}"))


def test_gated_rows_cover_every_row_once() -> None:
    rows = np.concatenate([gated_rows(48, "gate"), gated_rows(48, "up")])
    assert sorted(rows) == list(range(96))
    assert list(gated_rows(17, "gate")[-2:]) == [15, 32]
    assert list(gated_rows(17, "up")[-2:]) == [31, 48]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_dtypes_load(dtype: type[np.floating[Any]]) -> None:
    arrays: dict[str, Array] = {
        name: to_f32(bits, "bf16").astype(dtype) for name, bits in tiny.tensors("llama-mha").items()
    }
    plan, weight_map = plan_of("llama-mha")
    sink = DenseSink()
    load_weights(plan, Tensors(Memory(arrays), weight_map, len(plan.kv)), sink)
    np.testing.assert_array_equal(sink.weights["lm_head"], arrays["lm_head.weight"].astype(np.float64))


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied(arrays: dict[str, Array]) -> Tensors:
    plan, weight_map = plan_of("qwen2-tied")
    return Tensors(Memory(arrays), weight_map, len(plan.kv))


def test_a_tied_head_is_told_by_content() -> None:
    arrays = tiny.tensors("qwen2-tied")
    other = arrays[EMBED].copy()
    other[-1, -1] ^= 1  # one bit of the last element
    for head, expected in (
        (arrays[EMBED].copy(), True),
        (to_f32(arrays[EMBED], "bf16"), True),  # the same values in another type
        (other, False),
        (to_f32(other, "bf16"), False),
        (arrays[EMBED][:-1], False),
        (arrays[EMBED].reshape(-1), False),
        (np.array(0, np.uint16), False),
        (arrays[EMBED].astype(np.int64), False),
    ):
        assert tied({**arrays, HEAD: head}).head_is_tied() is expected
    assert tied(arrays).head_is_tied()
    nan = np.full_like(arrays[EMBED], 0x7FC0)
    assert tied({**arrays, EMBED: nan, HEAD: nan.copy()}).head_is_tied()


@pytest.mark.parametrize("name", [name for name, known in ARCHITECTURES.items() if known.weights])
def test_every_architecture_names_the_pair_that_may_be_one(name: str) -> None:
    weight_map = ARCHITECTURES[name].weights
    table = expand(weight_map, 1)
    (embed,), (head,) = table["embed"].layouts[0], table["lm_head"].layouts[0]
    matrix = np.zeros((4, 4), np.uint16)
    for other in (matrix, matrix + 1):
        memory = Memory({f"module.{embed.name}": matrix, f"_orig_mod.{head.name}": other})
        assert Tensors(memory, weight_map, 1).head_is_tied() is (other is matrix)


@pytest.mark.parametrize("at", [0, -1, module._COMPARED - 1, module._COMPARED])
def test_a_head_that_differs_anywhere_is_not_tied(at: int) -> None:
    embed = np.zeros((3, module._COMPARED // 2), np.uint16)
    head = embed.copy()
    head.reshape(-1)[at] = 1
    memory = {**tiny.tensors("qwen2-tied"), EMBED: embed}
    assert tied({**memory, HEAD: embed.copy()}).head_is_tied()
    tensors = tied({**memory, HEAD: head})
    assert not tensors.head_is_tied()
    assert not tensors._checkpoint.alive  # type: ignore[attr-defined]  # both were given back


def test_a_plan_that_ties_what_the_file_has_twice_is_refused() -> None:
    """The head must not be dropped by a caller that forgot to ask."""
    arrays = tiny.tensors("qwen2-tied")
    assert "lower it untied" in refused("qwen2-tied", {**arrays, HEAD: arrays[EMBED] ^ 1})


def test_an_untied_config_without_a_head_says_what_to_set() -> None:
    arrays: dict[str, Array] = dict(tiny.tensors("llama-mha"))
    del arrays[HEAD]
    message = refused("llama-mha", arrays)
    assert "'lm_head.weight' missing; set tie_word_embeddings to true" in message


def test_a_tied_matrix_may_be_stored_under_either_name() -> None:
    arrays = tiny.tensors("qwen2-tied")
    plan, _ = plan_of("qwen2-tied")
    sinks = []
    for names in ((EMBED,), (HEAD,), (EMBED, HEAD)):
        sinks.append(DenseSink())
        rest = {name: array for name, array in arrays.items() if name != EMBED}
        load_weights(plan, tied({**rest, **dict.fromkeys(names, arrays[EMBED])}), sinks[-1])
    for sink in sinks[1:]:
        assert sink.weights.keys() == sinks[0].weights.keys()
        np.testing.assert_array_equal(sink.weights["embed"], sinks[0].weights["embed"])
    message = refused("qwen2-tied", {name: array for name, array in arrays.items() if name != EMBED})
    assert "'model.embed_tokens.weight' missing" in message


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace(
            ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
        ),
        lambda name: f"_forward_module.{name}",
        lambda name: f"module.base_model.model.{name}",
        lambda name: f"model.{name}",
        lambda name: f"module.{name.removeprefix('model.')}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.removeprefix("model."),
    ],
    ids=[
        "compiled",
        "layers compiled",
        "DDP",
        "DDP and compiled",
        "compiled DDP",
        "FSDP and activation checkpointing",
        "Lightning",
        "merged PEFT in DDP",
        "a model too many",
        "DDP, without the head's model",
        "merged PEFT",
        "without the head's model",
    ],
)
def test_names_that_tools_have_wrapped(rename: Callable[[str], str]) -> None:
    arrays = tiny.tensors("llama-mha")
    plan, weight_map = plan_of("llama-mha")
    sinks = (DenseSink(), DenseSink())
    for sink, names in zip(
        sinks, ({name: name for name in arrays}, {name: rename(name) for name in arrays}), strict=True
    ):
        memory = Memory({names[name]: array for name, array in arrays.items()})
        load_weights(plan, Tensors(memory, weight_map, len(plan.kv)), sink)
        assert not memory.alive
    for name, value in sinks[0].weights.items():
        np.testing.assert_array_equal(value, sinks[1].weights[name])


def test_two_names_of_one_tensor_are_refused() -> None:
    arrays = tiny.tensors("llama-mha")
    message = refused("llama-mha", {**arrays, f"_orig_mod.{EMBED}": arrays[EMBED]})
    assert "mean the same tensor" in message and EMBED in message


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "merge_and_unload"),
        ("model.layers.0.self_attn.q_proj.lora_B.default.weight", "merge_and_unload"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "merge_and_unload"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "merge_and_unload"),
        ("model.layers.0.self_attn.q_proj.qweight", "quantised weights"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", "quantised weights"),
        ("model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4", "quantised weights"),
        ("blk.0.attn_q.weight", "GGUF"),
        ("layers.0.attention.wq.weight", "Meta's own names"),
        ("v_head.summary.weight", "scores texts"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_known_is_called_by_its_name(name: str, what: str, alone: bool) -> None:
    arrays: dict[str, Array] = {} if alone else dict(tiny.tensors("llama-mha"))
    message = refused("llama-mha", {**arrays, name: np.zeros((4, 4), np.uint16)})
    assert what in message and name in message and "download it again" not in message
