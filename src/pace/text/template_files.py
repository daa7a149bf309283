"""Where a checkpoint keeps its chat templates, in all the forms that files have had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pace.checkpoint.config_json import checkpoint_file, read_file, read_json
from pace.errors import ChatTemplateError, show

__all__ = ["MAX_TEMPLATE_BYTES", "find_templates", "read_template"]

MAX_TEMPLATE_BYTES = 1 << 20  # the longest published ones are below 30 kB
MAX_TEMPLATES = 64

DEFAULT = "default"


def find_templates(directory: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """All chat templates of a checkpoint, by name; the only one is called "default".

    As in transformers, files take the place of tokenizer_config.json: `chat_template.jinja` is the default, and
    `additional_chat_templates/NAME.jinja` are the others. Older forms are `chat_template` of tokenizer_config.json: a
    text, an object of names and texts, or a list of {"name": …, "template": …}; and the same in chat_template.json.

    Args:
        directory: the folder to look in.
        tokenizer_config: the parsed tokenizer_config.json.

    Raises:
        ChatTemplateError: a template has a wrong type or encoding.
        CheckpointError: a file can't be read.
    """
    named = _files(directory)
    if DEFAULT in named:
        return named
    older = _named(directory / "tokenizer_config.json", tokenizer_config.get("chat_template"))
    if not older:
        path = checkpoint_file(directory, "chat_template.json")
        older = {} if path is None else _named(path, read_json(path).get("chat_template"))
    return older | named


def _files(directory: Path) -> dict[str, str]:
    named = {}
    path = checkpoint_file(directory, "chat_template.jinja")
    if path is not None:
        named[DEFAULT] = read_template(path)
    folder = directory / "additional_chat_templates"
    if folder.is_dir():
        names = sorted(path.name for path in folder.glob("*.jinja"))
        if len(names) > MAX_TEMPLATES:
            raise ChatTemplateError(
                f"{folder}: holds {len(names)} templates, expected at most {MAX_TEMPLATES}"
            )
        for name in names:
            path = checkpoint_file(folder, name)
            if path is not None:
                named[name.removesuffix(".jinja")] = read_template(path)
    return named


def read_template(path: Path) -> str:
    """A file's template.

    Raises:
        ChatTemplateError: not UTF-8.
        CheckpointError: the file can't be read.
    """
    try:
        return read_file(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ChatTemplateError(f"{path}: not UTF-8 at byte {error.start}") from None


def _named(path: Path, value: object) -> dict[str, str]:
    """Read `chat_template` of a JSON file, in any of its forms."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    items: list[Any] = [value]
    if isinstance(value, dict):
        items = [{"name": name, "template": template} for name, template in value.items()]
    elif isinstance(value, list):
        items = value
    if not 0 < len(items) <= MAX_TEMPLATES:
        raise ChatTemplateError(
            f"{path}: chat_template has {len(items)} entries, expected 1 to {MAX_TEMPLATES}"
        )
    named: dict[str, str] = {}
    for item in items:
        if not isinstance(item, dict) or not all(
            isinstance(item.get(key), str) for key in ("name", "template")
        ):
            raise ChatTemplateError(
                f"{path}: chat_template has {show(item)}, expected a text, or names and templates"
            )
        if item["name"] in named:
            raise ChatTemplateError(f"{path}: chat_template names {show(item['name'])} twice")
        named[item["name"]] = item["template"]
    return named
