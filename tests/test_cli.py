"""The command line, mostly in this process: exit codes, one-line errors, output formats."""

from __future__ import annotations

import codecs
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_checkpoint

from pace import cli
from pace.commands import generate, options
from pace.config import EngineConfig
from pace.errors import ConfigError, RequestError
from pace.llm import LLM
from pace.params import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny")))


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


GREEDY = ("--temperature", "0", "--max-tokens", "8", "--threads", "1")


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
    ("text", "meant"),
    [
        (r"\n", "\n"),
        (r"a\tb\r\n", "a\tb\r\n"),
        (r"\\n", r"\n"),
        (r"\x41\u00e9\U0001f389", "Aé🎉"),
        (r"\end{document}", r"\end{document}"),
        (r"\x4 \u12 \U00110000 \d", r"\x4 \u12 \U00110000 \d"),
        ("\\", "\\"),
        ("plain\n", "plain\n"),
    ],
)
def test_stop_strings_have_escapes(text: str, meant: str) -> None:
    assert options.unescape(text) == meant
    args = cli._parser().parse_args(["generate", "--model", "x", "--stop", text])
    assert options.sampling_params(args).stop_strings == (meant,)


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


def test_options_of_vllm_are_taken_or_answered_by_name(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [
        "generate",
        "--model",
        model,
        "--prompt",
        "a_b",
        "--max_tokens",
        "8",
        "--temperature=0",
        "--threads=1",
    ]
    code, out, _ = run(capsys, *same, "--kv_cache-type=slab")
    assert (code, out) == (0, expected(model, "a_b", 8) + "\n")
    text = "--a_b is no option"
    assert run(capsys, *same, "--echo", "--prompt", text, "--json")[1].count(text) == 1
    for argv, message in (
        (["--gpu-memory-utilization", "0.9"], "does not have --gpu-memory-utilization: say how much with"),
        (["--tensor_parallel_size=2"], "does not have --tensor-parallel-size: an engine is one process"),
        (["--enforce-eager"], "there are no graphs"),
        (["--fly_away"], "unrecognized arguments: --fly-away\n"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*same, *argv])
        assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_help_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["generate"],
        ["chat"],
        ["info"],
        *(["bench", b] for b in ("roofline", "latency", "throughput")),
        ["eval", "perplexity"],
        ["eval", "speculative"],
    ):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
    assert capsys.readouterr().out.isascii()  # argparse prints it, and a locale may have no more


def test_several_completions(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", model, "--prompt", "a", "--n", "2", "--threads", "1", "--no-stats"]
    argv += ["--max-tokens", "4", "--seed", "1", "--ignore-eos"]
    code, out, _ = run(capsys, *argv, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(line["index"], line["completion"]) for line in lines] == [(0, 0), (0, 1)]
    assert lines[0]["token_ids"] != lines[1]["token_ids"]
    _, out, _ = run(capsys, *argv)
    assert out == "".join(f"--- 0.{i}\n{line['text']}\n" for i, line in enumerate(lines))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2"),
        (["--prompt", "a", "--kernels", "gemm"], "operator=kernel"),
        (["--prompt", "a", "--kernels", "gemm=sse"], "'sse'"),
        (["--prompt", "a", "--cpus", "x"], "CPU list"),
        (["--prompt", "a", "--block-size", "24"], "block_size is 24"),
        (["--prompt", "a", "--kv-cache-memory", "much"], "kv_cache_memory"),
        (["--prompt", "a", "--max-model-len", "100000"], "supports 512"),
        (["--prompt", "a", "--revision", "x"], "revision"),
        (["--prompt", ""], "empty"),
        (["--prompt", "a" * 600], "600 tokens"),
        (["--prompt-file", "/nowhere"], "/nowhere: cannot be read"),
        ([], "no prompt"),
    ],
)
def test_user_errors_are_one_line(
    model: str,
    argv: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin("", tty=True))
    code, out, err = run(capsys, "generate", "--model", model, *argv)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("[memory: ")]
    assert len(lines) == 1 and lines[0].startswith("pace: error: ") and message in lines[0]


def test_bad_stdin_and_models(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"\xff"))
    assert "stdin: not UTF-8 at byte 0" in run(capsys, "generate", "--model", model)[2]
    for name in ("/nowhere", __file__):
        code, _, err = run(capsys, "generate", "--model", name, "--prompt", "a")
        assert code == 2 and err.startswith("pace: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["generate"],
        ["fly"],
        ["generate", "--model", "x", "--threads", "0"],
        ["generate", "--model", "x", "--kv-cache-type", "heap"],
        ["generate", "--model", "x", "--admission", "lottery"],
        ["bench"],
        ["eval"],
        ["chat", "--model"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    assert "usage: pace" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [*command, "--help"]
        for command in (
            [],
            ["generate"],
            ["chat"],
            ["bench", "latency"],
            ["bench", "throughput"],
            ["eval", "perplexity"],
            ["eval", "speculative"],
        )
    ],
)
def test_help_has_examples(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 0
    assert "example" in capsys.readouterr().out


def test_traceback_on_request_only(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr("pace.engine.loader.load", crash)
    argv = ("generate", "--model", model, "--prompt", "a")
    code, _, err = run(capsys, *argv)
    assert code == 1 and err.count("\n") == 1 and "internal error: ValueError: two lines" in err
    monkeypatch.setenv("PACE_LOG_LEVEL", "debug")
    assert "Traceback" in run(capsys, *argv)[2]
    monkeypatch.setenv("PACE_LOG_LEVEL", "loud")
    assert run(capsys, *argv)[0] == 2


def test_interrupt(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupt)
    assert run(capsys, "generate", "--model", model, "--prompt", "a")[0] == 130


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


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "--json")
    values = json.loads(out)
    assert code == 0 and values["isa"] in values["tiers"] and values["version"]
    code, out, _ = run(capsys, "info")
    assert code == 0 and values["isa"] in out


def test_engine_options_reach_the_configuration(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def load(config: EngineConfig, **_: Any) -> None:
        seen.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr("pace.engine.loader.load", load)
    argv = [
        "--max-model-len",
        "100",
        "--max-num-seqs",
        "3",
        "--max-num-batched-tokens",
        "64",
        "--threads",
        "1",
    ]
    argv += ["--kv-cache-type", "paged", "--block-size", "32", "--kv-cache-memory", "4MiB"]
    argv += ["--kv-cache-dtype", "int8", "--no-enable-prefix-caching", "--admission", "reserve"]
    argv += ["--generation-config", "vllm", "--max-logprobs", "-1"]
    for command in ("generate", "chat"):
        rest = ["--prompt", "a"] if command == "generate" else []
        assert run(capsys, command, "--model", model, *argv, *rest)[0] == 2
    run(capsys, "generate", "--model", model, "--prompt", "a")
    expected = EngineConfig(
        model,
        max_model_len=100,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        kv_cache_type="paged",
        block_size=32,
        kv_cache_memory="4MiB",
        kv_cache_dtype="int8",
        enable_prefix_caching=False,
        generation_config="vllm",
        max_logprobs=-1,
        admission="reserve",
        n_threads=1,
    )
    assert seen == [expected, expected, EngineConfig(model)]


def test_bench_latency_waits_for_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windowed layers read a long prompt in smaller chunks than the budget: decoding starts later, and is still timed."""
    monkeypatch.setattr("pace.benchmarks.roofline.READ_BYTES", 1 << 20)
    windowed = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 32}
    directory = write_checkpoint(tmp_path, max_position_embeddings=2048, **windowed)
    argv = ["bench", "latency", "--model", str(directory), "--random-weights", "--input-len", "5"]
    argv += ["--context", "900", "--batch-size", "2", "--output-len", "2", "--repeat", "2", "--threads", "1"]
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    assert [(row["n_seqs"], row["n_context"]) for row in json.loads(out)["decode"]] == [(2, 900)]


def test_bench_latency_json(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pace.benchmarks.roofline.READ_BYTES", 1 << 20)
    argv = ["bench", "latency", "--model", model, "--input-len", "20", "40", "--batch-size", "1", "3"]
    argv += ["--context", "5", "--output-len", "3", "--repeat", "2", "--threads", "2"]
    code, out, _ = run(capsys, *argv, "--json")
    values = json.loads(out)
    assert code == 0
    assert [(row["n_seqs"], row["n_context"]) for row in values["prefill"]] == [(1, 20), (1, 40)]
    assert [(row["n_seqs"], row["n_context"]) for row in values["decode"]] == [(1, 5), (3, 5)]
    for row in values["prefill"] + values["decode"]:
        assert row["tokens_per_s"] > 0 and 0 < row["python_s"] < row["step_s"]
        assert row["share_read"] > 0 and row["share_dot"] > 0
    assert values["n_threads"] == 2 and values["load_s"] > 0 and values["first_token_s"] > 0
    assert values["profile"] == []
    code, out, err = run(capsys, *argv, "--random-weights", "--profile")
    assert code == 0 and out.count("\ndecode  ") == 2 and "[memory: " in err
    assert "\ndecode 3 x 5: 6 steps of 3.0 sequences" in out and "\nprefill 1 x 40: 2 steps" in out
    code, _, err = run(capsys, *argv, "--max-model-len", "20")
    assert code == 2 and "max_model_len is 20, these measurements need 41" in err


THROUGHPUT = ("bench", "throughput", "--threads", "2", "--model")


def test_bench_throughput(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pace.benchmarks.throughput.READ_BYTES", 1 << 20)
    monkeypatch.setattr("pace.benchmarks.roofline.READ_BYTES", 1 << 20)
    argv = [*THROUGHPUT, model, "--num-prompts", "5", "--input-len", "12", "--output-len", "6"]
    argv += ["--random-prefix-len", "8", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
    code, out, err = run(capsys, *argv, "--json", "--profile", "--output-json", str(tmp_path / "out.json"))
    values = json.loads(out)
    assert code == 0 and err.startswith("[memory: ") and err.count("\n") == 1
    assert json.loads((tmp_path / "out.json").read_text()) == values
    assert (values["num_requests"], values["total_num_tokens"]) == (5, 5 * (8 + 12 + 6))
    assert values["requests_per_second"] == pytest.approx(5 / values["elapsed_time"])
    assert values["output_tokens_per_second"] == pytest.approx(30 / values["elapsed_time"])
    assert 0 < values["python_s"] + values["sampler_s"] < values["step_s"]
    assert values["n_preemptions"] == 0 and 0 <= values["cached_share"] < 1
    assert {profile["phase"] for profile in values["profile"]} == {"decode", "prefill"}
    assert sum(profile["n_steps"] for profile in values["profile"]) == values["n_steps"]
    code, out, _ = run(capsys, *argv, "--random-weights", "--warmup", "0")
    assert code == 0 and "output tokens/s" in out and "prompt tokens cached" in out and "operator" not in out


def test_bench_throughput_of_a_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "hello", "max_tokens": 3}\n\n{"prompt_token_ids": [1, 2], "output_len": 4}\n')
    code, out, _ = run(capsys, *THROUGHPUT, model, "--dataset", str(data), "--json")
    assert code == 0 and json.loads(out)["total_num_tokens"] == 5 + 3 + 2 + 4
    code, out, _ = run(
        capsys,
        *THROUGHPUT,
        model,
        "--dataset",
        str(data),
        "--json",
        "--num-prompts",
        "1",
        "--output-len",
        "2",
    )
    assert code == 0 and json.loads(out)["total_num_tokens"] == 5 + 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--profile", "chart.svg"], "ends in .png"),
        (["--profile", "/nowhere/chart.png"], "its folder does not exist"),
        (["--output-json", "/nowhere/out.json"], "its folder does not exist"),
        (["--dataset", "/nowhere"], "/nowhere: cannot be read"),
        (["--dataset", "/nowhere", "--input-len", "5"], "brings its own prompts"),
        (["--random-range-ratio", "1"], "random_range_ratio is 1.0"),
        (["--random-prefix-len", "-1"], "random_prefix_len is -1"),
    ],
)
def test_bench_throughput_refuses_before_loading(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *THROUGHPUT, "/no/model", *argv)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_chart_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    code, _, err = run(capsys, *THROUGHPUT, "/no/model", "--profile", str(tmp_path / "chart.png"))
    assert code == 2 and "pip install 'pace[bench]'" in err and err.count("\n") == 1


def test_bench_roofline(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pace.benchmarks.roofline.READ_BYTES", 1 << 20)
    code, out, _ = run(capsys, "bench", "roofline", "--threads", "1", "--repeat", "1", "--json")
    (roofs,) = json.loads(out)
    assert code == 0 and roofs["read"] > 0 and set(roofs["dot"]) == {"bf16", "int8", "f32"}
    code, out, _ = run(capsys, "bench", "roofline", "--threads", "1", "--repeat", "1")
    assert code == 0 and "read GB/s" in out


def test_the_program_itself(model: str) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "pace.cli"]
    version = subprocess.run([*command, "--version"], env=env, capture_output=True, text=True, check=True)
    assert version.stdout.startswith("pace ")
    pipe = subprocess.Popen(
        [*command, "generate", "--model", model, "--prompt", "a", *GREEDY],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert pipe.stdout is not None and pipe.stderr is not None
    pipe.stdout.close()  # as `pace … | head -0`
    assert b"Traceback" not in pipe.stderr.read()
    assert pipe.wait() == 1
