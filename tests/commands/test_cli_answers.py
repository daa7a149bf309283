"""`pace generate` and `pace chat` in this process: where prompts come from, what is printed, histories."""

from __future__ import annotations

import codecs
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands.kit import GREEDY, Stdin, expected, run

from pace import cli
from pace.commands import generate, options
from pace.errors import RequestError
from pace.llm import LLM


def test_generate_prints_the_completion_and_its_speed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", "--model", model, "--prompt", "hello", *GREEDY)
    assert (code, out) == (0, expected(model, "hello", 8) + "\n")
    plan, speed = err.splitlines()
    assert plan.startswith("[memory: weights ") and "blocks of" in plan
    assert "5 prompt tokens, 8 new tokens" in speed and "tokens/s" in speed
    code, out, err = run(
        capsys, "generate", "--model", model, "--prompt", "hello", *GREEDY, "--no-stats", "--echo"
    )
    assert (code, out, err) == (0, "hello" + expected(model, "hello", 8) + "\n", "")


def test_generate_json_from_every_source(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("from a file\n")
    monkeypatch.setattr(sys, "stdin", Stdin("from stdin\n"))
    argv = ["generate", "--model", model, *GREEDY, "--json", "--no-stats", "--logprobs", "2"]
    argv += ["--prompt", "given", "--prompt", "-", "--prompt-file", str(tmp_path / "prompt.txt")]
    code, out, _ = run(capsys, *argv)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["prompt"] for line in lines] == ["given", "from stdin", "from a file"]
    assert [line["text"] for line in lines] == [expected(model, line["prompt"], 8) for line in lines]
    assert all(len(line["logprobs"]) == len(line["token_ids"]) == 8 for line in lines)


def test_several_prompts_and_piped_stdin(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, err = run(capsys, "generate", "--model", model, "--prompt", "a", "--prompt", "b", *GREEDY)
    assert out == f"--- 0\n{expected(model, 'a', 8)}\n--- 1\n{expected(model, 'b', 8)}\n"
    assert "tokens/s" in err
    monkeypatch.setattr(sys, "stdin", Stdin("a\n"))
    assert run(capsys, "generate", "--model", model, *GREEDY)[1] == expected(model, "a", 8) + "\n"


def test_without_a_seed_every_run_is_another(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "generate",
        "--model",
        model,
        "--prompt",
        "a",
        "--max-tokens",
        "12",
        "--ignore-eos",
        "--threads",
        "1",
    ]
    first, second = run(capsys, *argv), run(capsys, *argv)
    assert first[1] != second[1]
    seed = first[2].rpartition("seed ")[2].rstrip("]\n")
    assert run(capsys, *argv, "--seed", seed)[1] == first[1]
    *_, err = run(capsys, *argv, "--temperature", "0")
    assert "seed" not in err  # nothing is drawn
    _, out, _ = run(capsys, *argv, "--json")
    assert run(capsys, *argv, "--json", "--seed", str(json.loads(out)["seed"]))[1] == out


def test_a_chat_without_a_seed_draws_one_for_each_answer(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["chat", "--model", model, "--max-tokens", "12", "--ignore-eos", "--threads", "1"]
    seeds, answers = [], []
    for extra in ([], ["--seed", "5"]):
        monkeypatch.setattr(sys, "stdin", Stdin(b"\xef\xbb\xbfa\r\n/reset\na\n"))
        code, out, err = run(capsys, *argv, *extra)
        assert code == 0
        seeds.append([line.rpartition("seed ")[2] for line in err.splitlines() if "seed " in line])
        answers.append(out)
    assert len(set(seeds[0])) == 2 and seeds[1] == ["5]", "5]"]
    half = len(answers[1]) // 2
    assert answers[1][:half] == answers[1][half:] and answers[0] != answers[1]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfa\n", "a"),
        (b"a\r\nb\r\n", "a\r\nb"),
        (codecs.BOM_UTF16_LE + "größe\r\n".encode("utf-16-le"), "größe"),
        (codecs.BOM_UTF16_BE + "a".encode("utf-16-be"), "a"),
        ("a\ufeffb".encode(), "a\ufeffb"),
        (b"", ""),
    ],
)
def test_prompt_files_as_editors_write_them(
    data: bytes, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p").write_bytes(data)
    assert options.read_file(str(tmp_path / "p")) == text
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    args = cli._parser().parse_args(["generate", "--model", "x", "--prompt", "-"])
    assert generate._prompts(args) == [text]
    with pytest.raises(RequestError, match="x: not UTF-16 at byte"):
        options.decode(codecs.BOM_UTF16_LE + b"a", "x")


def test_several_completions(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", model, "--prompt", "a", "--n", "2", "--threads", "1", "--no-stats"]
    argv += ["--max-tokens", "4", "--seed", "1", "--ignore-eos"]
    code, out, _ = run(capsys, *argv, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(line["index"], line["completion"]) for line in lines] == [(0, 0), (0, 1)]
    assert lines[0]["token_ids"] != lines[1]["token_ids"]
    _, out, _ = run(capsys, *argv)
    assert out == "".join(f"--- 0.{i}\n{line['text']}\n" for i, line in enumerate(lines))


def test_chat_keeps_a_history(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    stream_chat = LLM.stream_chat

    def spy(self: LLM, messages: Any, *args: Any, **options: Any) -> Any:
        seen.append([dict(message) for message in messages])
        return stream_chat(self, messages, *args, **options)

    monkeypatch.setattr(LLM, "stream_chat", spy)
    monkeypatch.setattr(
        sys, "stdin", Stdin("one\n\n/what\n/help\ntwo\n/reset\nthree\n" + "x" * 600 + "\nfour\n/exit\nno\n")
    )
    code, out, err = run(capsys, "chat", "--model", model, "--system", "be brief", *GREEDY)
    assert code == 0
    roles = [[message["role"] for message in messages] for messages in seen]
    once = ["system", "user"]
    assert roles == [once, [*once, "assistant", "user"], once, *[[*once, "assistant", "user"]] * 2]
    assert out.startswith(seen[1][2]["content"] + "\n")
    assert [messages[-1]["content"] for messages in seen if len(messages[-1]["content"]) < 9] == [
        "one",
        "two",
        "three",
        "four",
    ]
    assert (
        "/what is not a command" in err
        and "/reset  forget" in err
        and "/reset forgets the conversation" in err
    )


def test_chat_options(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []
    stream_chat = LLM.stream_chat

    def spy(self: LLM, *args: Any, **options: Any) -> Any:
        seen.append(options)
        return stream_chat(self, *args, **options)

    monkeypatch.setattr(LLM, "stream_chat", spy)
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}\n")
    (tmp_path / "tools.json").write_text('[{"type": "function"}]')
    argv = ["chat", "--model", model, *GREEDY]
    files = ["--chat-template", str(tmp_path / "t.jinja"), "--tools", str(tmp_path / "tools.json")]
    monkeypatch.setattr(sys, "stdin", Stdin("one\n"))
    assert run(capsys, *argv, *files, "--chat-template-kwargs", '{"enable_thinking": false}')[0] == 0
    assert seen.pop() == {
        "chat_template": "{{ messages[0].content }}",
        "chat_template_kwargs": {"enable_thinking": False},
        "tools": [{"type": "function"}],
    }
    monkeypatch.setattr(sys, "stdin", Stdin("one\n"))
    _, _, err = run(capsys, *argv, "--chat-template", "tool_use", "--include-reasoning")
    assert (
        seen.pop() == {"chat_template": "tool_use", "include_reasoning": True}
        and "no chat template is called 'tool_use'" in err
    )
    for wrong in ("[1]", "{", "[" * 100_000):
        _, _, err = run(capsys, *argv, "--chat-template-kwargs", wrong)
        assert "--chat-template-kwargs" in err and "expected an object" in err


def test_ctrl_c_stops_the_answer_only(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream_chat = LLM.stream_chat
    calls = []

    def interrupted(self: LLM, messages: Any, *args: Any, **options: Any) -> Any:
        calls.append([dict(message) for message in messages])
        for n, output in enumerate(stream_chat(self, messages, *args, **options)):
            yield output
            if n == 2 and len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream_chat", interrupted)
    monkeypatch.setattr(sys, "stdin", Stdin("one\ntwo\n"))
    assert run(capsys, "chat", "--model", model, *GREEDY)[0] == 0
    assert [message["role"] for message in calls[1]] == ["user", "assistant", "user"]
