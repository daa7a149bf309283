"""`pace eval speculative` on the embedded pair: nothing of an output changes, and the figures add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pace import LLM, cli
from pace.benchmarks.speculative import PLAIN, Prompts, SpeculativeResult, format_speculative, run
from pace.benchmarks.speculative_chart import save_speculative_chart
from pace.benchmarks.speculative_roof import RoofLog, Round, ideal
from pace.config import EngineConfig

TEXTS = [
    "def add(a, b):\n",
    "import os\nimport sys\nimport os\nimport",
    "for i in range(3):\n    print(i)\nfor",
]


def evaluate(**options: Any) -> SpeculativeResult:
    config = EngineConfig("demo", n_threads=2, max_model_len=128, max_num_seqs=2, enable_prefix_caching=False)
    given: dict[str, Any] = {
        "prompts": Prompts("here", TEXTS, chat=False),
        "methods": ["draft_model", "suffix"],
        "draft": "demo-draft",
        "depths": [2, 4],
        "max_tokens": 24,
        "show_progress": False,
    }
    return run(config, **given | options)


@pytest.fixture(scope="module")
def result() -> SpeculativeResult:
    return evaluate(batch_sizes=[2])


def test_every_method_is_measured_with_every_depth(result: SpeculativeResult) -> None:
    found = [(arm.method, arm.k) for arm in result.arms]
    assert found == [(PLAIN, 0), ("draft_model", 2), ("draft_model", 4), ("suffix", 2), ("suffix", 4)]
    assert all(arm.n_identical == arm.n_requests for arm in result.arms)
    assert [arm.n_requests for arm in result.arms] == [6, 3, 3, 3, 3], "plain decoding, once for each engine"
    assert len({arm.n_tokens / arm.n_requests for arm in result.arms}) == 1, "the same prompts"


def test_the_figures_add_up(result: SpeculativeResult) -> None:
    for arm in result.arms[1:]:
        assert isinstance(arm.k, int)
        accepted = sum(i * n for i, n in enumerate(arm.histogram))
        assert sum(arm.histogram) == arm.n_rounds > 0 and min(arm.histogram) >= 0
        assert len(arm.acceptance_rates) <= arm.k and len(arm.histogram) <= arm.k + 1
        assert 1 + accepted / arm.n_rounds - arm.mean_acceptance_length == pytest.approx(0, abs=0.2), (
            "but for rounds that an end cut short"
        )
        assert arm.draft_s > 0 and arm.verify_s > 0 and arm.sample_s > 0 and arm.other_s > 0
        assert arm.n_skipped == 0, "a fixed K is drafted in every step"
        assert [len(row) for row in arm.by_length] == list(range(1, len(arm.by_length) + 1))
        assert sum(arm.by_length[0]) == 0 and len(arm.by_length) <= arm.k + 1
        for a, n in enumerate(arm.histogram):
            assert sum(row[a] for row in arm.by_length if a < len(row)) == n
        assert arm.tokens_per_s == pytest.approx((arm.n_tokens - arm.n_requests) / arm.decode_s)
    plain = result.arms[0]
    assert (plain.speedup, plain.n_rounds, plain.histogram) == (1.0, 0, [])
    assert plain.draft_s == pytest.approx(0, abs=0.1)


def test_deeper_drafts_of_one_model_are_accepted_further(result: SpeculativeResult) -> None:
    lengths = {(arm.method, arm.k): arm.mean_acceptance_length for arm in result.arms}
    assert lengths["draft_model", 4] > lengths["draft_model", 2] > 1.3


def test_chance_is_labelled_as_chance(tmp_path: Path) -> None:
    """Also where both models' weights are invented."""
    result = evaluate(
        methods=["draft_model"], depths=[4], synthetic_acceptance=(1.0, 0.0), random_weights=True
    )
    (_, arm) = result.arms
    assert arm.acceptance_rates[:2] == [1, 0] and arm.histogram[1] == arm.n_rounds
    assert "SYNTHETIC ACCEPTANCE (1.0, 0.0)" in format_speculative(result)
    assert result.to_json()["synthetic_acceptance"] == (1.0, 0.0)


def test_the_ideal_is_what_the_roofs_allow() -> None:
    """A target of 8 times the draft's bytes: K = 3 of one sequence, bound by reads, then 64 sequences, bound by dots."""
    with (
        LLM("demo", threads=1, max_model_len=64) as llm,
        LLM("demo-draft", threads=1, max_model_len=64) as small,
    ):
        target, draft = llm.loaded.plan.ir, small.loaded.plan.ir
    slow_memory, slow_dots = RoofLog([1e9, 9e9, 1e9], [1e30]), RoofLog([1e30], [1e9])
    one = Round("pard", 3, 1, 20, 2.5)
    by_reads = ideal(target, draft, one, slow_memory, slow_memory, "bf16")
    assert by_reads.plain_s == pytest.approx(8e6 / 1e9, rel=0.1)
    assert by_reads.verify_s == pytest.approx(by_reads.plain_s, rel=0.01)
    assert by_reads.draft_s == pytest.approx(3.7e6 / 1e9, rel=0.1)
    assert by_reads.speedup == pytest.approx(2.5 * by_reads.plain_s / (by_reads.verify_s + by_reads.draft_s))
    by_dots = ideal(target, draft, one, slow_dots, slow_dots, "bf16")
    assert by_dots.verify_s == pytest.approx(4 * by_dots.plain_s, rel=0.02)
    passes = ideal(target, draft, replace(one, method="draft_model"), slow_memory, slow_memory, "bf16")
    assert passes.draft_s == pytest.approx(3 * by_reads.draft_s, rel=0.01)


def test_batches_of_several_sizes_and_their_rooflines() -> None:
    result = evaluate(methods=["pard"], depths=[2, "auto"], batch_sizes=[1, 2], max_tokens=12)
    assert [(arm.method, arm.batch_size, arm.k) for arm in result.arms] == [
        (method, size, k) for size in (1, 2) for method, k in ((PLAIN, 0), ("pard", 2), ("pard", "auto"))
    ]
    for arm in result.arms:
        has_ideal = arm.method == "pard" and arm.k == 2
        assert (arm.ideal_speedup is not None) == has_ideal
        if arm.ideal_speedup is not None and arm.ideal_share is not None and arm.round_ratio is not None:
            assert arm.ideal_share == pytest.approx(arm.speedup / arm.ideal_speedup)
            assert arm.round_ratio > 0 and min(arm.rooflines or ()) > 0
    assert "rooflines in ms" in format_speculative(result)


def test_drafts_that_do_not_pay_are_counted_as_skipped() -> None:
    """Of one whose guesses never stand; the first draft and the probes are made."""
    result = evaluate(methods=["pard"], depths=["auto"], synthetic_acceptance=0.0, max_tokens=64)
    (_, arm) = result.arms
    assert arm.n_skipped > 0
    assert arm.n_skipped + arm.n_rounds <= arm.n_tokens - arm.n_requests
    assert f"{arm.n_skipped}" in format_speculative(result)


def test_the_table_tells_lengths_of_drafts_apart(result: SpeculativeResult) -> None:
    arm = replace(result.arms[1], by_length=[[0], [3, 4], [0, 0, 0], [0, 0, 0, 9]], n_rounds=16)
    table = format_speculative(replace(result, arms=[result.arms[0], arm]))
    assert "of drafts of  1: 3 4\n" in table and table.endswith("of drafts of  3: 0 0 0 9")


def test_the_chart(result: SpeculativeResult, tmp_path: Path) -> None:
    save_speculative_chart(result, str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chat, as PARD's files have it, and a hybrid."""
    data = tmp_path / "prompts.jsonl"
    lines = [{"data": "add two numbers"}, {"data": "again\u2028again", "answer": 1}, {"prompt": "no more"}]
    data.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    command = ["eval", "speculative", "--model", "demo", "--threads", "2", "--data", str(data)]
    command += ["--num-prompts", "2", "--max-tokens", "6", "--max-model-len", "128"]
    output, chart = tmp_path / "out.json", tmp_path / "out.png"
    more = ["--methods", "hybrid", "--draft", "demo-draft", "--num-speculative-tokens", "3", "auto"]
    assert cli.main([*command, *more, "--json", "--output-json", str(output), "--chart", str(chart)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(output.read_text()) and chart.exists()
    assert [(arm["method"], arm["k"]) for arm in found["arms"]] == [
        ("ar", 0),
        ("hybrid", 3),
        ("hybrid", "auto"),
    ]
    assert all(arm["n_identical"] == arm["n_requests"] == 2 for arm in found["arms"])
    assert found["draft"] == "demo-draft"
    assert cli.main([*command, "--methods", "ar", "--raw"]) == 0
    table = capsys.readouterr().out
    assert "ar " in table and "1.00" in table and "2/2" in table


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "pard"], "method pard needs a draft"),
        (["--raw", "--system", "x"], "--raw has no chat"),
        (["--chat-template-kwargs", "[]"], "--chat-template-kwargs: holds [], expected an object"),
        (["--chart", "a.jpg"], "expected one that ends in .png"),
        (["--synthetic-acceptance", "1.5"], "synthetic_acceptance has 1.5, expected probabilities"),
        (["--num-prompts", "1", "--data", "missing"], "missing: cannot be read"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"data": "x"}')
    assert cli.main(["eval", "speculative", "--model", "demo", "--data", str(data), *more]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "more",
    [
        ["--num-speculative-tokens", "33"],
        ["--num-speculative-tokens", "x"],
        ["--synthetic-acceptance", "a,b"],
    ],
)
def test_numbers_that_are_none_are_wrong_usage(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "speculative", "--model", "demo", "--data", "x", *more])
    assert "error: argument" in capsys.readouterr().err
