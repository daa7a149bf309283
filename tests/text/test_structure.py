"""Grammars over a small tokenizer: what may come next, and that guesses are cut where they leave it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from pace.errors import PaceError, RequestError
from pace.structured_outputs import MAX_GRAMMAR, StructuredOutputsParams
from pace.text import structure
from pace.text.structure import Grammars, Mask, Matcher, lark_of
from pace.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

VOCAB, EOS = 512, 1
GROWING = lark_of(StructuredOutputsParams(regex=r"(.|\n)*a(.|\n){30}b(.|\n){100}c"))
"""Nearly every token that it reads leads to states of its own."""


@pytest.fixture
def grammars(gpt: Tokenizer) -> Grammars:
    return Grammars(gpt, VOCAB, {EOS})


def allowed(mask: Mask) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB]).tolist())


def ids(gpt: Tokenizer, text: str) -> list[int]:
    return gpt.encode(text, add_special_tokens=False)


def follow(matcher: Matcher, tokens: list[int]) -> None:
    for token in tokens:
        assert token in allowed(matcher.mask())
        matcher.accept(token)


@pytest.mark.parametrize(
    ("params", "good", "bad"),
    [
        ({"choice": ["yes", 'n"o\n']}, 'n"o\n', "maybe"),
        ({"regex": "[ab]+/c"}, "abba/c", "abba\\/c"),
        ({"regex": "a\\/b"}, "a/b", "a\\/b"),
        ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}, '{"a": 1}', '{"b": 1}'),
        ({"json": '{"enum": ["x", 5]}'}, "5", "6"),
        ({"json": True}, "[1]", "oops"),
        ({"json_object": True}, '{"z": null}', "[1]"),
        ({"grammar": 'start: "a" b\nb: "b" | "{" b "}"'}, "a{{b}}", "a{b"),
        ({"grammar": 'root ::= "a" b\nb ::= "b" | "c"'}, "ac", "ad"),
    ],
)  # fmt: skip
def test_masks_allow_what_fits_and_the_end_where_it_is_whole(
    gpt: Tokenizer, grammars: Grammars, params: dict[str, Any], good: str, bad: str
) -> None:
    lark = lark_of(StructuredOutputsParams(**params))
    matcher = grammars.compile(lark)
    assert EOS not in allowed(matcher.mask()) and not matcher.is_done
    follow(matcher, ids(gpt, good))
    assert EOS in allowed(matcher.mask())
    matcher.accept(EOS)
    assert matcher.is_done
    matcher = grammars.compile(lark)
    tokens = [*ids(gpt, bad), EOS]
    n = matcher.validate(tokens)
    assert n < len(tokens)
    follow(matcher, tokens[:n])
    assert tokens[n] not in allowed(matcher.mask())
    with pytest.raises(PaceError, match="the output's grammar can't go on"):
        matcher.accept(tokens[n])


def test_masks_ahead_are_those_of_the_way_and_change_nothing(gpt: Tokenizer, grammars: Grammars) -> None:
    lark = lark_of(StructuredOutputsParams(regex="(the|quick|fox)+!"))
    draft = ids(gpt, "thequick#fox!")
    matcher = grammars.compile(lark)
    masks = [allowed(mask) for mask in matcher.masks(draft)]
    n = matcher.validate(draft)
    assert 0 < n < len(draft) and len(masks) == n + 1
    walker = grammars.compile(lark)
    for token, mask in zip(draft, masks, strict=False):
        assert allowed(walker.mask()) == mask
        if token in mask:
            walker.accept(token)
    assert allowed(matcher.mask()) == masks[0] and len(matcher.masks(draft)) == n + 1


def test_matchers_of_one_grammar_are_apart(gpt: Tokenizer, grammars: Grammars) -> None:
    lark = lark_of(StructuredOutputsParams(choice=["the", "fox"]))
    one, other = grammars.compile(lark), grammars.compile(lark)
    before = allowed(other.mask())
    follow(one, ids(gpt, "the"))
    assert one.is_done and not other.is_done and allowed(other.mask()) == before


def test_states_that_others_have_found_fail_nobody(gpt: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar's uses share its states and their limit: each has the masks that it has alone, whoever came before."""
    monkeypatch.setitem(structure._LIMITS, "max_lexer_states", 300)
    n_compiled = 0
    compile_anew = Grammars._compile

    def compile_and_count(self: Grammars, lark: str) -> object:
        nonlocal n_compiled
        n_compiled += 1
        return compile_anew(self, lark)

    def walk(matcher: Matcher, seed: int) -> list[bytes]:
        rng, seen = np.random.default_rng(seed), []
        for _ in range(40):
            mask = matcher.mask()
            seen.append(mask.tobytes())
            if seed % 2:  # as with speculation: behind each guess, and back
                seen += [one.tobytes() for one in matcher.masks([int(rng.choice(sorted(allowed(mask))))])]
            matcher.accept(int(rng.choice(sorted(allowed(mask) - {EOS}))))
        return seen

    alone = [walk(Grammars(gpt, VOCAB, {EOS}).compile(GROWING), seed) for seed in range(8)]
    monkeypatch.setattr(Grammars, "_compile", compile_and_count)
    shared = Grammars(gpt, VOCAB, {EOS})
    assert [walk(shared.compile(GROWING), seed) for seed in range(8)] == alone
    assert n_compiled > 1, "nobody came to the limit"


def test_a_grammar_that_one_use_fills_with_states_ends_it(
    gpt: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(structure._LIMITS, "max_lexer_states", 300)
    matcher = Grammars(gpt, VOCAB, {EOS}).compile(GROWING)
    rng = np.random.default_rng(0)
    with pytest.raises(PaceError, match="too many states"):
        for _ in range(2000):
            matcher.accept(int(rng.choice(sorted(allowed(matcher.mask()) - {EOS}))))


def test_mask_has_a_bit_for_every_column(gpt: Tokenizer) -> None:
    """Columns beyond the tokenizer's, and widths that are no multiple of 32."""
    for width in (511, 512, 513):
        mask = Grammars(gpt, width, {EOS}).compile("start: /(.|\\n)*/").mask()
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert len(mask) == (width + 31) // 32 and not bits[401:].any()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"json": {"type": "foo"}}, "Invalid type: foo"),
        ({"json": {"$ref": "http://example.com/a"}}, "can't be compiled"),
        ({"json": False}, "can't be compiled"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "can't be compiled"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"grammar": "root ::= ("}, "no GBNF"),
        ({"regex": "((a{0,100}){0,100}){0,100}b{1000}{1000}"}, ""),
    ],
)
def test_a_grammar_that_can_not_be_is_a_request_error(
    grammars: Grammars, params: dict[str, Any], message: str
) -> None:
    try:
        matcher = grammars.compile(lark_of(StructuredOutputsParams(**params)))
    except RequestError as error:
        assert message in str(error) and len(str(error)) < 400
    else:
        assert not message
        matcher.mask()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "has nothing, expected exactly one"),
        ({"json": {}, "regex": "a"}, "has json, regex"),
        ({"jsn": {}}, "has 'jsn', expected one of json"),
        ("json", "expected StructuredOutputsParams"),
        ({"json": "{"}, "is no JSON"),
        ({"json": 5}, "json is 5"),
        ({"json": {"a": float("nan")}}, "is no JSON"),
        ({"json": {"a": object()}}, "is no JSON"),
        ({"regex": 5}, "regex is 5, expected a text"),
        ({"regex": ""}, "expected a text"),
        ({"choice": []}, "expected a list of 1 to"),
        ({"choice": ["a", 5]}, "choice has 5"),
        ({"choice": "ab"}, "choice is 'ab'"),
        ({"json_object": 5}, "json_object is 5"),
        ({"grammar": "a" * (MAX_GRAMMAR + 1)}, f"has {MAX_GRAMMAR + 1} characters"),
    ],
)
def test_wrong_parameters_are_named(value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        StructuredOutputsParams.parse(value)


def test_deep_schemas_are_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match=r"no JSON|can't be compiled"):
        grammars.compile(lark_of(StructuredOutputsParams(json=schema)))


def test_without_the_package_the_extra_is_named(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'pace\[structured\]'"):
        grammars.compile("start: /a/")
