"""`pace pack`: a copy of a checkpoint that starts at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pace.commands import options
from pace.config import QUANTIZATIONS
from pace.console import out


def add(commands: Any) -> None:
    """Describe the command."""
    text = (
        "write a copy of a checkpoint whose weights are packed as the kernels read them, and mapped, not read"
    )
    parser = options.add_command(
        commands, "pack", run, text, "pace pack ./Llama-3.2-1B ./Llama-3.2-1B-packed"
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, or a name of the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="round a bf16 checkpoint's matrices (default: leave them)",
    )
    parser.add_argument(
        "--trust-tokenizer", action="store_true", help="skip the probe of an unusual tokenizer"
    )
    parser.add_argument(
        "--threads", type=options.positive, metavar="N", help="default: the physical cores that are ours"
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    from pace.config import EngineConfig
    from pace.export.pack import pack_checkpoint

    config = EngineConfig(
        args.model,
        revision=args.revision,
        quantization=args.quantization,
        trust_tokenizer=args.trust_tokenizer,
        n_threads=args.threads,
    )
    n_bytes = pack_checkpoint(config, args.out)
    out(f"{args.out}: {n_bytes / 1e6:.1f} MB of packed weights")
    return options.EXIT_OK
