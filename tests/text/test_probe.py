"""An unusual tokenizer is tried in a child process: what is harmless loads with a warning, what is not is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from text.kit import byte_level, load, regex_split, replace_twice, save
from tokenizers import Regex, decoders, normalizers

from pace.errors import RequestError, TokenizerError
from pace.text import probe, probe_child


def file_with(**changes: Any) -> bytes:
    """The bytes of a tokenizer with some of its parts changed; `model` is merged into the model's."""
    values = json.loads(byte_level().to_str())
    values["model"].update(changes.pop("model", {}))
    return json.dumps(values | changes).encode()


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


HARMFUL = {
    "exponential": (regex_split("(a|aa)+$"), "fails on"),
    "quadratic": (regex_split(r"\p{L}+\d|\p{L}"), "takes"),
    "normalizer": (
        lambda rust: setattr(rust, "normalizer", normalizers.Replace(Regex("(a+)+$"), "b")),
        "fails on",
    ),
    "growth": (lambda rust: setattr(rust, "normalizer", normalizers.Replace("a", "b" * 1000)), "tokens of"),
    "prefix": (lambda rust: setattr(rust, "normalizer", normalizers.Prepend("x" * 10**4)), "long text"),
    "decoder": (lambda rust: setattr(rust, "decoder", decoders.Replace("a", "b" * 1000)), "decodes"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harm_is_refused(tmp_path: Path, name: str) -> None:
    edit, words = HARMFUL[name]
    rust = byte_level()
    edit(rust)
    save(tmp_path, rust)
    with pytest.raises(TokenizerError, match=words) as error:
        load(tmp_path)
    assert "trust_tokenizer" in str(error.value) and "\n" not in str(error.value)
    assert load(tmp_path, trust=True).vocab_size == 512


def test_explosive_replacements_are_refused(tmp_path: Path) -> None:
    rust = byte_level()
    replace_twice(40)(rust)
    with pytest.raises(TokenizerError, match=r"ends the process|too long"):
        load(save(tmp_path, rust))


def test_unknown_but_harmless_patterns_load_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rust = byte_level()
    regex_split(r"\p{Lu}?\p{Ll}+|\p{N}{1,2}|\s+|[^\s\p{L}\p{N}]+")(rust)
    tokenizer = load(save(tmp_path, rust))
    assert tokenizer.decode(tokenizer.encode("Hello World 12345")) == "Hello World 12345"
    assert "did no harm" in caplog.text and "Split with the pattern" in caplog.text


def test_what_aborts_the_library_does_not_abort_us(tmp_path: Path) -> None:
    """tokenizers 0.23.3 ends the process in a destructor that panics, while it reads this."""
    values = {
        "type": "BPE", "continuing_subword_prefix": "#", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4},
        "merges": [["a", "b"], ["ab", "c"], ["a", "中"]],
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_bytes(file_with(model=values))
    with pytest.raises(TokenizerError, match=r"SIGABRT|reading it fails|cannot be read"):
        load(tmp_path)


def test_trust_skips_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pace.text.tokenizer_json.probe", lambda data: pytest.fail("probed"))
    rust = byte_level()
    load(save(tmp_path, rust))  # ordinary
    regex_split(r"\w+|\W+")(rust)
    load(save(tmp_path, rust), trust=True)


def test_panics_become_errors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rust = byte_level()
    rust.normalizer = normalizers.Replace(Regex("(a+)+$"), "b")
    tokenizer = load(save(tmp_path, rust), trust=True)
    with pytest.raises(RequestError, match="tokenizer failed"):
        tokenizer.encode("a" * 40 + "!")
    capfd.readouterr()  # the Rust library prints the panic
    assert tokenizer.encode("x!")


# ---- the child process


def test_the_child_starts_from_threads_with_odd_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook or a service: no stdin, no stdout, another thread."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    results: list[str | None] = []
    data = file_with(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                                    "invert": False})  # fmt: skip
    thread = threading.Thread(target=lambda: results.append(probe.probe(data)))
    thread.start()
    thread.join()
    assert results[0] is not None and "fails on" in results[0]


def test_a_parent_that_blocks_the_timers_signal_still_has_an_answer() -> None:
    normalizers = [replace({"String": "a"}, "aa")] * 40
    data = file_with(normalizer={"type": "Sequence", "normalizers": normalizers})
    old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    try:
        harm = probe.probe(data)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    assert harm is not None and ("too long" in harm or "ends the process" in harm)


@pytest.mark.parametrize("executable", ["", None, "/usr/bin/editor", "/nowhere/python3", sys.executable])
def test_only_a_python_is_started(monkeypatch: pytest.MonkeyPatch, executable: str | None) -> None:
    """Where Python is embedded, sys.executable may be the program that embeds it."""
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "_base_executable", executable, raising=False)
    command = probe._command()
    assert command is not None and Path(command[0]).name.startswith("python")
    code = "import sys; print(*sys.version_info[:2])"
    version = subprocess.run(
        [command[0], "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert version == [str(part) for part in sys.version_info[:2]]


def test_no_interpreter_is_a_refusal_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_interpreter", lambda: None)
    rust = byte_level()
    regex_split(r"\w+|\W+")(rust)
    with pytest.raises(TokenizerError, match=r"no Python interpreter.*trust_tokenizer"):
        load(save(tmp_path, rust))


@pytest.mark.parametrize(
    ("output", "code", "words", "slow"),
    [
        (b"", 1, "can't be tried", False),
        (b'{"doing": "reading the file"}\n', -6, "SIGABRT", False),
        (b'{"doing": "reading the file"}\n', -27, "too long", True),
        (b'{"doing": "reading the file"}\n', 0, "code 0", False),  # a parent that ignores SIGCHLD
        (b'{"doing": "x"}\n{"harm": "it bites", "slow": false}\n', 0, "it bites", False),
        (b'{"doing": "x"}\n{"harm": "it crawls", "slow": true}\n', 0, "it crawls", True),
        (b'{"doing": "x"}\n{"harm": null, "slow": false}\n', 0, None, False),
    ],
)
def test_the_last_line_is_the_verdict(output: bytes, code: int, words: str | None, slow: bool) -> None:
    harm, is_slow = probe._verdict(output, code)
    assert harm is None if words is None else words in str(harm)
    assert is_slow == slow


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([("it takes 0.19 s", True), (None, False)], None),  # the machine stood still
        ([("it takes 0.19 s", True), ("it takes 0.20 s", True)], "it takes 0.20 s"),
        ([("it ends the process", False)], "it ends the process"),
        ([(None, False)], None),
    ],
)
def test_what_is_slow_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, found: list[tuple[str | None, bool]], verdict: str | None
) -> None:
    children = iter(found)
    monkeypatch.setattr(probe, "_try", lambda data: next(children))
    assert probe.probe(b"{}") == verdict
    assert not list(children)


class Refused(Exception):
    """What ends the child."""


def refuse(harm: str | None, *, slow: bool = False) -> None:
    raise Refused(harm, slow)


@pytest.mark.parametrize("n_slow", [1, probe_child.N_TRIALS])
@pytest.mark.parametrize("quadratic", [False, True])
def test_growth_is_measured_again(monkeypatch: pytest.MonkeyPatch, n_slow: int, quadratic: bool) -> None:
    """The first times of each long text are ten times what they should be: alone they prove nothing."""
    n_timed: dict[int, int] = {}

    def timed(rust: object, shape: tuple[str, str], n_chars: int) -> float:
        n_timed[n_chars] = n_timed.get(n_chars, 0) + 1
        seconds = 4e-6 * n_chars * (n_chars / 4096 if quadratic else 1)
        return seconds * (10 if n_chars == 65536 and n_timed[n_chars] <= n_slow else 1)

    monkeypatch.setattr(probe_child, "try_text", timed)
    monkeypatch.setattr(probe_child, "end", refuse)
    monkeypatch.setattr(probe_child, "units", lambda rust: ["a"])
    monkeypatch.setattr(probe_child, "BUDGET_S", float("inf"))
    if quadratic:
        with pytest.raises(Refused, match="longer the longer the text"):
            probe_child.try_all(None)
    else:
        probe_child.try_all(None)


@pytest.mark.parametrize("n_slow", [1, probe_child.N_TRIALS])
def test_slow_texts_are_timed_again(monkeypatch: pytest.MonkeyPatch, n_slow: int) -> None:
    clock = iter([time for trial in range(n_slow) for time in (10 * trial, 10 * trial + 5)] + [100, 100.001])
    monkeypatch.setattr("pace.text.probe_child.time.process_time", lambda: next(clock))

    monkeypatch.setattr(probe_child, "end", refuse)
    if n_slow == probe_child.N_TRIALS:
        with pytest.raises(Refused, match=r"it takes 5\.00 s"):
            probe_child.try_text(byte_level(), ("a", ""), 64)
    else:
        assert probe_child.try_text(byte_level(), ("a", ""), 64) < 0.01


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"(a|aa)+$", {"a", "aa"}),
        (r"\p{Lu}[\p{L}\p{M}]+", {"A", "中", "\u0301"}),
        (r"[^\r\n\p{N}]?\s", {"\r", "\n", "1", " "}),
        (r"(?i:'s|'re)", {"'", "s", "re", "'re"} - {"re"}),
        (r"\u4e00-\x{9fa5}", {"一", "龥"}),
    ],
)
def test_hostile_texts_are_made_of_what_the_pattern_names(pattern: str, named: set[str]) -> None:
    assert named <= set(probe_child.units_of(pattern))


def test_every_part_of_a_tokenizer_is_tried() -> None:
    rust = tokenizers.Tokenizer.from_str(
        file_with(normalizer=replace({"String": "ß"}, "ss"), decoder=replace({"Regex": "ж+"}, "")).decode()
    )
    assert {"ß", "ss", "ж", "'s"} <= set(probe_child.units(rust))
