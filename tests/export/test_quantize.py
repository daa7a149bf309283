"""`pace quantize`: what it writes is read back exactly, whole or not at all, the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.harness import load
from tiny_checkpoint import write_checkpoint

from pace import ops
from pace.checkpoint import Checkpoint
from pace.cli import main
from pace.errors import CheckpointError, ConfigError
from pace.export import SCHEMES, quantize_checkpoint
from pace.export import quantize as module
from pace.models.quantisation import quantisation


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A plain model of two layers, 64 and 128 columns."""
    return write_checkpoint(tmp_path / "plain")


def weights(directory: Path) -> dict[str, Any]:
    return {name: value for name, value in load(directory, 32).weights.items() if value.ndim == 2}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_is_what_was_rounded(scheme: str, source: Path, tmp_path: Path) -> None:
    """Read back it has the rounding's own codes and scales, and the source's embedding and head, bit for bit."""
    out = tmp_path / "out"
    summary = quantize_checkpoint(str(source), out, scheme)
    plain, found = weights(source), weights(out)
    own = SCHEMES[scheme]
    for name, values in plain.items():
        if not name.startswith("layers."):
            np.testing.assert_array_equal(found[name], values)
            continue
        group = 64 if own.group == 128 and values.shape[1] == 64 else own.group or values.shape[1]
        form = "fp8" if own.kind == "float" else f"int{own.bits}"
        codes, scales = ops.quantise_rows(values.astype(np.float32), "f32", form, group)
        rows = module._rows(own, codes, scales)
        np.testing.assert_array_equal(
            found[name], type(rows)(**{**_fields(rows), "group": group}).dequantised(), err_msg=name
        )
        # The search for a scale of 4 bits clips to no less than 0.7 * 7 / 8 of the largest.
        most = 0.3876 if own.bits == 4 else 0.01 if own.kind == "int" else 1 / 12
        assert np.abs(found[name] - values).max() <= most * np.abs(values).max()
    assert 0 < summary.n_bytes < summary.source_bytes and summary.snr > 15
    assert summary.bits < (5 if own.bits == 4 else 9)


def _fields(rows: Any) -> dict[str, Any]:
    return {name: getattr(rows, name) for name in rows.__slots__}


def test_files_beside_the_weights_come_along_and_the_config_says_what_was_done(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(str(source), out, "w4g32")
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}
    config = json.loads((out / "config.json").read_text())
    written = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert written["quant_method"] == "compressed-tensors" and "lm_head" in written["ignore"]
    assert quantisation({"quantization_config": written}) is not None


def test_layers_that_are_kept(source: Path, tmp_path: Path) -> None:
    """The first pattern that fits counts; another scheme is another group of the config."""
    out = tmp_path / "out"
    keep = [("*layers.0.mlp.down_proj", "bf16"), ("*.down_proj", "int8")]
    summary = quantize_checkpoint(str(source), out, "w4g32", keep)
    with Checkpoint(out) as checkpoint:
        names = set(checkpoint.names())
        assert checkpoint.info("model.layers.1.mlp.down_proj.weight").dtype == "I8"
    assert "model.layers.0.mlp.down_proj.weight_scale" not in names
    assert summary.kept == ["model.layers.0.mlp.down_proj"]
    plain, found = weights(source), weights(out)
    np.testing.assert_array_equal(found["layers.0.down"], plain["layers.0.down"])
    assert not (found["layers.1.down"] == plain["layers.1.down"]).all()


def test_groups_that_do_not_divide_a_row_are_halved(source: Path, tmp_path: Path) -> None:
    """64 columns in groups of 128: other readers want whole groups."""
    out = tmp_path / "out"
    quantize_checkpoint(str(source), out, "w4g128")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    sizes = {group["weights"]["group_size"] for group in config["config_groups"].values()}
    assert sizes == {64, 128}


def test_the_same_bytes_whatever_the_threads(source: Path, tmp_path: Path) -> None:
    for n in (1, 3):
        quantize_checkpoint(str(source), tmp_path / str(n), "w4g32", n_threads=n)
    one, other = ((tmp_path / str(n) / "model.safetensors").read_bytes() for n in (1, 3))
    assert one == other


def test_shards_have_an_index(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 30_000)
    quantize_checkpoint(str(source), tmp_path / "out", "w8")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    quantize_checkpoint(str(source), tmp_path / "whole", "w8g32")
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "whole").keys()


def test_an_interrupted_run_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(source), tmp_path / "out", "w4g32", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_what_a_killed_run_left_is_taken_away(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")
    quantize_checkpoint(str(source), tmp_path / "out", "w8")
    assert not (tmp_path / ".out.partial").exists() and not (tmp_path / "out" / "half").exists()


def test_refusals(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(str(source), out, "w8")
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_checkpoint(str(out), tmp_path / "again", "w4g32")
    with pytest.raises(ConfigError, match="exists"):
        quantize_checkpoint(str(source), out, "w8")
    with pytest.raises(ConfigError, match="fits no linear layer"):
        quantize_checkpoint(str(source), tmp_path / "again", "w8", [("*.nothing", "bf16")])
    with pytest.raises(ConfigError, match="expected one of"):
        quantize_checkpoint(str(source), tmp_path / "again", "w5")
    assert not (tmp_path / "again").exists()


def test_groups_that_divide_no_row_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of 80 and 48 columns: no group of 32 or more; a copy that nothing was done to would be a surprise."""
    source = write_checkpoint(
        tmp_path / "plain", hidden_size=80, intermediate_size=48, num_attention_heads=5, num_key_value_heads=5
    )
    for scheme in ("w4g32", "w4g128", "w8g64"):
        with pytest.raises(ConfigError, match="groups divide no layer's columns"):
            quantize_checkpoint(str(source), tmp_path / "out", scheme)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--scheme", "w4g64"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    quantize_checkpoint(str(source), tmp_path / "out", "w8")


def test_a_weight_that_is_no_number_is_refused() -> None:
    rows = np.ones((3, 64), np.float32)
    rows[1, 5] = np.nan
    with pytest.raises(CheckpointError, match="row 1"):
        ops.quantise_rows(rows, "f32", "int4", 32)


def test_the_command_says_what_it_wrote(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["quantize", str(source), str(tmp_path / "out"), "--scheme", "w4g32", "--keep", "*.o_proj=int8"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "bits" in printed and "dB" in printed
    with pytest.raises(SystemExit):
        main(["quantize", str(source), str(tmp_path / "b"), "--scheme", "w4g32", "--keep", "o_proj"])
