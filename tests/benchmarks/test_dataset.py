"""What a throughput benchmark asks for: lengths, shared prefixes, and files that hold something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pace.benchmarks import dataset
from pace.errors import RequestError


def test_random_requests_share_a_prefix() -> None:
    shapes = dataset.random_shapes(50, 20, 10, prefix_len=7, range_ratio=0.5, seed=3)
    requests = dataset.random_requests(shapes, 1000, seed=3)
    assert requests == dataset.random_requests(shapes, 1000, seed=3)
    assert len({tuple(request.prompt[:7]) for request in requests}) == 1
    assert {len(request.prompt) - 7 for request in requests} <= set(range(10, 31))
    assert len({request.output_len for request in requests}) > 5
    assert {request.output_len for request in requests} <= set(range(5, 16))
    for request in requests:
        assert not isinstance(request.prompt, str) and max(request.prompt) < 1000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "f:2: not JSON"),
        ("[1]", "f:2: [1], expected an object"),
        ("{}", "f:2: the prompt is None"),
        ('{"prompt": 3, "max_tokens": 1}', "the prompt is 3"),
        ('{"prompt_token_ids": [1, "a"], "max_tokens": 1}', "the prompt is"),
        ('{"prompt_token_ids": [], "max_tokens": 1}', "the prompt is []"),
        ('{"prompt": "a"}', "max_tokens is None"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens is True"),
        ("", "holds 1 requests, expected 2"),
    ],
)
def test_lines_that_are_no_requests(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f").write_text(f'{{"prompt": "a", "max_tokens": 1}}\n{line}\n')
    with pytest.raises(RequestError) as error:
        dataset.read_jsonl("f", 2)
    assert message in str(error.value) and "\n" not in str(error.value)
    Path("marked").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}')
    assert len(dataset.read_jsonl("marked")) == 1
    Path("empty").write_text("\n")
    Path("latin").write_bytes(b"\xff")
    for name, reason in (("empty", "holds no requests"), ("latin", "not UTF-8 at byte 0")):
        with pytest.raises(RequestError, match=reason):
            dataset.read_jsonl(name)
