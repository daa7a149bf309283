"""Alternate engines, one process at a time, and print medians per case with pace's ratios to the others.

    python bench/peers/compare.py DIRECTORY --rounds 3 --engine pace=.venv/bin/python \\
        --engine amd_pace=amd/bin/python --engine vllm=vllm/bin/python
    python bench/peers/compare.py DIRECTORY --suite throughput --cells 1x128 8x128 32x128 --engine …

Suites and cells are described in common.py. Each engine lives in an environment of its own; `run_NAME.py` beside this
file drives it and says how to install it. With one prompt of 1920 tokens in 6 seconds, a round of the cell 32x1920
takes three to five minutes per engine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from common import CELL_TOKENS, CELLS, SUITES, cell, lengths, split

HERE = Path(__file__).parent
OURS, RIVAL = "pace", "amd_pace"


def run(name: str, python: str, arguments: Sequence[str]) -> dict[str, float]:
    """One process of one engine; its last RESULT line."""
    command = [python, str(HERE / f"run_{name}.py"), *arguments]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("RESULT "):
            if done.returncode:
                print(
                    f"{name} ended with exit {done.returncode}; what it had measured counts", file=sys.stderr
                )
            result: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            return result
    sys.exit(f"{name} gave no result (exit {done.returncode}):\n{done.stderr[-3000:]}")


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """By case; what an engine could not do in a round is left out."""
    cases = dict.fromkeys(case for result in rounds for case in result)
    return {case: median(result[case] for result in rounds if case in result) for case in cases}


def ratio(ours: float | None, theirs: list[float]) -> str:
    """Our rate over the best of theirs."""
    return f"{ours / max(theirs):.2f}" if ours is not None and theirs else "-"


def table(rates: dict[str, dict[str, float]], suite: str) -> str:
    """Tokens/s by case and engine, and how many times those of the others pace reaches."""
    lines = [
        f"{'tokens/s':<14}" + "".join(f"{name:>12}" for name in rates) + f"{'to best':>10}{'to AMD':>10}"
    ]
    cases = list(dict.fromkeys(case for row in rates.values() for case in row))
    for case in cases:
        cells = [f"{row[case]:.1f}" if case in row else "-" for row in rates.values()]
        others = [row[case] for name, row in rates.items() if name != OURS and case in row]
        ours = rates.get(OURS, {}).get(case)
        rival = [rates[RIVAL][case]] if case in rates.get(RIVAL, {}) else []
        lines.append(
            f"{case:<14}"
            + "".join(f"{text:>12}" for text in cells)
            + f"{ratio(ours, others):>10}{ratio(ours, rival):>10}"
        )
    if suite == "throughput":
        lines += ["", f"{'seconds':<14}" + "".join(f"{name:>12}" for name in rates)]
        for case in cases:
            new_tokens = split(case)[0] * CELL_TOKENS
            cells = [f"{new_tokens / row[case]:.2f}" if case in row else "-" for row in rates.values()]
            lines.append(f"{case:<14}" + "".join(f"{text:>12}" for text in cells))
    return "\n".join(lines)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--engine", action="append", required=True, metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--suite", choices=SUITES, default="latency")
    parser.add_argument("--cells", nargs="+", type=cell, default=list(CELLS), metavar="SEQUENCESxPROMPT")
    lengths(parser)
    parser.add_argument("--vllm-eager", action="store_true", help="keep vLLM from torch.compile")
    args = parser.parse_args()
    engines = dict(engine.split("=", 1) for engine in args.engine)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, python in engines.items():
            arguments = [args.directory, "--suite", args.suite, "--cells", *args.cells]
            arguments += ["--prefill", *map(str, args.prefill), "--decode", *map(str, args.decode)]
            arguments += ["--eager"] if name == "vllm" and args.vllm_eager else []
            results[name].append(run(name, python, arguments))
            print(name, {k: round(v, 1) for k, v in results[name][-1].items()}, flush=True)
    print(table({name: medians(rounds) for name, rounds in results.items()}, args.suite))


if __name__ == "__main__":
    main()
