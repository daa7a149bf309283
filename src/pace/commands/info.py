"""`pace info`: the machine, as pace sees it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, TextIO

from pace.commands import options


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
        print(json.dumps(config, indent=2, default=str))
    else:
        _print_tree(config, sys.stdout)
    return options.EXIT_OK


def _print_tree(values: dict[str, Any], out: TextIO, indent: str = "") -> None:
    width = max((len(str(key)) for key in values), default=0)
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}", file=out)
            _print_tree(value, out, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple, set, frozenset)) else value
            print(f"{indent}{key!s:<{width}}  {text}", file=out)
