"""SamplingParams: every field is checked, and knows whether the caller gave it."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pace.errors import RequestError
from pace.outputs import CompletionOutput, Logprob, RequestOutput
from pace.params import RequestOutputKind, SamplingParams

NAN, INF = float("nan"), float("inf")


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.logprobs, params.seed) == (16, 0, None, None)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert params.detokenize and params.skip_special_tokens
    assert not params.ignore_eos and not params.include_stop_str_in_output
    assert (params.n, params.prompt_logprobs, params.logit_bias, params.allowed_token_ids) == (
        1,
        None,
        None,
        None,
    )
    assert params.output_kind is RequestOutputKind.CUMULATIVE and not params.bad_words
    assert {kind.name: kind.value for kind in RequestOutputKind} == {
        "CUMULATIVE": 0,
        "DELTA": 1,
        "FINAL_ONLY": 2,
    }
    assert params.explicit == frozenset()
    assert not params.greedy


def test_forms_are_normalised() -> None:
    np_ids: Any = [np.int64(3)]
    params = SamplingParams(temperature=0, top_k=-1, seed=-1, stop="x", stop_token_ids=np_ids)
    assert params.greedy and params.top_k == 0 and params.seed is None
    assert params.stop_strings == ("x",) and params.stop_token_ids == (3,)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop=None).stop_strings == ()
    assert SamplingParams(temperature=9e-6).greedy and not SamplingParams(temperature=1e-4).greedy
    np_values: dict[str, Any] = {"temperature": np.float32(0.5), "max_tokens": np.int32(5)}
    assert type(SamplingParams(**np_values).temperature) is float
    assert type(SamplingParams(**np_values).max_tokens) is int
    assert SamplingParams(max_tokens=None).max_tokens is None
    np_bias: Any = {np.int32(7): np.float32(-1.5), 0: 100}
    assert SamplingParams(logit_bias=np_bias).logit_bias == {7: -1.5, 0: 100.0}
    assert SamplingParams(bad_words=["a", " b"]).bad_words == ("a", " b")
    assert SamplingParams(allowed_token_ids=[3, 3, 0]).allowed_token_ids == (3, 3, 0)
    assert SamplingParams(n=128, prompt_logprobs=0, output_kind=RequestOutputKind.DELTA).n == 128


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-0.1, NAN, INF, 101, True, "1", None, [1], 10**400)],
        *[("top_p", value) for value in (0, -1, 1.01, NAN, True)],
        *[("top_k", value) for value in (-2, 1.5, True, "5", 1 << 31, None)],
        *[("min_p", value) for value in (-0.1, 1.1, NAN)],
        *[("presence_penalty", value) for value in (-2.1, 2.1, NAN, INF)],
        *[("frequency_penalty", value) for value in (-2.1, 2.1, -INF)],
        *[("repetition_penalty", value) for value in (0, -1, 101, NAN)],
        *[("seed", value) for value in (1.0, True, 1 << 63, "1")],
        *[("stop", value) for value in ("", [""], [1], 5, ["x"] * 65, ["x" * 1025], {"a": 1})],
        *[("stop_token_ids", value) for value in ([-1], [1.0], [True], "12", 5, [1 << 31], [1] * 1025)],
        *[("max_tokens", value) for value in (0, -1, 1.5, True, 1 << 31)],
        *[("min_tokens", value) for value in (-1, 17, None, True)],
        *[("logprobs", value) for value in (-2, 1 << 31, False, 1.0)],
        *[("prompt_logprobs", value) for value in (-2, 1 << 31, False, 1.0)],
        *[("n", value) for value in (0, -1, 129, True, 2.0, "2", None)],
        *[
            ("logit_bias", value)
            for value in (
                [1],
                "1",
                {"x": 1},
                {"-1": 1},
                {"": 1},
                {"1.0": 1},
                {"٣": 1},
                {"1" * 99: 1},
                {"1": 1, 1: 1},
            )
        ],
        *[("logit_bias", value) for value in ({-1: 1.0}, {1 << 31: 1.0}, {True: 1.0}, {1.0: 1})],
        *[("logit_bias", {1: value}) for value in (NAN, "1", None, True, 10**400)],
        ("logit_bias", dict.fromkeys(range((1 << 18) + 1), 0.0)),
        *[("bad_words", value) for value in ("word", 5, [""], [1], ["x" * 1025], ["x"] * 1025, {"a": 1})],
        *[("allowed_token_ids", value) for value in ([], [-1], [1.5], [True], "12", 5, [1 << 31])],
        ("allowed_token_ids", [0] * ((1 << 18) + 1)),
        *[("output_kind", value) for value in (0, 1, "delta", None)],
        *[("ignore_eos", value) for value in (1, None, "yes")],
        *[("detokenize", 0), ("skip_special_tokens", 1), ("include_stop_str_in_output", None)],
        ("spaces_between_special_tokens", 1),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value)[:30],
)
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


def test_logit_bias_as_json_has_it() -> None:
    params = SamplingParams(logit_bias={"7": 250, 8: -1e9, "0009": INF, 3: -INF, 4: 1})  # type: ignore[dict-item]  # as JSON has it
    assert params.logit_bias == {7: 100.0, 8: -100.0, 9: 100.0, 3: -100.0, 4: 1.0}
    assert json.loads(json.dumps(dict(params.logit_bias or {}))) == {
        "7": 100.0,
        "8": -100.0,
        "9": 100.0,
        "3": -100.0,
        "4": 1.0,
    }
    assert SamplingParams(logprobs=True, prompt_logprobs=True) == SamplingParams(
        logprobs=1, prompt_logprobs=1
    )


def test_stop_strings_need_text() -> None:
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_contradictions_are_refused() -> None:
    with pytest.raises(RequestError, match="n is 2 with temperature 0"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(RequestError, match="n is 3 with temperature 0"):
        SamplingParams(n=3).merged_with({"temperature": 0.0})
    assert SamplingParams(n=2, temperature=1e-4).n == 2
    stops: dict[str, Any] = {"allowed_token_ids": [1, 2], "stop_token_ids": [1, 2, 3]}
    with pytest.raises(RequestError, match="min_tokens is 1, but every id of allowed_token_ids is a stop id"):
        SamplingParams(min_tokens=1, **stops)
    assert SamplingParams(**stops).min_tokens == 0


def test_messages_name_value_and_range() -> None:
    for values, message in (
        ({"n": 0}, "n is 0, expected an integer from 1 to 128"),
        ({"logit_bias": {5: "x"}}, "logit_bias of 5 is 'x', expected a number from -inf to inf"),
        (
            {"logit_bias": {"x": 1}},
            "logit_bias key is 'x', expected an integer from 0 to 2147483647",
        ),
        ({"bad_words": "x"}, "bad_words is 'x', expected a list of strings"),
        ({"bad_words": [""]}, "bad_words has '', expected strings of 1 to 1024 characters"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty, expected at least one id; None allows all"),
        ({"prompt_logprobs": -2}, "prompt_logprobs is -2, expected an integer from -1 to 2147483647"),
        ({"output_kind": 1}, "output_kind is 1, expected RequestOutputKind.CUMULATIVE, DELTA or FINAL_ONLY"),
    ):
        with pytest.raises(RequestError) as error:
            SamplingParams(**values)
        assert str(error.value) == message


def test_the_wrong_element_is_named() -> None:
    for values, message in (
        ({"stop_token_ids": [5, "x"]}, "stop_token_ids[1] is 'x'"),
        ({"allowed_token_ids": [1.5]}, "allowed_token_ids[0] is 1.5"),
        ({"stop": ["a", 1]}, "stop has 1,"),
        ({"stop": {"a": 1}}, "stop is {'a': 1}, expected"),
        ({"temperature": [0.5]}, "temperature is [0.5], expected"),
    ):
        with pytest.raises(RequestError) as error:
            SamplingParams(**values)
        assert message in str(error.value)


def test_unknown_fields_and_positions_are_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(temprature=1)  # type: ignore[call-arg]  # wrong on purpose
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[call-arg, arg-type]  # wrong on purpose


def test_explicit_wins_over_defaults() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "max_tokens": 99}
    params = SamplingParams(temperature=1.0)  # the default value, but given
    merged = params.merged_with(defaults)
    assert (merged.temperature, merged.top_p, merged.max_tokens) == (1.0, 0.9, 99)
    assert merged.explicit == {"temperature"}
    assert merged.merged_with({"top_p": 0.5}).top_p == 0.5
    assert params.top_p == 1.0
    assert SamplingParams().merged_with({}) == SamplingParams()


def test_bad_defaults_are_refused() -> None:
    with pytest.raises(RequestError, match="top_q"):
        SamplingParams().merged_with({"top_q": 1})
    with pytest.raises(RequestError, match="min_tokens is 10"):
        SamplingParams(min_tokens=10).merged_with({"max_tokens": 5})


FULL: dict[str, Any] = {
    "n": 3,
    "top_k": 3,
    "logit_bias": {4: -1.0},
    "bad_words": ["x"],
    "allowed_token_ids": [4, 5],
    "prompt_logprobs": 2,
    "output_kind": RequestOutputKind.DELTA,
}


def test_copies_are_equal_and_keep_explicit() -> None:
    params = SamplingParams(**FULL)
    pickled = [
        pickle.loads(pickle.dumps(params, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ]
    for twin in (
        copy.copy(params),
        copy.deepcopy(params),
        params.clone(),
        dataclasses.replace(params),
        *pickled,
    ):
        assert twin == params and hash(twin) == hash(params) and twin.explicit == set(FULL)
        assert vars(twin) == vars(params)
    assert params != SamplingParams(**{**FULL, "logit_bias": {4: 1.0}})
    assert len({params, SamplingParams(**FULL), SamplingParams()}) == 2


@pytest.mark.parametrize("change", [SamplingParams.clone, dataclasses.replace], ids=["clone", "replace"])
def test_a_changed_copy_leaves_unset_fields_to_the_checkpoint(change: Callable[..., SamplingParams]) -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "max_tokens": 99}
    params = change(SamplingParams(top_k=5), top_p=1.0)
    assert params.explicit == {"top_k", "top_p"}
    merged = params.merged_with(defaults)
    assert (merged.temperature, merged.top_p, merged.top_k, merged.max_tokens) == (0.6, 1.0, 5, 99)
    again = change(merged, max_tokens=None)  # also of one that has a checkpoint's values
    assert again.explicit == {"top_k", "top_p", "max_tokens"}
    assert again.merged_with({"temperature": 0.3}).temperature == 0.3
    with pytest.raises(RequestError, match="top_p is 2"):
        change(params, top_p=2)


def test_an_unset_number_is_a_number() -> None:
    params = SamplingParams()
    assert repr(params.temperature) == "1.0" and repr(params.max_tokens) == "16"
    assert json.dumps({"t": params.temperature, "m": params.max_tokens}) == '{"t": 1.0, "m": 16}'
    assert (
        SamplingParams(temperature=params.temperature).explicit == frozenset()
    )  # handed on, still nobody's choice
    assert pickle.loads(pickle.dumps(params, 0)).explicit == frozenset()


def _describe(params: SamplingParams, output: RequestOutput) -> tuple[SamplingParams, RequestOutput]:
    assert params == SamplingParams(**FULL)
    return params, output


def test_they_travel_to_a_spawned_process() -> None:
    params = SamplingParams(**FULL)
    entries = {1: Logprob(-0.5, 1, "a")}
    output = RequestOutput("id", None, [1], [CompletionOutput(0, "a", [1], -0.5, [entries])])
    output.prompt_logprobs, output.num_cached_tokens = [None, entries], 7
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_describe, (params, output)) == (params, output)


def test_nothing_inside_can_be_changed() -> None:
    bias, words = {4: -1.0}, ["x"]
    params = SamplingParams(logit_bias=bias, bad_words=words)
    bias[5], words[0] = 1.0, "y"
    assert params.logit_bias == {4: -1.0} and params.bad_words == ("x",)
    with pytest.raises(TypeError):
        params.logit_bias[4] = 2.0  # type: ignore[index]  # wrong on purpose


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop_token_ids", [0, 99]), ("allowed_token_ids", [99, 0]), ("logit_bias", {0: 1.0, 99: 1.0})],
)
def test_check_vocab(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    params.check_vocab(100)
    with pytest.raises(RequestError, match=f"{name} has 99, expected ids below the vocabulary's 99"):
        params.check_vocab(99)
    SamplingParams().check_vocab(1)


def test_parameters_travel_as_a_dictionary() -> None:
    params = SamplingParams(top_p=0.5, logit_bias={4: -1.0})
    twin = SamplingParams(**dataclasses.asdict(params))
    assert twin == params and twin.explicit == params.explicit == {"top_p", "logit_bias"}
    assert repr(params.logit_bias) == "{4: -1.0}"


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 2.0  # type: ignore[misc]  # wrong on purpose
