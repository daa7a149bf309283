"""Documents are what a request would read and the target would write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pace import LLM, SamplingParams
from pace.errors import ConfigError
from pace.train.data import Line, Target, load_documents, read_lines
from pace.train.recipe import Data

BOS, END = 0, 5  # of the embedded model
MESSAGES = [{"role": "user", "content": "Write a function one:\nReturn 1."}]


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target("demo", 256, 1)
    yield target
    target.close()


def test_a_prompt_is_that_of_the_engine(target: Target) -> None:
    """Traps: the public trainer writes \\n as two characters, and BOS twice."""
    with_engine = LLM("demo", threads=1, max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=1)
    chat = with_engine.chat(MESSAGES, params)[0].prompt_token_ids
    text = with_engine.generate("def one():\n", params)[0].prompt_token_ids
    with_engine.close()
    assert target.prompt(Line(MESSAGES)) == list(chat or [])
    assert target.prompt(Line(prompt="def one():\n")) == list(text or [])
    assert list(chat or []).count(BOS) == list(text or []).count(BOS) == 1


def test_a_documents_answer_begins_and_ends_where_the_targets_does(target: Target) -> None:
    document = target.document(Line(MESSAGES, answer="return 1\n"))
    prompt = target.prompt(Line(MESSAGES))
    assert document.ids[: document.begin].tolist() == prompt and document.ids[-1] == END
    assert (document.ids[document.begin :] == END).sum() == 1
    document = target.document(Line(prompt="x = ", answer="1\n"))
    assert document.ids[-1] == BOS, "<|endoftext|> ends a text, too"
    assert target.document(Line(answer="x = 1\n")).begin == 1


def test_answers_are_the_targets_own_and_survive_a_kill(tmp_path: Path, target: Target) -> None:
    file, cache = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": "import os\n"}, {"messages": MESSAGES}, {"prompt": "class A:\n"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Data(file=str(file), max_tokens=12)
    documents = load_documents(source, target, cache, 0)
    with_engine = LLM("demo", threads=1, max_model_len=256)
    (output,) = with_engine.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12))
    with_engine.close()
    assert documents[1].ids[documents[1].begin :].tolist() == list(output.outputs[0].token_ids)
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) - 9])  # killed while it wrote the last line
    again = load_documents(source, target, cache, 0)
    assert [d.ids.tolist() for d in again] == [d.ids.tolist() for d in documents]
    assert cache.read_bytes() == whole


def test_every_form_of_line_is_read(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    rows = [
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "a"}]},
        {"prompt": "p", "completion": "c"},
        {"text": "t"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pard, chat, prompt, text = read_lines(str(file))
    assert pard == Line([{"role": "user", "content": "q"}], answer="a")
    assert chat == Line(MESSAGES, answer="a")
    assert prompt == Line(prompt="p", answer="c") and text == Line(answer="t")


@pytest.mark.parametrize(
    "row", ["[]", '{"a": 1}', '{"prompt": 1}', '{"messages": []}', "{", "3", '{"text": null}']
)
def test_a_wrong_line_is_named(tmp_path: Path, row: str) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "a"}\n' + row + "\n")
    with pytest.raises(
        ConfigError, match=r"lines\.jsonl:2: .*expected messages, conversation, prompt or text"
    ):
        list(read_lines(str(file)))


def test_what_the_template_refuses_is_named(tmp_path: Path, target: Target) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "a"}\n{"messages": [{"role": 3, "content": "a"}]}\n')
    for answers in ("file", "target"):
        with pytest.raises(ConfigError, match="document 2: "):
            load_documents(Data(file=str(file), answers=answers), target, tmp_path / "cache", 0)


def test_a_document_without_room_for_its_answer_is_left_out(tmp_path: Path, target: Target) -> None:
    file = tmp_path / "lines.jsonl"
    rows = [{"prompt": "x = 1\n" * 400, "completion": "y"}, {"prompt": "x", "completion": "y = 1\n" * 400}]
    file.write_text("\n".join(map(json.dumps, rows)))
    (document,) = load_documents(Data(file=str(file), answers="file"), target, tmp_path / "cache", 0)
    assert len(document.ids) == 256
