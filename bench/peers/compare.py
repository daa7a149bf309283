"""Alternate engines, one process at a time, and print medians per case with pace's ratio to the best of the others.

    python bench/peers/compare.py DIRECTORY --rounds 3 --engine pace=.venv/bin/python \\
        --engine amd_pace=amd/bin/python --engine vllm=vllm/bin/python

Each engine lives in an environment of its own; `run_NAME.py` beside this file drives it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent


def run(name: str, python: str, directory: str) -> dict[str, float]:
    """One process of one engine; its last RESULT line."""
    command = [python, str(HERE / f"run_{name}.py"), directory]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("RESULT "):
            result: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            return result
    sys.exit(f"{name} gave no result (exit {done.returncode}):\n{done.stderr[-3000:]}")


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--engine", action="append", required=True, metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    engines = dict(engine.split("=", 1) for engine in args.engine)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, python in engines.items():
            results[name].append(run(name, python, args.directory))
            print(name, {k: round(v, 1) for k, v in results[name][-1].items()}, flush=True)
    print(f"{'case':<14}" + "".join(f"{name:>12}" for name in engines) + f"{'ratio':>8}")
    for case in next(iter(results.values()))[0]:
        row = {name: median(r[case] for r in rounds) for name, rounds in results.items()}
        others = [value for name, value in row.items() if name != "pace"]
        ratio = f"{row['pace'] / max(others):8.2f}" if others and "pace" in row else ""
        print(f"{case:<14}" + "".join(f"{value:12.1f}" for value in row.values()) + ratio)


if __name__ == "__main__":
    main()
