"""The scripts under bench/peers, with engines that only pretend."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the source checkout")

RUNNER = """
import sys, time
import common
args = common.arguments()
if {dies_at!r} in args.cells:
    args.cells = args.cells[: args.cells.index({dies_at!r})]
    ends = 9
else:
    ends = 0
common.run(lambda prompts, n_new: time.sleep(0.01), args)
sys.exit(ends)
"""

BINARY = """#!{python}
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
n_seqs, n_new = int(options["-npl"]), int(options["-ntg"])
for n_prompt in map(int, options["-npp"].split(",")):
    assert n_seqs * (n_prompt + n_new) <= int(options["-c"])
    print("some log line")
    print(json.dumps({{"t_pp": n_prompt / 100, "t_tg": n_new / 10, "t": n_prompt / 100 + n_new / 10}}))
"""


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH / "peers"))
    return __import__(name)


def test_the_suites(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    common = module("common", monkeypatch)
    calls = []

    def generate(prompts: list[list[int]], n_new: int) -> None:
        calls.append((len(prompts), len(prompts[0]), n_new))
        if len(prompts) == 32:
            raise RuntimeError("no memory")

    common.run(generate, common.arguments(["DIR", "--suite", "throughput", "--cells", "8x128", "32x1920"]))
    assert calls == [(1, 128, 4), (8, 128, 128), (32, 1920, 128)]
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1].removeprefix("RESULT "))
    assert list(result) == ["8x128"] and "32x1920: no memory" in captured.err
    common.run(lambda prompts, n_new: time.sleep(n_new * 3e-4), common.arguments(["DIR"]))
    result = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    assert list(result) == [f"prefill {n}" for n in (128, 512, 1920)] + [f"decode {n}" for n in (1, 8, 32)]
    for name in ("9", "33x128", "1x1921", "axb"):
        with pytest.raises(SystemExit):
            common.arguments(["DIR", "--cells", name])


def test_compare_alternates_processes(tmp_path: Path) -> None:
    for name in ("common.py", "compare.py"):
        (tmp_path / name).write_text((BENCH / "peers" / name).read_text())
    for name, dies_at in (("pace", ""), ("amd_pace", "8x128"), ("vllm", "")):
        (tmp_path / f"run_{name}.py").write_text(RUNNER.format(dies_at=dies_at))
    command = [sys.executable, str(tmp_path / "compare.py"), "DIR", "--rounds", "2", "--suite", "throughput"]
    command += ["--cells", "1x128", "8x128", "--vllm-eager"]
    for name in ("pace", "amd_pace", "vllm"):
        command += ["--engine", f"{name}={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["pace", "amd_pace", "vllm"] * 2
    rows = {line.split()[0]: line.split()[1:] for line in lines[7:9]}
    assert len(rows["1x128"]) == 5 and rows["8x128"][1] == rows["8x128"][4] == "-"
    assert lines[10].startswith("seconds") and "exit 9" in done.stderr


def test_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = module("compare", monkeypatch)
    medians = compare.medians([{"a": 1.0, "b": 5.0}, {"a": 3.0}, {"a": 2.0}])
    assert medians == {"a": 2.0, "b": 5.0}
    text = compare.table({"pace": {"1x128": 30.0}, "amd_pace": {"1x128": 10.0}, "vllm": {"1x128": 20.0}}, "x")
    assert text.splitlines()[1].split() == ["1x128", "30.0", "10.0", "20.0", "1.50", "3.00"]


def test_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    binary = tmp_path / "llama-batched-bench"
    binary.write_text(BINARY.format(python=sys.executable))
    binary.chmod(stat.S_IRWXU)
    monkeypatch.setenv("LLAMA_CPP_BIN", str(tmp_path))
    runner = module("run_llama_cpp", monkeypatch)

    def result(*argv: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["run_llama_cpp.py", "DIR", *argv])
        runner.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))

    rates = result()
    assert rates["prefill 512"] == pytest.approx(100) and rates["decode 8"] == pytest.approx(80)
    rates = result("--suite", "throughput", "--cells", "8x128", "1x1920")
    assert rates["8x128"] == pytest.approx(8 * 128 / (1.28 + 12.8)) and len(rates) == 2
    binary.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    with pytest.raises(SystemExit, match=r"DIR/model-bf16\.gguf .* failed \(exit 3\)"):
        result()
    monkeypatch.setenv("LLAMA_CPP_MODEL", "elsewhere/Q8_0.gguf")
    with pytest.raises(SystemExit, match=r"-m elsewhere/Q8_0\.gguf "):
        result()


def test_gguf_has_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    monkeypatch.syspath_prepend(str(BENCH))
    random_checkpoint = module("random_checkpoint", monkeypatch)
    make_gguf = module("make_gguf", monkeypatch)
    config = dict(random_checkpoint.SHAPES["llama-3.2-1b"])
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320}
    monkeypatch.setitem(random_checkpoint.SHAPES, "tiny", config)
    random_checkpoint.write("tiny", tmp_path)
    make_gguf.write(tmp_path, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == len(random_checkpoint.shapes(config)) + 1
    assert tensors["blk.1.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [128, 64]  # the fastest dimension first
    assert np.all(tensors["output_norm.weight"].data == 1)
    factors = tensors["rope_freqs.weight"].data
    assert factors[0] == 1 and factors[-1] == pytest.approx(32)


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-20b"])
def test_gguf_has_every_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    monkeypatch.syspath_prepend(str(BENCH))
    random_checkpoint = module("random_checkpoint", monkeypatch)
    make_gguf = module("make_gguf", monkeypatch)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320}
    experts = "num_experts" if model == "qwen3-30b-a3b" else "num_local_experts"
    small |= {experts: 4, "num_experts_per_tok": 2}
    if model == "qwen3-30b-a3b":
        small["moe_intermediate_size"] = 96
    config = random_checkpoint.SHAPES[model] | small
    monkeypatch.setitem(random_checkpoint.SHAPES, "tiny", config)
    random_checkpoint.write("tiny", tmp_path)
    make_gguf.write(tmp_path, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    source = make_gguf.read(tmp_path / "model.safetensors")
    if model == "qwen3-30b-a3b":
        assert len(tensors) == len(source) - 2 * 3 * 3  # of four experts' matrices one is left
        got = tensors["blk.1.ffn_up_exps.weight"].data.view(np.uint16)
        assert np.array_equal(got[3], source["model.layers.1.mlp.experts.3.up_proj.weight"])
        return
    assert len(tensors) == len(source)  # blocks and scales are one there, gate and up are two
    up = tensors["blk.1.ffn_up_exps.weight"]
    assert up.tensor_type == gguf.GGMLQuantizationType.MXFP4
    blocks = source["model.layers.1.mlp.experts.gate_up_proj_blocks"][3, 1::2]
    scales = source["model.layers.1.mlp.experts.gate_up_proj_scales"][3, 1::2]
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(96, 64)
    want = values[codes] * np.repeat(np.exp2(scales.astype(np.float32) - 127), 32, -1)
    assert np.array_equal(gguf.quants.dequantize(up.data, up.tensor_type)[3], want)
