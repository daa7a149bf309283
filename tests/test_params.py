"""SamplingParams: every field is checked, and knows whether the caller gave it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from pace.errors import RequestError
from pace.params import MAX_LOGPROBS, SamplingParams

NAN, INF = float("nan"), float("inf")


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.logprobs, params.seed) == (16, 0, None, None)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert params.detokenize and params.skip_special_tokens
    assert not params.ignore_eos and not params.include_stop_str_in_output
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
        *[("logprobs", value) for value in (-1, MAX_LOGPROBS + 1, True, 1.0)],
        *[("ignore_eos", value) for value in (1, None, "yes")],
        *[("detokenize", 0), ("skip_special_tokens", 1), ("include_stop_str_in_output", None)],
    ],
)
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


def test_stop_strings_need_text() -> None:
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_unknown_fields_and_positions_are_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(temprature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[call-arg]


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


def test_copies_keep_explicit() -> None:
    params = SamplingParams(top_k=3)
    for twin in (copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert twin == params and twin.explicit == {"top_k"}


def test_check_vocab() -> None:
    params = SamplingParams(stop_token_ids=[0, 99])
    params.check_vocab(100)
    with pytest.raises(RequestError, match="99"):
        params.check_vocab(99)


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 2.0  # type: ignore[misc]
