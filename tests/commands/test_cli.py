"""The command line, mostly in this process: exit codes, one-line errors, options, help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands.kit import GREEDY, Stdin, expected, run

from pace import cli
from pace.commands import options
from pace.config import EngineConfig
from pace.errors import ConfigError
from pace.llm import LLM


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
