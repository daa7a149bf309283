"""Every architecture, three configurations or more: the reference against stored logits of transformers, the executor
against the reference, and both against themselves however a prompt is fed.

Tolerances. The reference computes in float64 and transformers in float32: 48 positions through up to 7 layers differ by
at most 1.4e-5 of the largest logit (Gemma 4, whose scores are not scaled down; 3e-6 elsewhere). The executor rounds to
bf16; its tolerance is derived in test_executor.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ext.kit import Packed, pack_model
from golden import families, tiny
from golden.harness import (
    Model,
    apart,
    assert_greedy_agrees,
    batch_of,
    bf16_tolerance,
    choices_of,
    followed,
    in_chunks,
    load,
    prefill,
    relative_error,
)

from pace import ops
from pace.models.config import Config
from pace.models.registry import ARCHITECTURES

TOLERANCE = 3e-5
EXACT = 1e-9
CASES = sorted(families.CASES)
TABLE = [7, 2, 11]  # KV blocks, out of order

PARTIAL = {
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "StableLmForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
}
ONE_WINDOW = {"MistralForCausalLM", "Ministral3ForCausalLM", "Phi3ForCausalLM"}
ONE_WINDOW |= {"Qwen3MoeForCausalLM", "MixtralForCausalLM"}
"""Here layer_types may only agree; transformers makes a Ministral of a Mistral that has them."""

ALWAYS_1 = {"MixtralForCausalLM", "MiniMaxM2ForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM"}
"""Here weights of experts always add up to 1; the key may only agree."""

FamilyModel = Callable[[str], Model]


def prompt(name: str) -> list[int]:
    return tiny.prompt(name, families.VOCAB_SIZE)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(families.GOLDEN_FILE) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
    """family_model(name): a case written, read back and loaded, once."""
    loaded: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in loaded:
            case = families.CASES[name]
            directory = tiny.write(name, tmp_path_factory.mktemp("family"), case)
            loaded[name] = load(directory, case.max_model_len)
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def exact(family_model: FamilyModel) -> Callable[[str], np.ndarray]:
    """exact(name): the reference's logits of the case's prompt, once."""
    found: dict[str, np.ndarray] = {}

    def get(name: str) -> np.ndarray:
        if name not in found:
            found[name] = prefill(family_model(name).reference(), prompt(name))
        return found[name]

    return get


def test_every_case_is_stored(golden: dict[str, np.ndarray]) -> None:
    assert sorted(golden) == CASES, "run tests/golden/make.py"
    assert families.GOLDEN_FILE.stat().st_size < 1_000_000


def test_every_architecture_has_three_cases() -> None:
    for name, architecture in ARCHITECTURES.items():
        cases = [c for c in families.CASES.values() if c.config["architectures"] == [name]]
        assert len(cases) >= (1 if architecture.text else 3), name


@pytest.mark.parametrize("name", sorted(n for n, a in ARCHITECTURES.items() if not a.text))
def test_every_option_that_a_family_reads_is_flipped(name: str) -> None:
    """Each key takes two values among the cases, absent being one."""
    configs = [c.config for c in families.CASES.values() if c.config["architectures"] == [name]]
    read: set[str] = set()
    for config in configs:
        reader = Config(config)
        ARCHITECTURES[name].spec(reader)
        read |= reader.read
    fixed = {"vocab_size", "max_position_embeddings", "n_positions", "vocab_size_per_layer_input"}
    # Read to be refused, or to agree with what follows from other keys.
    fixed |= {"rope_scaling", "mlp_bias", "qk_layernorm", "head_dim"}
    fixed |= (
        {"use_qk_norm"}
        if name in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "MiniMaxM2ForCausalLM")
        else set()
    )
    fixed |= {
        "scoring_func",
        "score_function",
        "use_routing_bias",
        "shared_intermediate_size",
        "attn_type_list",
    }
    # Spellings of one key, of which a file has one.
    fixed |= {"num_experts", "num_local_experts"} - set().union(*configs)
    fixed |= {"norm_topk_prob"} if name in ALWAYS_1 else set()
    fixed |= {"hidden_act"} if name == "GptOssForCausalLM" else set()
    fixed |= {"partial_rotary_factor"} if name not in PARTIAL else set()
    fixed |= {"layer_types"} if name in ONE_WINDOW else set()
    # These say it in rope_parameters, which test_rope.py changes.
    fixed |= {"rope_theta"} if name.startswith(("Gemma4", "Ministral3")) else set()
    fixed |= {"num_key_value_heads"} if name in ("OPTForCausalLM", "GPTJForCausalLM") else set()
    for key in sorted(read - fixed):
        assert len({repr(config.get(key, "absent")) for config in configs}) > 1, key


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_transformers(
    name: str, exact: Callable[[str], np.ndarray], golden: dict[str, np.ndarray]
) -> None:
    assert relative_error(exact(name)[list(tiny.GOLDEN_ROWS)], golden[name]) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_reference_does_not_mind_chunks(
    name: str, family_model: FamilyModel, exact: Callable[[str], np.ndarray]
) -> None:
    got = in_chunks(family_model(name).reference(), prompt(name), 7, TABLE)
    assert relative_error(got, exact(name)) < EXACT


@pytest.mark.parametrize("name", CASES)
def test_executor_matches_reference(
    name: str,
    team: ops.Team,
    family_packed: Callable[[str], Packed],
    exact: Callable[[str], np.ndarray],
) -> None:
    tokens, want = prompt(name), exact(name)
    packed = replace(family_packed(name), model=apart(family_packed(name).model))
    runner = packed.runner(team)
    got = prefill(runner, tokens)
    choices = choices_of(runner)
    reference = followed(
        packed.model, choices
    )  # between experts that are nearly as good, rounding may choose
    want = prefill(reference, tokens) if choices else want
    # What the declared roundings cost this model: peaked attention turns one of a score into more than that.
    rounded = relative_error(prefill(followed(packed.model, choices, "bf16"), tokens), want)
    limit = max(2 * rounded, bf16_tolerance(len(packed.model.spec.layers)))
    assert relative_error(got, want) < limit
    assert reference.gap < 2 * limit
    assert_greedy_agrees(got, want, limit * np.abs(want).max())


@pytest.mark.parametrize("name", CASES)
def test_executor_gives_the_same_bytes_however_it_is_fed(
    name: str, team: ops.Team, family_packed: Callable[[str], Packed]
) -> None:
    """Whole, token by token, in chunks, in company and on each way of addressing the cache (law 1)."""
    packed, tokens = family_packed(name), prompt(name)
    whole = prefill(packed.runner(team), tokens).tobytes()
    assert in_chunks(packed.runner(team), tokens, 1, TABLE).tobytes() == whole
    assert in_chunks(packed.runner(team), tokens, 7, TABLE).tobytes() == whole
    slab = packed.runner(team, block_size=64, n_blocks=4)
    assert in_chunks(slab, tokens, 13, [2]).tobytes() == whole
    extent = packed.runner(team, contiguous=True)
    assert in_chunks(extent, tokens, 9, [5]).tobytes() == whole
    runner = packed.runner(team)
    runner.step(batch_of([(tokens[:20], 0, TABLE), (tokens[::-1], 0, [0, 1, 3])], logit_rows=[]))
    mixed = runner.step(batch_of([(tokens[3:30], 0, [4, 5]), (tokens[20:], 20, TABLE)]))
    assert mixed[27:].tobytes() == np.frombuffer(whole, np.float32).reshape(48, -1)[20:].tobytes()


@pytest.fixture(scope="module")
def family_packed(team: ops.Team, family_model: FamilyModel) -> Callable[[str], Packed]:
    """family_packed(name): a case with its weights packed, once."""
    packed: dict[str, Packed] = {}

    def get(name: str) -> Packed:
        if name not in packed:
            packed[name] = pack_model(team, family_model(name))
        return packed[name]

    return get


def test_written_configs_are_what_transformers_would_read(tmp_path: Path) -> None:
    """Multimodal cases nest the text model's keys and tensors as the files on the hub do."""
    name = "gemma3-tower"
    directory = tiny.write(name, tmp_path, families.CASES[name])
    text = (directory / "model.safetensors").read_bytes()[:100_000]
    assert b"model.language_model.layers.0" in text and b'"model.layers' not in text
