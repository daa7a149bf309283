"""Perplexity against what the definition says, token by token; windows, bytes, KL."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoint import write_checkpoint

from pace import cli
from pace.benchmarks.perplexity import PerplexityResult, Window, cut, divergence, log_softmax, run
from pace.config import EngineConfig
from pace.errors import ConfigError, RequestError
from pace.llm import LLM
from pace.params import SamplingParams

TEXT = "def area(width: float, height: float) -> float:\n    return width * height  # ß, 日本語\n"


@given(
    n=st.integers(0, 60),
    window=st.integers(4, 20),
    stride=st.integers(1, 18),
    bos=st.sampled_from([None, 99]),
)
def test_windows_score_every_token_once(n: int, window: int, stride: int, bos: int | None) -> None:
    stride = min(stride, window - 2)
    ids = list(range(n))
    head = 0 if bos is None else 1
    scored: list[int] = []
    for i, piece in enumerate(cut(ids, bos, window, stride)):
        tokens = piece.ids.tolist()
        assert len(tokens) <= window and 1 <= piece.first < len(tokens)
        assert tokens[:head] == [99] * head
        begin = tokens[head]
        assert tokens[head:] == ids[begin : begin + len(tokens) - head], "a part of the text, as it is"
        assert i == 0 or piece.first >= window - stride, "context"
        scored += tokens[piece.first :]
    assert scored == (ids if bos is not None else ids[1:])


def surprises(llm: LLM, ids: list[int], first: int) -> list[float]:
    """-ln p of ids[first:], each drawn by force behind the tokens before it."""
    found = []
    for i in range(first, len(ids)):
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, allowed_token_ids=[ids[i]])
        output = llm.generate({"prompt_token_ids": ids[:i]}, params)[0].outputs[0]
        assert output.logprobs is not None
        found.append(-output.logprobs[0][ids[i]].logprob)
    return found


def test_it_is_the_mean_surprise_of_the_text() -> None:
    """The embedded model, which puts BOS first: every token of the text, and every byte."""
    result = run(EngineConfig("demo", n_threads=2), "here", [TEXT], show_progress=False)
    with LLM("demo", threads=2) as llm:
        nats = surprises(llm, llm.get_tokenizer().encode(TEXT), 1)
    assert (result.n_tokens, result.n_bytes) == (len(nats), len(TEXT.encode()))
    assert result.nats_per_token == pytest.approx(math.fsum(nats) / len(nats), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(math.fsum(nats) / math.log(2) / result.n_bytes, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    assert result.against is None


@pytest.mark.parametrize("text", ["ab", "ß = 1"])
def test_without_bos_the_first_token_and_its_bytes_do_not_count(text: str, tmp_path: Path) -> None:
    """Nothing predicts it; here it is one byte, in one case half a character."""
    model = str(write_checkpoint(tmp_path))
    result = run(EngineConfig(model, n_threads=2), "here", ["", text], show_progress=False)
    with LLM(model, threads=2) as llm:
        nats = surprises(llm, llm.get_tokenizer().encode(text), 1)
    assert result.n_tokens == result.n_bytes == len(nats) == len(text.encode()) - 1
    assert result.nats_per_token == pytest.approx(math.fsum(nats) / len(nats), rel=1e-12)


def test_a_long_text_is_read_in_windows() -> None:
    window, stride = 16, 5
    config = EngineConfig("demo", n_threads=2, max_model_len=window + 1)
    result = run(config, "here", [TEXT, "import os\n"], window=window, stride=stride, show_progress=False)
    with LLM("demo", threads=2) as llm:
        nats: list[float] = []
        for text in (TEXT, "import os\n"):
            for piece in pieces(llm, text, window, stride):
                nats += surprises(llm, piece.ids.tolist(), piece.first)
    assert result.n_tokens == len(nats) and result.n_texts == 2
    assert result.nats_per_token == pytest.approx(math.fsum(nats) / len(nats), rel=1e-12)


def pieces(llm: LLM, text: str, window: int, stride: int) -> list[Window]:
    """Of the embedded model, which puts BOS first."""
    bos, *ids = llm.get_tokenizer().encode(text)
    return cut(ids, bos, window, stride)


def compare(**options: object) -> PerplexityResult:
    against = EngineConfig("demo", n_threads=1)
    config = EngineConfig("demo", n_threads=2, **options)  # type: ignore[arg-type]  # one of its fields
    return run(config, "here", [TEXT], window=24, stride=10, against=against, show_progress=False)


def test_a_model_is_no_distance_from_itself() -> None:
    result = compare()
    assert result.against is not None
    assert (result.against.kl_nats, result.against.kl_max, result.against.greedy_agreement) == (0.0, 0.0, 1.0)
    assert result.against.nats_per_token == result.nats_per_token
    assert result.against.bits_per_byte == result.bits_per_byte


def test_the_distance_is_that_of_the_distributions() -> None:
    """An int8 KV cache beside a bf16 one, from all log probabilities that the engines give."""
    result = compare(kv_cache_dtype="int8")
    assert result.against is not None
    rows, chosen = [], []
    for dtype in ("bf16", "int8"):
        with LLM("demo", threads=2, kv_cache_dtype=dtype, max_logprobs=-1) as llm:
            found = []
            for piece in pieces(llm, TEXT, 24, 10):
                params = SamplingParams(max_tokens=1, prompt_logprobs=-1)
                output = llm.generate({"prompt_token_ids": piece.ids.tolist()}, params)[0]
                assert output.prompt_logprobs is not None
                for entry in output.prompt_logprobs[piece.first :]:
                    assert entry is not None
                    found.append([entry[token].logprob for token in range(len(entry))])
            rows.append(np.array(found))
            chosen.append(rows[-1].argmax(axis=1))
    kl = (np.exp(rows[0]) * (rows[0] - rows[1])).sum(axis=1)
    assert result.against.kl_nats == pytest.approx(kl.mean(), rel=1e-3) and kl.mean() > 1e-6
    assert result.against.kl_max == pytest.approx(kl.max(), rel=1e-2)
    assert result.against.greedy_agreement == (chosen[0] == chosen[1]).mean()
    assert result.against.nats_per_token != result.nats_per_token


def test_padded_columns_and_tokens_that_are_excluded_count_nothing() -> None:
    reference = log_softmax(np.array([[0.0, 1.0, -np.inf, 2.0]], np.float32))
    model = log_softmax(np.array([[0.0, 1.0, 2.0]], np.float32))
    p, q = np.exp(reference[0, :2]), model[0, :2]
    assert divergence(reference, model) == pytest.approx([max(0, (p * (np.log(p) - q)).sum())])


def test_a_text_that_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    model = EngineConfig(str(write_checkpoint(tmp_path)), n_threads=1)
    with pytest.raises(RequestError, match="no token that another one precedes"):
        run(model, "here", ["", "x"], show_progress=False)
    with pytest.raises(RequestError, match="no token that another one precedes"):
        run(EngineConfig("demo", n_threads=1), "here", [""], show_progress=False)


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (3, None, "window is 3, expected 4 to"),
        (5000, None, "window is 5000"),
        (8, 7, "stride is 7, expected 1 to 6"),
    ],
)
def test_windows_that_make_no_sense_are_refused(window: int, stride: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(
            EngineConfig("demo", n_threads=1),
            "here",
            [TEXT],
            window=window,
            stride=stride,
            show_progress=False,
        )


def test_models_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    other = EngineConfig(str(write_checkpoint(tmp_path)), n_threads=1)
    with pytest.raises(ConfigError, match="text 0 has other tokens"):
        run(EngineConfig("demo", n_threads=1), "here", [TEXT], against=other, show_progress=False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text(
        json.dumps({"text": "a\u2028b = 1\n"}, ensure_ascii=False) + "\n\n" + json.dumps({"text": TEXT})
    )
    command = ["eval", "perplexity", "--model", "demo", "--threads", "1", "--data", str(data)]
    output = tmp_path / "out.json"
    assert cli.main([*command, "--json", "--against", "demo", "--output-json", str(output)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(output.read_text())
    assert found["n_texts"] == 2 and found["against"]["greedy_agreement"] == 1
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert f"{found['bits_per_byte']:.5f}" in table and "stride" in table


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"\xff", "a.txt: not UTF-8 at byte 0"),
        ("a.jsonl", b'{"text": "x"}\nnonsense', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"data": "x"}', "a.jsonl:1: {'data': 'x'}, expected {\"text\": TEXT}"),
        ("a.txt", None, "a.txt: cannot be read"),
    ],
)
def test_bad_data_is_refused_in_one_line(
    name: str, data: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert cli.main(["eval", "perplexity", "--model", "demo", "--data", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
