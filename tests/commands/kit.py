"""What tests of commands share: a stdin, a command run in this process, and what it should print."""

from __future__ import annotations

import io

import pytest

from pace import cli
from pace.llm import LLM
from pace.params import SamplingParams

GREEDY = ("--temperature", "0", "--max-tokens", "8", "--threads", "1")


class Stdin(io.TextIOWrapper):
    """A pipe, or with `tty` a terminal."""

    def __init__(self, text: str | bytes, tty: bool = False) -> None:
        super().__init__(io.BytesIO(text if isinstance(text, bytes) else text.encode()), encoding="utf-8")
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def expected(model: str, prompt: str, n: int) -> str:
    with LLM(model, threads=1) as llm:
        return llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=n))[0].outputs[0].text


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
