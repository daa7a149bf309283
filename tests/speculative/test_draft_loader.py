"""Drafts that are refused, in one line each, and those that are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import write_checkpoint

from pace import LLM, SamplingParams
from pace.errors import CheckpointError, ConfigError, PaceError


def draft(directory: Path, **changes: Any) -> str:
    """A small draft of the tiny target."""
    options = {"hidden_size": 32, "num_hidden_layers": 1, "pard_token": 261} | changes
    return str(write_checkpoint(directory, **options))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("target") / "target"))


def load(target: str, **speculative: Any) -> LLM:
    given = {"method": "pard", "num_speculative_tokens": 4, "adaptive": False} | speculative
    return LLM(target, max_model_len=96, max_num_seqs=2, threads=1, speculative=given)


GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("key", ["pard_token", "ptd_token_id", "mask_token_id", "dflash_config"])
def test_every_spelling_of_the_mask(target: str, tmp_path: Path, key: str) -> None:
    value: Any = {"mask_token_id": 260} if key == "dflash_config" else 260
    model = draft(tmp_path / "draft", **{"pard_token": None, key: value})
    with load(target, model=model) as llm, LLM(target, max_model_len=96, threads=1) as plain:
        (output,), (expected,) = (one.generate("abc", GREEDY) for one in (llm, plain))
        assert output.outputs[0] == expected.outputs[0]
        assert llm.stats()["speculative"]["n_rounds"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pard_token": None}, "no pard_token, so this model was not trained"),
        ({"pard_token": 4000}, "pard_token is 4000, expected a token id below 272"),
        ({"pard_token": -1}, "pard_token is -1, expected a token id below"),
        ({"pard_token": "262"}, "pard_token is '262', expected a token id below"),
    ],
)
def test_a_mask_that_is_none_is_refused(
    target: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load(target, model=draft(tmp_path / "draft", **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_speculative_tokens": -1}, "num_speculative_tokens is -1, expected an integer from 0 to 32"),
        ({"num_speculative_tokens": 33}, "num_speculative_tokens is 33, expected an integer from 0 to 32"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens is True"),
        ({"method": "eagle"}, "method is 'eagle', expected one of"),
        ({"model": None}, "method pard needs a draft"),
        ({"max_model_len": 5000}, "max_model_len is 5000, the draft .* supports 512 tokens; lower it"),
        ({"draft_window": 0}, "draft_window is 0"),
        ({"adaptive": 1}, "adaptive is 1, expected True or False"),
        ({"synthetic_acceptance": 1.5}, "synthetic_acceptance has 1.5, expected probabilities"),
        ({"synthetic_acceptance": []}, "synthetic_acceptance is empty"),
        ({"tokens": 3}, "has the option 'tokens', expected some of method, model"),
        ({"model": "no/such/folder"}, "no such folder"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    target: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = draft(tmp_path / "draft")
    with pytest.raises(PaceError, match=message) as error:
        load(target, **{"model": model} | options)
    assert "\n" not in str(error.value)


def test_no_mapping_and_no_method_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="speculative is 'pard', expected a mapping such as"):
        LLM(target, speculative="pard")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ConfigError, match="speculative names no method"):
        LLM(target, speculative={"model": "demo-draft"})


def test_other_tokens_are_refused_with_the_first_ids(target: str, tmp_path: Path) -> None:
    model = draft(tmp_path / "draft")
    path = Path(model) / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[3:5]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(values))
    with pytest.raises(
        ConfigError, match=r"other tokens than the target: of its ids 3 is '.' and '.', 4 is"
    ) as error:
        load(target, model=model)
    assert "2 differ in all" in str(error.value) and "\n" not in str(error.value)


def test_padding_of_the_vocabulary_may_differ(target: str, tmp_path: Path) -> None:
    with load(target, model=draft(tmp_path / "draft", vocab_size=320)) as llm:
        assert llm.generate("abc", GREEDY)[0].outputs[0].finish_reason == "length"


def test_vllm_spells_pard_as_parallel_drafting(target: str, tmp_path: Path) -> None:
    with load(target, method="draft_model", parallel_drafting=True, model=draft(tmp_path / "draft")) as llm:
        assert llm.stats()["speculative"]["method"] == "pard"


def test_zero_tokens_are_no_speculation(target: str, tmp_path: Path) -> None:
    with load(target, model=draft(tmp_path / "draft"), num_speculative_tokens=0) as llm:
        assert "speculative" not in llm.stats()


def test_a_draft_whose_weights_are_missing_leaves_nothing_behind(target: str, tmp_path: Path) -> None:
    model = draft(tmp_path / "draft")
    (Path(model) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        load(target, model=model)


@pytest.mark.parametrize("kind", ["slab", "paged", "contiguous"])
def test_a_window_over_the_drafts_cache(target: str, tmp_path: Path, kind: str) -> None:
    """What lies before the window is released, and the target neither knows nor cares."""
    options: dict[str, Any] = {"max_model_len": 400, "threads": 1, "kv_cache_type": kind, "max_num_seqs": 2}
    speculative: dict[str, Any] = {"model": draft(tmp_path / "draft"), "draft_window": 40}
    speculative |= {"num_speculative_tokens": 3, "adaptive": False}
    prompts = [list(range(1, 200)), [5] * 7]
    asked = SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True, logprobs=1)
    outputs = []
    for method in (None, "pard", "draft_model"):
        given = None if method is None else speculative | {"method": method}
        with LLM(target, speculative=given, **options) as llm:
            outputs.append([output.outputs[0] for output in llm.generate(prompts, asked)])
            if given is not None:
                stats = llm.stats()["speculative"]
                assert stats["active"] and stats["n_rounds"] > 50
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_draft_without_a_tokenizer_is_taken(target: str, tmp_path: Path) -> None:
    model = draft(tmp_path / "draft")
    (Path(model) / "tokenizer.json").unlink()
    with load(target, model=model) as llm:
        assert llm.generate("abc", GREEDY)


def test_the_target_as_its_own_draft_is_always_right(target: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(target, own)
    with load(target, method="draft_model", model=str(own)) as llm:
        llm.generate(["abc", "what"], SamplingParams(max_tokens=31, temperature=0.0, ignore_eos=True))
        assert llm.stats()["speculative"]["mean_acceptance_length"] == 5.0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["pard", "draft_model"])
def test_a_trimmed_vocabulary_guesses_the_best_of_its_tokens(
    target: str, tmp_path: Path, method: str, tied: bool
) -> None:
    """As a target that may only say these tokens would: its own draft is right, then."""
    ids = list(range(3, 250, 4))
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"token_ids": ids[::-1]}))
    own = untied(tmp_path / "own") if not tied else target
    model = Path(shutil.copytree(own, tmp_path / "draft"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pard_token": 261}))
    asked = SamplingParams(max_tokens=31, temperature=0.0, ignore_eos=True, allowed_token_ids=ids)
    with load(own, method=method, model=str(model), draft_vocab=str(path)) as llm:
        outputs = llm.generate(["abc", "what"], asked)
        rates = llm.stats()["speculative"]["acceptance_rates"]
        assert rates[0] == 1.0 and (method == "pard" or set(rates) == {1.0})
    with LLM(own, max_model_len=96, threads=1) as plain:
        assert [o.outputs for o in plain.generate(["abc", "what"], asked)] == [o.outputs for o in outputs]


def untied(directory: Path) -> str:
    """The tiny model with a head of its own, of the same numbers."""
    write_checkpoint(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return str(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no list of token_ids"),
        ('{"token_ids": [1, 5000]}', "has 5000, expected token ids below 272"),
        ('{"token_ids": [true]}', "has True, expected token ids"),
        ('{"token_ids": [261]}', "has no token that can be guessed"),
        ("[1]", "expected a JSON object"),
        (None, "is no file"),
    ],
)
def test_a_trimmed_vocabulary_that_is_none_is_refused(
    target: str, tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "ids.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PaceError, match=message):
        load(target, model=draft(tmp_path / "draft"), draft_vocab=str(path))


def test_synthetic_acceptance_says_so(target: str, tmp_path: Path) -> None:
    with load(target, model=draft(tmp_path / "draft"), synthetic_acceptance=[1.0, 0.5, 0.0]) as llm:
        (output,) = llm.generate("abc", SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True))
        stats = llm.stats()["speculative"]
        assert stats["synthetic"] is True
        assert stats["acceptance_rates"][0] == 1.0 and stats["acceptance_rates"][2] == 0.0
        assert 2.0 < stats["mean_acceptance_length"] < 3.0
        assert output.speculative is not None


@pytest.mark.parametrize(
    "rule",
    [
        {"structured_outputs": {"regex": "[ab]{30}"}},
        {"allowed_token_ids": [97, 98, 99]},
        {"bad_words": ["a", "e", "t"]},
        {"min_tokens": 20, "stop_token_ids": list(range(0, 256, 2))},
    ],
)
def test_chance_never_accepts_what_a_request_forbids(
    target: str, tmp_path: Path, rule: dict[str, Any]
) -> None:
    """Every guess would stand; the draft knows nothing of the rule."""
    asked = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, speculative=4, **rule)
    with LLM(target, max_model_len=96, threads=1) as llm:
        (plain,) = llm.generate("abc", asked.clone(speculative="auto"))
    with load(target, model=draft(tmp_path / "draft"), synthetic_acceptance=1.0) as llm:
        (output,) = llm.generate("abc", asked)
        (free,) = llm.generate("abc", SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
        assert llm.stats()["speculative"]["n_accepted_tokens"] > 0 and free.outputs != plain.outputs
    (completion,) = output.outputs
    assert completion.finish_reason == plain.outputs[0].finish_reason
    assert completion.token_ids == plain.outputs[0].token_ids
