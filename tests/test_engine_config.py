"""EngineConfig and the environment table refuse what they can't use."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from pace import log
from pace.config import (
    ENVIRONMENT,
    PACE_CPUS,
    PACE_ISA,
    PACE_LOG_LEVEL,
    PACE_THREADS,
    EngineConfig,
    parse_bytes,
    parse_cpus,
    parse_kernels,
)
from pace.errors import ConfigError


def test_defaults() -> None:
    config = EngineConfig("demo")
    assert (config.n_places, config.n_full_seqs, config.max_num_batched_tokens, config.seed) == (
        64,
        32,
        2048,
        0,
    )
    assert config.kernels == {} and config.cpus is None
    with pytest.raises(AttributeError):
        config.seed = 1  # type: ignore[misc]  # wrong on purpose


def test_places() -> None:
    """What is asked for is what runs and what there is memory for; else a step's rows bound both."""
    for n in (1, 32, 500):
        config = EngineConfig("demo", max_num_seqs=n)
        assert config.n_places == config.n_full_seqs == n
    small = EngineConfig("demo", max_num_batched_tokens=40)
    assert (small.n_places, small.n_full_seqs) == (40, 32)
    assert EngineConfig("demo", max_num_batched_tokens=3).n_full_seqs == 3


def test_kernels_are_copied() -> None:
    kernels = {"gemm": "avx2"}
    config = EngineConfig("demo", kernels=kernels)
    kernels["gemm"] = "changed"
    assert config.kernels["gemm"] == "avx2"


@pytest.mark.parametrize(
    "bad",
    [
        {"model": ""},
        {"model": "a\0b"},
        {"model": 3},
        {"revision": ""},
        {"tokenizer": 1},
        {"trust_tokenizer": 1},
        {"max_model_len": 0},
        {"max_model_len": True},
        {"max_model_len": 1.5},
        {"max_model_len": 1 << 40},
        {"max_num_seqs": 0},
        {"max_num_seqs": 4096},
        {"max_num_batched_tokens": "2048"},
        {"n_threads": 0},
        {"n_threads": 10**6},
        {"cpus": ()},
        {"cpus": (1, 1)},
        {"cpus": (-1,)},
        {"cpus": "0-3"},
        {"cpus": (0, 1), "n_threads": 3},
        {"kernels": {"gemm": 1}},
        {"kernels": {"": "avx2"}},
        {"kernels": "gemm=avx2"},
        {"generation_config": None},
        {"generation_config": ""},
        {"max_logprobs": -2},
        {"max_logprobs": None},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(**{"model": "demo", **bad})
    assert "\n" not in str(error.value)
    assert any(name in str(error.value) for name in bad)


def test_parse_cpus() -> None:
    assert parse_cpus("8, 0-3") == (0, 1, 2, 3, 8)
    for bad in ("", "a", "3-1", "0-", "-1", "1,1", "0-3,2", "99999", "1--2", "٣"):
        with pytest.raises(ConfigError):
            parse_cpus(bad)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4g", 4 << 30),
        ("4G", 4 << 30),
        ("512m", 512 << 20),
        ("1.5Ki", 1536),
        ("2t", 2 << 40),
        ("4gb", 4 * 10**9),
        ("4 GiB", 4 << 30),
        ("1TB", 10**12),
        ("7", 7),
        ("8b", 8),
    ],
)
def test_sizes_as_people_write_them(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes
    assert EngineConfig("demo", kv_cache_memory=text).kv_cache_memory == n_bytes


@pytest.mark.parametrize("text", ["", "g", "4x", "4gg", "-1g", "0g", "4 g b", "1e9", "4p", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 4GiB, 4g or 512MB"):
        parse_bytes(text)


def test_the_wrong_element_is_named() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"cpus": (0, "x")}, "cpus[1] is 'x'"),
        ({"cpus": (3, 1, 3)}, "cpus names CPU 3 twice"),
        ({"kernels": {"gemm": "avx2", "norm": 1}}, "kernels has {'norm': 1}"),
    ]
    for values, message in bad:
        with pytest.raises(ConfigError) as error:
            EngineConfig("demo", **values)
        assert message in str(error.value)


def test_parse_kernels() -> None:
    assert parse_kernels("gemm=avx2, attention=reference") == {"gemm": "avx2", "attention": "reference"}
    for bad in ("", "gemm", "gemm=", "=avx2", "gemm=avx2,gemm=avx512"):
        with pytest.raises(ConfigError):
            parse_kernels(bad)


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        (PACE_ISA, "avx512bf16", "avx512bf16"),
        (PACE_THREADS, " 4 ", 4),
        (PACE_CPUS, "1-2", (1, 2)),
        (PACE_LOG_LEVEL, "DEBUG", "debug"),
        (PACE_THREADS, "", None),
        (PACE_LOG_LEVEL, "", "warning"),
    ],
)
def test_environment(variable: Any, text: str, value: object) -> None:
    assert variable.get({variable.name: text}) == value
    assert variable.get({}) == variable.default


@pytest.mark.parametrize(
    ("variable", "text"),
    [(PACE_ISA, "avx3"), (PACE_THREADS, "0"), (PACE_THREADS, "1e3"), (PACE_THREADS, "-1"),
     (PACE_THREADS, "1" * 5000), (PACE_CPUS, "x"), (PACE_LOG_LEVEL, "loud")],
)  # fmt: skip
def test_environment_refused(variable: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable.name}: "):
        variable.get({variable.name: text})


def test_every_variable_is_in_the_table() -> None:
    """Whatever `PACE_…` name the sources mention, the table documents."""
    from pace import config

    names = {variable.name for variable in ENVIRONMENT}
    assert all(variable.doc for variable in ENVIRONMENT)
    for path in Path(config.__file__).parent.rglob("*.py"):
        for name in re.findall(r"[\"']PACE_[A-Z_]+[\"']", path.read_text(encoding="utf-8")):
            assert name.strip("\"'") in names, path


def test_log_configure_is_idempotent(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("pace")
    before, level, propagate = list(logger.handlers), logger.level, logger.propagate
    try:
        monkeypatch.setenv("PACE_LOG_LEVEL", "info")
        log.configure()
        assert logger.level == logging.INFO
        log.configure("debug")
        assert logger.level == logging.DEBUG
        assert len(logger.handlers) == len(before) + 1
        with pytest.raises(ConfigError):
            log.configure("loud")
    finally:
        logger.handlers[:] = before
        logger.setLevel(level)
        logger.propagate = propagate


def test_library_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    log.logger.warning("nobody asked")
    assert capfd.readouterr() == ("", "")
