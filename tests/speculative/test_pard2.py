"""PARD-2: which state of the target goes with which token, whatever the chunks, the accepted guesses and the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoint import write_checkpoint

from pace import LLM, SamplingParams
from pace.engine.schedule import Schedule
from pace.engine.sequence import Sequence
from pace.errors import CheckpointError
from pace.speculative.drafter import Proposal
from pace.speculative.features import Features
from pace.speculative.pard import PardDrafter

DIM, LAYERS = 64, [-1, 1, 0]
PROMPT = [5, 9, 31, 17, 80, 44, 63, 12, 99, 7, 150, 33, 21, 8, 64, 71, 2]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("target") / "target", num_hidden_layers=3))


def draft(directory: Path, scale: float = 2.0, **changes: Any) -> str:
    """A PARD-2 draft that listens: its projection is as loud as its embedding."""
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "pard_token": 261,
        "spd_type": "pard2",
        "pard2": True,
        "pard2_scale": scale,
        "pard2_target_dim": DIM * len(LAYERS),
        "pard2_target_layers": LAYERS,
    }
    write_checkpoint(directory, **(options | changes))
    rng = np.random.default_rng(1)
    (directory / "target_proj").mkdir()
    weight = rng.standard_normal((32, DIM * len(LAYERS))).astype(np.float32)
    save_file({"target_proj.weight": weight}, directory / "target_proj" / "model.safetensors")
    return str(directory)


def load(target: str, model: str, **options: Any) -> LLM:
    speculative = {"method": "pard", "model": model, "num_speculative_tokens": 4, "adaptive": False}
    usual: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 2, "threads": 1, "speculative": speculative}
    return LLM(target, **(usual | options))


def guesses(llm: LLM, prompt: list[int], n: int, **asked: Any) -> dict[tuple[int, ...], list[int]]:
    """What was guessed behind every history of a request."""
    drafter = llm.engine.speculation._drafter  # type: ignore[union-attr]  # it is there, or the test fails
    assert isinstance(drafter, PardDrafter)
    found: dict[tuple[int, ...], list[int]] = {}
    propose = PardDrafter.propose.__get__(drafter)

    def recorded(wanted: Mapping[Sequence, int]) -> dict[Sequence, Proposal]:
        proposals: dict[Sequence, Proposal] = propose(wanted)
        for seq, proposal in proposals.items():
            found[tuple(seq.tokens[: seq.n_tokens].tolist())] = list(proposal.token_ids)
        return proposals

    drafter.propose = recorded  # type: ignore[method-assign]  # a test's in its place
    llm.generate(prompt, SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, **asked))
    return found


def test_a_round_in_the_middle_is_the_first_round_behind_the_same_tokens(target: str, tmp_path: Path) -> None:
    """Chunks of a prompt, accepted guesses, rejected ones: the pairs are those of one pass over all."""
    model = draft(tmp_path / "draft")
    chance = {"method": "pard", "model": model, "num_speculative_tokens": 4, "adaptive": False}
    # An untrained draft is never right; what ends a round is the target's own token, whatever came before.
    chance["synthetic_acceptance"] = 0.6
    with load(target, "", max_num_batched_tokens=6, speculative=chance) as llm:
        history = guesses(llm, PROMPT, 70)
        accepted = llm.stats()["speculative"]["n_accepted_tokens"]
    checked = 0
    with load(target, model, enable_prefix_caching=False) as llm:
        for tokens, guess in history.items():
            if len(guess) == 4:
                again = guesses(llm, list(tokens[:-1]), 8)
                assert again[tokens] == guess
                checked += 1
    assert checked > 10 and accepted > 0


def test_the_draft_hears_the_target(target: str, tmp_path: Path) -> None:
    """Else the test above would hold for a draft that is deaf; and a silent projection is one that is not there."""
    with load(target, draft(tmp_path / "a")) as llm:
        heard = guesses(llm, PROMPT, 12)
    with load(target, draft(tmp_path / "b", scale=0.0)) as llm:
        silent = guesses(llm, PROMPT, 12)
    plain = draft(tmp_path / "c", spd_type="pard", pard2=False)
    with load(target, plain) as llm:
        without = guesses(llm, PROMPT, 12)
    shared = set(heard) & set(silent)
    assert silent == without and any(heard[history] != silent[history] for history in shared)


def test_another_target_is_drafted_for_without_states(tmp_path: Path) -> None:
    other = str(write_checkpoint(tmp_path / "other", hidden_size=48, head_dim=16))
    with load(other, draft(tmp_path / "a")) as llm:
        dual = guesses(llm, PROMPT, 12)
    with load(other, draft(tmp_path / "b", spd_type="pard", pard2=False)) as llm:
        assert guesses(llm, PROMPT, 12) == dual


def test_the_target_says_the_same_with_its_states_tapped(target: str, tmp_path: Path) -> None:
    asked = SamplingParams(max_tokens=30, temperature=0.9, seed=1, logprobs=3, prompt_logprobs=1)
    prompts = [PROMPT, [4] * 30, [9, 8]]
    with load(target, draft(tmp_path / "a")) as llm, load(target, "", speculative=None) as plain:
        with_taps, without = (one.generate(prompts, asked) for one in (llm, plain))
        assert [(o.outputs, o.prompt_logprobs) for o in with_taps] == [
            (o.outputs, o.prompt_logprobs) for o in without
        ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pard2_target_dim": 100}, "pard2_target_dim is 100, expected a multiple of the 3 layers"),
        ({"pard2_target_dim": None}, "pard2_target_dim is None"),
        ({"pard2_target_layers": "all"}, "pard2_target_layers is 'all', expected a list of integers"),
        ({"pard2_scale": -1}, "pard2_scale is -1, expected a number from 0 on"),
        ({"hidden_size": 16}, r"target_proj.weight is \[32, 192\], expected \[16, 192\]"),
        ({"pard2_proj_bias": True}, "expected target_proj.bias, target_proj.weight"),
    ],
)
def test_a_projection_that_does_not_fit_is_refused(
    target: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(target, draft(tmp_path / "draft", **changes))


def test_a_projection_that_is_missing_is_refused_and_a_pickle_never_read(target: str, tmp_path: Path) -> None:
    model = Path(draft(tmp_path / "draft"))
    (model / "target_proj" / "model.safetensors").rename(tmp_path / "elsewhere")
    (model / "target_proj").rmdir()
    with pytest.raises(CheckpointError, match=r"needs its projection as target_proj.* it is missing"):
        load(target, str(model))
    (model / "warp_model.bin").write_bytes(b"\x80\x04c__builtin__\nexit\n(tR.")
    with pytest.raises(CheckpointError, match=r"warp_model.bin is a pickle, .* never read"):
        load(target, str(model))


def sequence(n: int) -> Sequence:
    seq = Sequence("a", np.arange(n, dtype=np.int32), SamplingParams(), max_output=8)
    seq.start(0, 0)
    return seq


def test_token_t_goes_with_state_t_minus_1_and_masks_with_that_of_the_last_token() -> None:
    """The first token has no state before it: shifting left instead loses it, and acceptance collapses."""
    features = Features((0, 2))
    taps = {"tap.0": np.zeros((16, 2), np.uint16), "tap.2": np.zeros((16, 3), np.uint16)}
    features.bind(taps.__getitem__)
    seq = sequence(6)
    for first, n in ((0, 4), (4, 2)):  # the prompt in two chunks: states 1 .. 6
        for tap in taps.values():
            tap[:n] = np.arange(first + 1, first + n + 1)[:, None]
        seq.n_computed = first
        step = Schedule()
        step.add(seq, n)
        features.ran(step)
    into = np.full((8, 5), 77, np.uint16)
    features.fill(into, seq, 0, 5)
    assert into.tolist() == [[i] * 5 for i in (0, 1, 2, 3, 4, 4, 4, 4)]
    features.fill(into[:4], seq, 5, 2)
    assert into[:4].tolist() == [[i] * 5 for i in (5, 6, 6, 6)]


def test_states_of_wrong_guesses_are_overwritten_and_missing_ones_are_zero() -> None:
    features = Features((0,))
    tap = np.zeros((16, 2), np.uint16)
    features.bind(lambda name: tap)
    seq = sequence(40)
    for first, n, value in ((10, 4, 1), (12, 3, 5)):  # two guesses were wrong
        tap[:n] = value
        seq.n_computed = first
        step = Schedule()
        step.add(seq, n)
        features.ran(step)
    into = np.full((8, 2), 77, np.uint16)
    features.fill(into, seq, 9, 8)
    assert into[:, 0].tolist() == [0, 0, 1, 1, 5, 5, 5, 0]
    features.end(seq)
    features.fill(into, seq, 9, 8)
    assert not into.any()


def test_config_of_the_tests_is_what_they_say(tmp_path: Path) -> None:
    values = json.loads((Path(draft(tmp_path / "draft")) / "config.json").read_text())
    assert values["pard2_target_dim"] == 192
