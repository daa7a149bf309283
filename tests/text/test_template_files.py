"""A checkpoint's templates are found in every form that its files may have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pace.errors import ChatTemplateError
from pace.text.template_files import find_templates

NAMED = {"default": "D", "tool_use": "T"}
LISTED = [{"name": name, "template": text} for name, text in NAMED.items()]


def additional(folder: Path, **templates: str) -> None:
    (folder / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)


@pytest.mark.parametrize(
    ("value", "found"), [("x", {"default": "x"}), (NAMED, NAMED), (LISTED, NAMED), (None, {})]
)
def test_forms_of_the_config(tmp_path: Path, value: Any, found: dict[str, str]) -> None:
    assert find_templates(tmp_path, {"chat_template": value}) == found
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": value}))
    assert find_templates(tmp_path, {}) == found
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "other"}))
    assert find_templates(tmp_path, {"chat_template": value}) == (found or {"default": "other"})


def test_files_take_the_place_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_templates(tmp_path, {"chat_template": NAMED}) == {"default": "file"}
    additional(tmp_path, tool_use="T2", rag="R")
    assert find_templates(tmp_path, {"chat_template": NAMED}) == {
        "default": "file",
        "tool_use": "T2",
        "rag": "R",
    }


def test_additional_files_beside_an_older_default(tmp_path: Path) -> None:
    additional(tmp_path, rag="R")
    assert find_templates(tmp_path, {"chat_template": "D"}) == {"default": "D", "rag": "R"}
    assert find_templates(tmp_path, {}) == {"rag": "R"}


@pytest.mark.live
@pytest.mark.parametrize("form", ["text", "list", "files"])
def test_as_transformers(tmp_path: Path, form: str) -> None:
    transformers = pytest.importorskip("transformers")
    from text.kit import byte_level, save

    value = {"text": "D", "list": LISTED, "files": None}[form]
    save(tmp_path, byte_level(), {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": value})
    if form == "files":
        (tmp_path / "chat_template.jinja").write_text("D")
        additional(tmp_path, tool_use="T")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = find_templates(tmp_path, {"chat_template": value})
    expected = theirs.chat_template
    assert found == ({"default": expected} if isinstance(expected, str) else expected)


@pytest.mark.parametrize(
    "value", [5, {}, [], [1], [{"name": "x"}], {"x": 1}, [{"name": "default", "template": "y"}] * 2,
              [{"name": str(i), "template": ""} for i in range(65)]],
)  # fmt: skip
def test_bad_values_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ChatTemplateError) as error:
        find_templates(tmp_path, {"chat_template": value})
    assert "\n" not in str(error.value) and "tokenizer_config.json" in str(error.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    additional(tmp_path, **{f"t{i}": "" for i in range(65)})
    with pytest.raises(ChatTemplateError, match="65 templates"):
        find_templates(tmp_path, {})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ChatTemplateError, match="UTF-8"):
        find_templates(tmp_path, {})
