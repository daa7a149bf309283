"""`pace quantize`: a quantised copy of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pace.commands import options
from pace.commands.texts import read_texts
from pace.console import out, progress_bar
from pace.errors import ConfigError

METHODS = ("nearest", "gptq")
SCHEMES = ("w8", "w8g32", "w8g64", "w8g128", "w4g32", "w4g64", "w4g128", "fp8")


def add(commands: Any) -> None:
    """Describe the command."""
    text = "write a quantised copy of a checkpoint, in compressed-tensors' format"
    example = "pace quantize ./Llama-3.2-1B ./Llama-3.2-1B-w4g64 --scheme w4g64"
    parser = options.add_command(commands, "quantize", run, text, example)
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name of the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument(
        "--scheme",
        required=True,
        choices=SCHEMES,
        help="bits of a weight and columns that share a scale: w8 and fp8 have one scale a row",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        type=_kept,
        metavar="PATTERN=bf16|int8",
        help="what layers become instead whose names fit, '*.down_proj=int8' for instance; may be repeated",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="nearest",
        help="nearest (default): each weight to the nearest step; gptq: so that outputs change least on a text",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help='the text that gptq reads: .txt, or .jsonl of {"text": TEXT}',
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="tokens of it that are read, spread over all; default: 16384",
    )
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="that round; default: the engine's"
    )


def _kept(text: str) -> tuple[str, str]:
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern or kind not in ("bf16", "int8"):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=bf16 or PATTERN=int8")
    return pattern, kind


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    from pace.export import Calibration, quantize_checkpoint

    calibration = None
    if (args.method == "gptq") != (args.calibration is not None):
        raise ConfigError(f"--method is {args.method}; --method gptq and --calibration FILE go together")
    if args.calibration_tokens < 1:
        raise ConfigError(f"--calibration-tokens is {args.calibration_tokens}, expected 1 or more")
    if args.calibration is not None:
        calibration = Calibration(read_texts(args.calibration), args.calibration_tokens)
    bar = progress_bar(None, desc="quantising", unit="B", unit_scale=True, leave=False)

    def progress(done: int, total: int) -> None:
        if bar is not None:
            bar.total = total
            bar.update(done - bar.n)

    try:
        summary = quantize_checkpoint(
            args.model, args.out, args.scheme, args.keep, progress, args.threads, calibration
        )
    finally:
        if bar is not None:
            bar.close()
    out(
        f"{args.out}: {summary.n_bytes / 1e6:.1f} MB of {summary.source_bytes / 1e6:.1f}; {summary.n_weights / 1e6:.1f} M "
        f"weights in {summary.bits:.2f} bits, signal to noise {summary.snr:.1f} dB"
    )
    if summary.kept:
        out(f"left as they were: {', '.join(summary.kept[:4])}" + (" ..." if len(summary.kept) > 4 else ""))
    return options.EXIT_OK
