"""`pace info`: the machine, as pace sees it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from pace.commands import options
from pace.console import out


def add(commands: Any) -> None:
    """Describe the command."""
    text = "show the CPU, the kernels that run on it, threads and versions"
    parser = options.add_command(commands, "info", run, text, "PACE_ISA=avx2 pace info --json")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    from pace import show_config

    config = show_config()
    if args.json:
        out(json.dumps(config, indent=2, default=str))
    else:
        out("\n".join(_tree(config)))
    return options.EXIT_OK


def _tree(values: dict[str, Any], indent: str = "") -> Iterator[str]:
    width = max((len(str(key)) for key in values), default=0)
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _tree(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple, set, frozenset)) else value
            yield f"{indent}{key!s:<{width}}  {text}"
