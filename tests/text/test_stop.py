"""Stop strings are found however the text is cut, and hold back only what may become one."""

from __future__ import annotations

import random
import time

from pace.text.stop import StopChecker


def stop_reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The match that is complete first; of those that end together, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def test_stop_checker_equals_the_reference_however_the_text_is_cut() -> None:
    rng = random.Random(3)
    for trial in range(2000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(20)))
        stops = [
            "".join(rng.choice("ab") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))
        ]
        include = trial % 2 == 0
        checker = StopChecker(stops, include_in_output=include)
        shown, at = "", 0
        while at < len(text) and checker.matched is None:
            size = rng.randrange(1, 5)
            new = checker.push(text[at : at + size])
            at += size
            shown += new
            assert text.startswith(shown)
        shown += checker.finish()
        assert (shown, checker.matched) == stop_reference(text, stops, include), (text, stops)


def test_only_a_possible_match_is_held_back() -> None:
    checker = StopChecker(["STOP"])
    assert [checker.push(text) for text in ("go", " S", "T", "x", "ST", "OP", "more")] == [
        "go", " ", "", "STx", "", "", "",
    ]  # fmt: skip
    assert checker.matched == "STOP" and checker.finish() == ""
    assert StopChecker([]).push("anything") == "anything"
    assert StopChecker(["ab"], include_in_output=True).push("a") == "a"


def test_matches_before_min_tokens_are_ignored() -> None:
    checker = StopChecker(["ab"])
    assert checker.push("xab", check=False) + checker.push("a", check=False) == "xab"
    assert checker.matched is None
    assert checker.push("b") == "" and checker.matched == "ab"


def test_long_stop_strings_cost_constant_time() -> None:
    checker = StopChecker(["a" * 1000 + "b" * (i + 1) for i in range(20)])
    start = time.perf_counter()
    shown = "".join(checker.push("a") for _ in range(5000))
    assert time.perf_counter() - start < 1
    assert shown + checker.finish() == "a" * 5000
