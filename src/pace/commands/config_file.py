"""`--config FILE`: the options of a command in YAML, under the names of its flags."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from pace.commands import options
from pace.errors import ConfigError, show
from pace.vllm_names import ENGINE_OPTIONS

__all__ = ["merged"]


def merged(path: str, parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """A command's arguments: those of its file, and those given with it, which win.

    Args:
        path: of the file.
        parser: the command's.
        argv: the command's arguments.

    Raises:
        ConfigError: the file can't be read, or has an unknown key or a wrong value.
    """
    values = _read(path)
    namespace = argparse.Namespace()
    actions = {name[2:]: action for action in parser._actions for name in action.option_strings}
    actions |= {action.dest: action for action in parser._actions if not action.option_strings}
    for key, value in values.items():
        name = str(key).replace("_", "-")
        action = actions.get(name)
        if action is None or action.dest in ("help", "config"):
            known = ENGINE_OPTIONS.get(name.replace("-", "_"))
            instead = "expected the name of an option" if known is None else known.instead
            raise ConfigError(f"{path}: unknown key {show(key)}: {instead}")
        if value is not None:
            setattr(namespace, action.dest, _value(action, value, f"{path}: {key}"))
    model = getattr(namespace, "model", None)
    args, unknown = parser.parse_known_args(argv, namespace)
    if unknown:
        raise RuntimeError(f"{unknown}: the first reading has taken them")
    if getattr(args, "model", None) is None:  # a positional argument that is absent overwrites what is there
        args.model = model
    return args


def _read(path: str) -> Mapping[Any, Any]:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigError("--config needs PyYAML; install it with: pip install pyyaml") from None
    text = options.read_file(path)
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}"[:500]) from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: holds {show(values)}, expected names of options and their values")
    return values


def _value(action: argparse.Action, value: object, where: str) -> Any:
    """What the flag would have made of a value."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is {show(value)}, expected true or false")
        return value
    if action.nargs == "+" or isinstance(action.default, list):
        return [_one(action, item, where) for item in (value if isinstance(value, list) else [value])]
    return _one(action, json.dumps(value) if isinstance(value, Mapping) else value, where)


def _one(action: argparse.Action, value: object, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where} is {show(value)}, expected text or a number")
    result: Any = str(value)
    if callable(action.type):
        try:
            result = action.type(result)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from None
    if action.choices is not None and result not in action.choices:
        raise ConfigError(f"{where} is {show(value)}, expected {' or '.join(map(str, action.choices))}")
    return result
