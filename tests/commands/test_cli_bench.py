"""`pace bench` in this process: what each measurement prints, and what it refuses before it loads a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands.kit import run
from tiny_checkpoint import write_checkpoint


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
