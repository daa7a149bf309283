"""The benchmark scripts that drive pace itself, for as long as it takes to see that they run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_checkpoint import write_checkpoint

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the source checkout")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny")))


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


def test_kv_cache_types(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = script("kv_cache_types", monkeypatch).main
    main([model, "--cells", "1x20", "3x300", "--rounds", "2", "--steps", "2", "--threads", "2"])
    lines = capsys.readouterr().out.splitlines()
    order = [line.split()[3].rstrip(":") for line in lines[:12]]
    assert order[:6] == ["slab", "paged", "contiguous", "paged", "contiguous", "slab"]
    rows = [line.split() for line in lines[13:]]
    assert [row[2] for row in rows] == ["slab", "paged", "contiguous"] * 2
    assert all(float(row[3]) > 0 and 0 < float(row[5]) <= 5 for row in rows)
    assert float(rows[1][6]) <= float(rows[0][6])  # pages hold less beyond what is used


def test_every_copied_block_is_filled(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untouched memory would make the cache look faster than it is: all sequences must compute the same."""
    kv = script("kv_cache_types", monkeypatch)
    shared = kv.load_model(model, 400, 2)
    for kv_type, size in (("slab", 64), ("paged", 16), ("contiguous", 64)):
        cache = kv.Cache(shared, kv.Cell(3, 192), kv_type, size, "bf16", 2)
        monkeypatch.setattr(cache, "source", 64)
        cache.fill()
        cache.rng = type(
            "Same", (), {"integers": staticmethod(lambda low, high, n, dtype: kv.np.full(n, 5, dtype))}
        )
        seen = cache.plan.slot(cache.plan.ir.logits)  # as the last step left them
        cache.decode()
        assert (seen[1:3] == seen[0]).all() and abs(seen[0]).max() > 0
    shared.team.close()


def test_mixed_load(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = script("mixed_load", monkeypatch).main
    sizes = ["--prompt-len", "200", "--context", "10", "--plain", "8", "--max-new", "250", "--rounds", "1"]
    main([model, "--streams", "1", "2", *sizes])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "streams" and [line.split()[0] for line in lines[1:]] == ["1", "2"]
    assert all(float(value) > 0 for line in lines[1:] for value in line.split())


def test_many_requests(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The counts are those of the full table; only the times want a quiet machine."""
    many = script("many_requests", monkeypatch)
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 512}
    monkeypatch.setattr(many, "SHAPE", many.SHAPE | small)
    many.main(["--scale", "0.002", "--only", "queue", "slope", "chats", "urgent"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 2 + 1 + 6 + 3
    assert float(rows[0][1].split()[0]) > 0
    shares = [float(row[1].split("(")[1].split()[0]) for row in rows[3:9]]
    assert min(shares[:4]) >= 90.0 and shares[4:] == [0.0, 0.0]
    assert all(row[1].endswith(" 1 step") for row in rows[-2:]), "an urgent request waits for a long prompt"


def test_suffix_cost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cost = script("suffix_cost", monkeypatch)
    monkeypatch.setattr(cost, "N_SEQUENCES", 2)
    monkeypatch.setattr(cost, "N_ANSWER", 5)
    monkeypatch.setattr(cost, "PIECE", cost.N_PROMPT + 5)
    monkeypatch.setattr(cost.sys, "argv", ["suffix_cost", "3000"])
    cost.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["0", "3000"] * 3
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)
