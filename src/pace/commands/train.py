"""`pace train …`: adapt a draft model."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from pace.commands import options
from pace.console import out
from pace.errors import ConfigError


def add(commands: Any) -> None:
    """Describe the commands."""
    train = commands.add_parser("train", help="adapt a draft model")
    trainings = train.add_subparsers(metavar="METHOD", required=True)
    parser = options.add_command(
        trainings,
        "pard",
        run_pard,
        "teach a small model to guess several tokens in one pass, for --speculative-config with the method pard",
        "pace train pard --config recipe.toml --out my-draft",
    )
    parser.add_argument(
        "--config", required=True, metavar="TOML", help="the recipe; docs/training.md describes it"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the run, which an interrupted one goes on from; the checkpoint is its `draft` (default: the "
        "recipe's name without its ending)",
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def run_pard(args: argparse.Namespace) -> int:
    """Carry `pace train pard` out."""
    missing = [name for name in ("torch", "transformers", "matplotlib") if not _is_there(name)]
    if missing:
        raise ConfigError(f"training needs {' and '.join(missing)}; pip install 'pace[train]'")
    from pace.train.recipe import read_recipe

    config = Path(args.config)
    folder = Path(args.out) if args.out is not None else config.with_suffix("")
    recipe = read_recipe(config)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, expected a folder for the run; name another with --out")
    from pace.train.trainer import DRAFT, train  # torch: seconds

    acceptance = train(recipe, folder)
    draft = folder / DRAFT
    if args.json:
        held_out = None if acceptance is None else acceptance.to_json()
        out(json.dumps({"draft": str(draft), "held_out": held_out}, indent=2))
        return options.EXIT_OK
    out(f"draft: {draft}")
    if acceptance is not None:
        rates = " ".join(f"{rate:.3f}" for rate in acceptance.by_depth)
        out(
            f"held out: acceptance length {acceptance.length:.2f} at K = {recipe.cod.k}; by position: {rates}"
        )
    return options.EXIT_OK


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
