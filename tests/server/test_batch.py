"""`pace run-batch`: files in OpenAI's format, and going on where a run was ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pace.cli import main
from pace.errors import RequestError
from pace.llm import LLM
from pace.params import SamplingParams
from pace.server.batch import check_requests, repair


def line(number: str, body: dict[str, Any], url: str = "/v1/completions") -> dict[str, Any]:
    return {"custom_id": number, "method": "POST", "url": url, "body": {"model": "demo"} | body}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def read(path: Path) -> dict[str, Any]:
    return {one["custom_id"]: one for one in map(json.loads, path.read_text().splitlines())}


def run(source: Path, target: Path, *argv: str) -> int:
    return main(
        ["run-batch", "-i", str(source), "-o", str(target), "--model", "demo", "--threads", "1", *argv]
    )


GREEDY = {"temperature": 0, "max_tokens": 12}


def test_every_kind_is_answered_once_and_as_the_library_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "Write a loop."}]
    source = write(
        tmp_path / "in.jsonl",
        [
            line("text", {"prompt": "def f(", **GREEDY}),
            line("chat", {"messages": messages, **GREEDY}, "/v1/chat/completions"),
            line("vector", {"input": ["a", "b"]}, "/v1/embeddings"),
            line("response", {"input": "hi", "max_output_tokens": 5}, "/v1/responses"),
            line("bad", {"prompt": "x", "temperature": -1}),
            line("other", {"prompt": "x", "model": "gpt"}),
        ],
    )
    target = tmp_path / "out.jsonl"
    assert run(source, target) == 0
    assert "6 requests answered, 2 of them with an error" in capsys.readouterr().err
    answers = read(target)
    with LLM("demo", threads=1) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=12)
        (text,), (chat,) = llm.generate("def f(", params), llm.chat(messages, params)
        vectors = [one.outputs.embedding.tolist() for one in llm.embed(["a", "b"])]
    bodies = {key: one["response"]["body"] for key, one in answers.items()}
    assert bodies["text"]["choices"][0]["text"] == text.outputs[0].text
    assert bodies["chat"]["choices"][0]["message"]["content"] == chat.outputs[0].text
    assert [one["embedding"] for one in bodies["vector"]["data"]] == vectors
    assert bodies["response"]["object"] == "response" and bodies["bad"]["error"]["param"] == "temperature"
    statuses = {key: one["response"]["status_code"] for key, one in answers.items()}
    assert statuses == dict.fromkeys(answers, 200) | {"bad": 400, "other": 404}
    assert all(set(one) == {"id", "custom_id", "response", "error"} for one in answers.values())
    before = target.read_bytes()
    assert run(source, target) == 0 and target.read_bytes() == before
    assert "6 of 6 requests are answered" in capsys.readouterr().err


def test_a_run_goes_on_behind_half_a_line(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line(str(i), {"prompt": "x", "max_tokens": 2}) for i in range(6)])
    target = tmp_path / "out.jsonl"
    known = json.dumps({"custom_id": "3", "response": "kept as it is"})
    target.write_text(f'{known}\n{{"id": "batch_req_1", "custom_id": "4", "resp')
    assert run(source, target) == 0
    first, *_ = target.read_text().splitlines()
    assert first == known and sorted(read(target)) == list("012345")
    assert len(target.read_text().splitlines()) == 6


def test_a_killed_run_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    """kill -9 in the middle, twice; in the end every request has one answer."""
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}
    source = write(tmp_path / "in.jsonl", [line(str(i), body) for i in range(300)])
    target = tmp_path / "out.jsonl"
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--model", "demo", "--threads", "1"]
    for n, number in ((1, signal.SIGKILL), (60, signal.SIGINT)):
        process = subprocess.Popen([sys.executable, "-m", "pace", *argv], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not target.exists() or target.read_bytes().count(b"\n") < n:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        os.kill(process.pid, number)
        assert process.wait(30) in (-signal.SIGKILL, 130)
    assert run(source, target) == 0
    lines = [json.loads(one) for one in target.read_text().splitlines()]
    assert sorted(int(one["custom_id"]) for one in lines) == list(range(300))
    assert all(one["response"]["status_code"] == 200 for one in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no requests"),
        ("{", "in.jsonl:1: "),
        ('{"custom_id": "a"}', "in.jsonl:1: Object missing required field `method`"),
        (json.dumps(line("a", {}) | {"colour": 1}), "unknown field `colour`"),
        (json.dumps(line("", {})), "custom_id is ''"),
        (json.dumps(line("a", {}) | {"method": "GET"}), "method is 'GET', expected POST"),
        (
            json.dumps(line("a", {}, "/v1/models")),
            "url is '/v1/models', expected one of /v1/chat/completions",
        ),
        (json.dumps(line("a", {"stream": True})), "stream is True"),
        (
            json.dumps(line("a", {})) + "\n\n" + json.dumps(line("a", {})),
            "in.jsonl:3: custom_id 'a' is there twice",
        ),
    ],
)
def test_wrong_lines_are_named_before_anything_runs(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(RequestError) as raised:
        check_requests(tmp_path / "in.jsonl")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_another_file_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("my notes\nmore")
    with pytest.raises(RequestError, match=r"notes\.txt:1: not the answer to a request"):
        repair(other)
    assert other.read_text() == "my notes\nmore"
    source = write(tmp_path / "in.jsonl", [line("a", {"prompt": "x"})])
    assert run(source, source) == 2 and "is input and output" in capsys.readouterr().err
    assert run(source, tmp_path / "nowhere" / "out.jsonl") == 2
