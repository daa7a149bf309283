"""GPTQ: rows rounded with their inputs in mind, the text on its way through the plan, and runs that were killed."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export.test_quantize import weights
from ext.kit import rng, to_bf16
from golden.harness import BLOCK_SIZE, Model, batch_of, load
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import write_checkpoint

from pace import ops
from pace.checkpoint import Checkpoint, model_files
from pace.cli import main
from pace.errors import ConfigError
from pace.export import SCHEMES, Calibration, gptq, quantize_checkpoint
from pace.export import calibrate as module
from pace.export.gptq import Hessian, round_rows
from pace.models.expert_operators import ExpertsIn, ExpertsOut
from pace.models.operators import Gemm
from pace.quant.groups import GroupedRows
from pace.text.tokenizer import Tokenizer

TEXT = Calibration(["The ferry left at 7:45, twelve minutes late. " * 40], n_tokens=1024, length=128)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A plain model of two layers, 64 and 128 columns."""
    return write_checkpoint(tmp_path / "plain")


def inputs(n: int, k: int) -> Any:
    """Rows whose columns have something to do with each other, as those of models do."""
    random = rng("gptq", n, k)
    mix = random.standard_normal((k // 4, k)) + 0.1 * random.standard_normal((k // 4, k))
    x = random.standard_normal((n, k // 4)) @ mix + 0.3 * random.standard_normal((n, k))
    return to_bf16(x * np.exp(random.standard_normal(k)))


def as_f64(rows: Any) -> Any:
    return (rows.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize(("m", "k", "n"), [(128, 200, 70), (32, 64, 129), (300, 1, 3), (1, 65, 1), (8, 0, 4)])
def test_a_product_in_parts_is_the_product(m: int, k: int, n: int) -> None:
    left, right = (rng("parts", *size).standard_normal(size, np.float32) for size in ((m, k), (k, n)))
    got = gptq._product(left, right)
    assert got.dtype == np.float32
    # Each of k products and sums rounds to within 2^-24 of what is added up so far.
    bound = (k + 1) * 2.0**-24 * (np.abs(left).astype(np.float64) @ np.abs(right))
    assert (np.abs(got - left.astype(np.float64) @ right) <= bound).all()


def plainly(w: Any, h: Any, bits: int, scales: Any, group: int) -> Any:
    """The same by the papers' formulas, in float64 and with given scales: the inverse's factor, errors pushed forward."""
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    w, q = w.astype(np.float64).copy(), np.zeros_like(w, np.float64)
    for j in range(w.shape[1]):
        s = scales[:, j // group]
        q[:, j] = np.clip(np.rint(w[:, j] / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (w[:, j] - q[:, j] * s) / u[j, j]
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
    return q


@pytest.mark.parametrize(
    ("bits", "group", "k"), [(4, 32, 64), (4, 128, 256), (4, 32, 160), (8, 320, 320), (8, 64, 192)]
)
def test_the_papers_formulas_give_the_same_codes(bits: int, group: int, k: int) -> None:
    """But for ties that f32 breaks otherwise, which the columns behind then follow."""
    x, w = inputs(600, k), rng("w", bits, k).standard_normal((48, k)).astype(np.float32)
    hessian = Hessian(k)
    hessian.add(x)
    np.testing.assert_allclose(
        hessian.sums, as_f64(x).T @ as_f64(x), rtol=1e-4, atol=1e-3 * hessian.sums.max()
    )
    loss = hessian.loss()
    codes, scales = gptq._in_turn(np.ascontiguousarray(w.T), loss, bits, group)
    same = plainly(w, loss.sums.astype(np.float64), bits, scales.T.astype(np.float64), group) == codes.T
    assert same.all(axis=1).mean() > 0.8 and same.mean() > 0.95


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 256)])
def test_outputs_change_less_than_by_rounding_to_the_nearest(bits: int, group: int) -> None:
    x, w = inputs(1000, 256), rng("less").standard_normal((64, 256)).astype(np.float32)
    hessian = Hessian(256)
    hessian.add(x)

    def error(codes: Any, scales: Any) -> float:
        steps = codes.astype(np.float64) - 2 ** (bits - 1)
        return float(np.square((w - steps * np.repeat(scales, group, axis=1)) @ as_f64(x).T).sum())

    nearest = ops.quantise_rows(w, "f32", f"int{bits}", group)
    assert error(*round_rows(w, hessian.loss(), bits, group)) < 0.6 * error(*nearest)


@pytest.mark.parametrize("group", [32, 128])
def test_settling_lowers_the_loss_until_no_code_alone_is_better(group: int) -> None:
    """Which column after column leaves some to be; scales stay numbers of bf16, zeros among them."""
    k = 256
    w = rng("settle", group).standard_normal((24, k)).astype(np.float32)
    w[5] = w[6, :group] = 0
    hessian = Hessian(k)
    hessian.add(inputs(600, k))
    loss, targets = hessian.loss(), np.ascontiguousarray(w.T)
    h = loss.sums.astype(np.float64)
    codes, scales = gptq._in_turn(targets, loss, 4, group)

    def cost() -> Any:
        e = targets - codes * np.repeat(scales.astype(np.float64), group, axis=0)
        return (e * (h @ e)).sum(axis=0)

    costs = [cost()]
    for _ in range(40):
        gptq._settle(targets, codes, scales, loss.sums)
        costs.append(cost())
    assert (np.diff(costs, axis=0) <= 1e-5 * costs[0]).all()
    assert costs[2].sum() < 0.92 * costs[0].sum()
    assert (scales.view(np.uint32) & 0xFFFF == 0).all() and not scales[:, 5].any() and not scales[0, 6]
    assert codes.min() == -8 and codes.max() <= 7
    last = costs[-1].copy()
    for j in range(0, k, 7):
        for step in (-1, 1):
            held = codes[j].copy()
            codes[j] = np.clip(held + step, -8, 7)
            assert (cost() >= last * (1 - 1e-5)).all(), j
            codes[j] = held


def test_columns_and_rows_of_zeros() -> None:
    """Inputs that never come, weights that are nothing."""
    x, w = inputs(500, 64), np.ones((3, 64), np.float32)
    x[:, 5] = 0
    w[1] = 0
    hessian = Hessian(64)
    hessian.add(x)
    for sums in (hessian.sums, 0 * hessian.sums):
        hessian.sums = sums
        codes, scales = round_rows(w, hessian.loss(), 4, 32)
        assert np.isfinite(scales).all() and not scales[1].any() and (codes[1] == 8).all()


def reference_inputs(model: Model, calibration: Calibration, tokenizer: Tokenizer) -> dict[Any, Any]:
    """What each matrix of a model meets, float64, by the weights' names and the numbers of experts."""
    pieces = calibration.pieces(tokenizer, 512)
    blocks = -(-len(pieces[0]) // BLOCK_SIZE)
    reference = model.reference(blocks * len(pieces), trace=True)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(len(pieces))]
    reference.step(batch_of([(list(piece), 0, table) for piece, table in zip(pieces, tables, strict=True)]))
    trace = reference.trace or {}
    found: dict[Any, Any] = {}
    for before, op in itertools.pairwise(model.plan.ops):
        if isinstance(op, Gemm) and op.dst != model.plan.logits:
            found[op.weight, 0] = trace[before.name][op.src]
        elif isinstance(op, ExpertsIn | ExpertsOut):
            route = trace[before.name][op.route]
            chosen = route[:, : route.shape[1] // 2]
            for e in range(model.plan.weights[op.weight].count):
                inner = np.sort(chosen, axis=None) == e
                rows = (chosen == e).any(axis=1) if isinstance(op, ExpertsIn) else inner
                found[op.weight, e] = trace[before.name][op.src][rows]
    return found


def counted(name: str, x: Any) -> Any:
    """X^T X, in which the first row of a piece counts 128 times more where the others look at it."""
    first = x[::128]
    return x.T @ x + (128 * first.T @ first if name.endswith("qkv") else 0)


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Hessian]:
    """Filled with what each matrix is rounded by."""
    seen: dict[Any, Hessian] = {}
    hessian_of = module._Run._hessian

    def look(self: Any, op: Any, source: Any) -> Hessian:
        seen[op.weight, source.matrix] = hessian_of(self, op, source)
        return seen[op.weight, source.matrix]

    monkeypatch.setattr(module._Run, "_hessian", look)
    return seen


@pytest.mark.parametrize("scheme", ["w4g32", "w4g128", "w8"])
def test_matrices_are_rounded_by_the_rows_that_meet_them(
    scheme: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By those of the model whose matrices before are rounded already: the float64 reference of what was written."""
    seen = watched(monkeypatch)
    out = tmp_path / "out"
    quantize_checkpoint(str(source), out, scheme, calibration=TEXT)
    expected = reference_inputs(
        load(out, 512), TEXT, Tokenizer(model_files(out), vocab_size=512, max_model_len=512)
    )
    assert seen.keys() == expected.keys()
    for name, x in expected.items():
        h = counted(name[0], x)
        assert np.abs(seen[name].sums - h).max() < 0.02 * np.diag(h).max(), name
    plain, found = weights(source), weights(out)
    for name, _ in seen:
        assert not (found[name] == plain[name]).all()
        nearest = weights_of(source, tmp_path, scheme)[name]
        x, w = expected[name, 0], plain[name]
        assert np.square(x @ (found[name] - w).T).sum() < np.square(x @ (nearest - w).T).sum()


@cache
def weights_of(source: Path, tmp_path: Path, scheme: str) -> dict[str, Any]:
    quantize_checkpoint(str(source), tmp_path / "nearest", scheme)
    return weights(tmp_path / "nearest")


def test_a_run_that_was_killed_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the matrices that were finished; the bytes are those of a run that was not. Other inputs begin anew."""
    quantize_checkpoint(str(source), tmp_path / "whole", "w4g32", calibration=TEXT)
    out, rounded = tmp_path / "out", list[int]()
    gptq = module._Run._gptq

    def stop(self: Any, *args: Any) -> Any:
        if len(rounded) == 5:
            raise KeyboardInterrupt
        rounded.append(1)
        return gptq(self, *args)

    monkeypatch.setattr(module._Run, "_gptq", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(source), out, "w4g32", calibration=TEXT)
    assert not out.exists() and not (tmp_path / ".out.partial").exists()
    assert len(list((tmp_path / ".out.calibrated").glob("*.npz"))) == 5

    def count(self: Any, *args: Any) -> Any:
        rounded.append(1)
        return gptq(self, *args)

    monkeypatch.setattr(module._Run, "_gptq", count)
    quantize_checkpoint(str(source), out, "w4g32", calibration=TEXT)
    assert len(rounded) == 14 and not (tmp_path / ".out.calibrated").exists()
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other


def test_pieces_open_as_prompts_do(source: Path) -> None:
    """With BOS where prompts have one; texts may be longer than any prompt."""
    plain = Tokenizer(model_files(source), vocab_size=512, max_model_len=64)
    text = "The ferry left at 7:45, twelve minutes late. " * 100
    assert len(text) > plain.max_prompt_bytes
    pieces = Calibration([text], n_tokens=1024, length=64).pieces(plain, 512)
    opening = plain.encode("")
    assert len(pieces) == 1024 // (64 - len(opening)) and {len(piece) for piece in pieces} == {64}
    assert all(list(piece[: len(opening)]) == opening for piece in pieces)
    assert plain.decode(pieces[0].tolist()[len(opening) :]) in text


def test_what_other_inputs_left_is_not_taken(source: Path, tmp_path: Path) -> None:
    for change in ({"inputs": "a"}, {"inputs": "b"}):
        kept = module.Rounded(tmp_path / "kept", change["inputs"])
        assert kept.get("one") is None
        kept.put("one", GroupedRows(np.ones((2, 32), np.uint8), 4, 32, np.ones((2, 1), np.float32)))
    again = module.Rounded(tmp_path / "kept", "b").get("one")
    assert again is not None and again.codes.all() and (again.bits, again.group) == (4, 32)
    with Checkpoint(source) as checkpoint:
        schemes = {"x": SCHEMES["w4g32"]}
        pieces = [np.arange(300, dtype=np.int32)]
        digests = {
            module._digest({}, checkpoint, schemes, pieces),
            module._digest({"eps": 1}, checkpoint, schemes, pieces),
            module._digest({}, checkpoint, {"x": SCHEMES["w4g64"]}, pieces),
            module._digest({}, checkpoint, schemes, [pieces[0] + 1]),
        }
    assert len(digests) == 4


def test_layers_that_are_kept_and_the_others(source: Path, tmp_path: Path) -> None:
    """int8 where a pattern asks for it, by GPTQ as well; bf16 stays as it is, and what is fused with it is rounded."""
    out = tmp_path / "out"
    keep = [("*.v_proj", "int8"), ("*.0.mlp.up_proj", "bf16")]
    quantize_checkpoint(str(source), out, "w4g32", keep, calibration=TEXT)
    with Checkpoint(out) as checkpoint:
        names = set(checkpoint.names())
        assert checkpoint.info("model.layers.1.self_attn.v_proj.weight").dtype == "I8"
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert "model.layers.0.mlp.gate_proj.weight_packed" in names


def test_experts_are_rounded_by_the_rows_that_chose_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_experts(tmp_path / "experts", 4)
    lines = [f"Ferry {7 * i % 97} left at {i % 24}:{13 * i % 60:02}, {i} minutes late." for i in range(140)]
    text = Calibration([" ".join(lines)], n_tokens=2048, length=128)
    seen, out = watched(monkeypatch), tmp_path / "out"
    quantize_checkpoint(str(source), out, "w4g32", calibration=text)
    expected = reference_inputs(
        load(out, 512), text, Tokenizer(model_files(out), vocab_size=512, max_model_len=512)
    )
    routers = {(f"layers.{i}.router", 0) for i in range(2)}
    assert seen.keys() == expected.keys() - routers and len(seen) == 20
    for name, hessian in seen.items():  # rounding turns choices between experts
        h = counted(name[0], expected[name])
        assert np.abs(hessian.sums - h).max() < 0.05 * np.diag(h).max(), name


def write_experts(directory: Path, n_experts: int) -> Path:
    """A Mixtral of two layers, made of a Llama."""
    changes = {"num_local_experts": n_experts, "num_experts_per_tok": 2, "sliding_window": None}
    write_checkpoint(directory, architectures=["MixtralForCausalLM"], model_type="mixtral", **changes)
    tensors = {
        name: value for name, value in load_file(directory / "model.safetensors").items() if "mlp" not in name
    }
    for i in range(2):
        at, random = f"model.layers.{i}.block_sparse_moe", rng("experts", i)
        shapes = {"w1": (128, 64), "w2": (64, 128), "w3": (128, 64)}
        tensors[f"{at}.gate.weight"] = random.standard_normal((n_experts, 64)).astype(np.float32)
        for e in range(n_experts):
            for name, shape in shapes.items():
                values = random.standard_normal(shape) * 3 * shape[1] ** -0.5
                tensors[f"{at}.experts.{e}.{name}.weight"] = values.astype(np.float32)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_refusals(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="GPTQ rounds to integers"):
        quantize_checkpoint(str(source), out, "fp8", calibration=TEXT)
    with pytest.raises(ConfigError, match="has 9 tokens, expected 256"):
        quantize_checkpoint(str(source), out, "w4g32", calibration=Calibration(["too short"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": TEXT.texts[0]}))
    command = ["quantize", str(source), str(tmp_path / "out"), "--scheme", "w4g32"]
    assert main([*command, "--method", "gptq"]) == 2
    assert main([*command, "--calibration", str(text)]) == 2
    assert "go together" in capsys.readouterr().err
    assert (
        main([*command, "--method", "gptq", "--calibration", str(text), "--calibration-tokens", "512"]) == 0
    )
    assert "bits" in capsys.readouterr().out
