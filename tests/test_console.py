"""Output goes where it should, whatever the standard streams are; a process of its own where descriptors matter."""

from __future__ import annotations

import ast
import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_checkpoint

from pace import cli, console, log
from pace.llm import LLM
from pace.params import SamplingParams

GREEDY = ("--temperature", "0", "--max-tokens", "8", "--threads", "1")


class Mute:
    """What a service or a notebook may put in stderr's place: no isatty, no flush, no encoding."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


class Full(io.StringIO):
    """A disk without room."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("stderr", [None, Mute(), Full(), closed(), object()], ids=lambda s: type(s).__name__)
def test_the_library_needs_no_stderr(model: str, stderr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    with LLM(model, threads=1) as llm:
        params = SamplingParams(max_tokens=2)
        assert len(llm.generate(["a", "b"], params)) == 2
        if not isinstance(stderr, (Mute, object)) or stderr is None:
            assert len(llm.generate(["a", "b"], params, use_tqdm=True)) == 2
    console.err("nobody hears this")
    log.configure("info")
    log.logger.info("nor this")


@pytest.mark.parametrize("stream", [None, Mute(), closed(), object(), io.StringIO()])
def test_what_is_no_terminal(stream: Any) -> None:
    assert not console.is_terminal(stream)


def test_a_full_disk_does_not_end_a_generation_with_a_bar(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    with LLM(model, threads=1, show_progress=True) as llm:
        assert len(llm.generate(["a", "b"], SamplingParams(max_tokens=2), use_tqdm=True)) == 2


def test_anything_may_draw_the_bar(model: str) -> None:
    seen: list[dict[str, Any]] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            seen.append(options)

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            pass

        def update(self) -> None:
            seen.append({})

        def close(self) -> None:
            pass

    with LLM(model, threads=1) as llm:
        llm.generate(["a", "b"], SamplingParams(max_tokens=2), use_tqdm=Bar)
    assert seen[0]["total"] == 2 and len(seen) == 3


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"gr\xf6\xdfe \u4f60 \U0001f389"),
        ("latin-1", r"größe \u4f60 \U0001f389"),
        ("utf-8", "größe 你 🎉"),
    ],
)
def test_no_encoding_loses_text(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, write in (("stdout", console.out), ("stderr", console.err)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, name, stream)
        write("größe 你 🎉")
        assert stream.buffer.getvalue().decode(encoding) == shown + "\n"


def test_stdout_may_be_any_object_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ascii(Mute):
        def write(self, text: str) -> None:
            self.text += text.encode("ascii").decode()

    stream = Ascii()
    monkeypatch.setattr(sys, "stdout", stream)
    console.out("größe")
    assert stream.text == "gr\\xf6\\xdfe\n"


def test_what_can_not_be_printed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closed_too = (closed(), "stdout is closed")
    for stream, message in (
        (None, "stdout is closed"),
        closed_too,
        (Full(), "stdout: No space left on device"),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(console.OutputError, match=message):
            console.out("text")


def test_a_log_call_that_does_not_fit_its_format_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info")
    logging.getLogger("pace").info("%d", "one")
    assert "Logging error" in capsys.readouterr().err


def test_nothing_else_writes_to_the_terminal() -> None:
    """print(file=None) means stdout, and raises in a locale that lacks a character."""
    package = Path(cli.__file__).parent
    for path in package.rglob("*.py"):
        if path.name in ("console.py", "probe_child.py"):  # the latter is a process of its own
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            wrong = isinstance(node, ast.Name) and node.id == "print"
            wrong |= isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
            assert not wrong, f"{path}:{getattr(node, 'lineno', 0)}"


def shell(script: str, model: str, **env: str) -> tuple[int, str, str]:
    """Run a script with `$PACE` and `$MODEL`; exit code, stdout, stderr."""
    source = str(Path(cli.__file__).parents[1])
    values = {"PACE": f"{sys.executable} -m pace.cli", "MODEL": model, "PYTHONPATH": source, **env}
    values["PYTHONUNBUFFERED"] = ""  # set in many containers, it hides what stays in buffers
    done = subprocess.run(
        ["sh", "-c", script], env=os.environ | values, capture_output=True, timeout=60, check=False
    )
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def test_a_closed_stderr_leaves_stdout_to_the_answer(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", model, "--prompt", "a", *GREEDY]) == 0
    answer = capsys.readouterr().out
    run = f"$PACE generate --model $MODEL --prompt a {' '.join(GREEDY)}"
    assert shell(f"{run} 2>&-", model) == (0, answer, "")
    assert shell(f"{run} 2>/dev/full", model) == (0, answer, "")
    assert shell("$PACE generate --fly 2>&-; $PACE generate --model /nowhere --prompt a 2>&-", model) == (
        2,
        "",
        "",
    )


def test_what_a_full_stderr_did_not_take_is_lost_at_exit() -> None:
    """Left in the buffer it made the exit status 120."""
    write = "import sys; from pace import console; sys.stderr.write('half a line')"
    for settle, status in (("console.settle_stderr()", 0), ("pass", 120)):
        script = f'{sys.executable} -c "{write}; {settle}" 2>/dev/full'
        assert shell(script, "") == (status, "", "")


def test_a_failed_import_is_no_answer(model: str) -> None:
    main = f"{sys.executable} -c 'import sys, _pace_main; sys.exit(_pace_main.main())'"
    code, out, err = shell(f"PACE_ISA=none {main}", model)
    assert (code, out) == (2, "") and "PACE_ISA" in err and err.count("\n") == 1
    assert shell(f"PACE_ISA=none {main} 2>&-", model) == (2, "", "")


def test_a_stdout_that_takes_nothing_is_said_in_one_line(model: str) -> None:
    run = f"$PACE generate --model $MODEL --prompt a --no-stats {' '.join(GREEDY)}"
    for where, message in ((">/dev/full", "No space left on device"), (">&-", "stdout is closed")):
        code, _, err = shell(f"{run} {where}", model)
        assert code == 1 and message in err and err.count("\n") == 1


def test_a_locale_without_letters_takes_and_gives_any_text(model: str) -> None:
    posix = {
        "LC_ALL": "POSIX",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "ascii:strict",
    }
    run = f"$PACE generate --model $MODEL --echo --no-stats {' '.join(GREEDY)} --prompt"
    code, out, err = shell(f"{run} 'größe'", model, **posix)
    assert (code, err) == (0, "") and out.startswith(r"gr\xf6\xdfe") and out.isascii()
    code, out, err = shell(run + r" $(printf '\377')", model, **posix)
    assert code == 2 and "is not UTF-8" in err


def test_a_closed_stdin_is_no_input(model: str) -> None:
    code, _, err = shell("$PACE generate --model $MODEL 0<&-", model)
    assert code == 2 and "stdin is closed" in err and err.count("\n") == 1
    assert shell("$PACE chat --model $MODEL --no-stats 0<&-", model) == (0, "", "")
