"""Make the prompts of the real model's PARD draft: what `bench/real_draft.toml` trains on, and what it never sees.

    python bench/real_draft_prompts.py DATA WORK

DATA holds `humaneval.jsonl`, `gsm8k.jsonl` and `math_500.jsonl` in PARD's form, {"data": prompt}. Every fourth prompt
of each is held out, as `WORK/held_out_NAME.jsonl` for `pace eval speculative` and all together as `WORK/held_out.jsonl` for
`pace train pard`. `WORK/train.jsonl` has the other prompts, those of arithmetic again with other numbers, and documented
functions of this Python's standard library to be completed in its words; in random order.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SEED = 13
HELD_OUT = 4  # every fourth
VARIANTS = {"gsm8k": 8, "math_500": 16}  # of a prompt, with other numbers
N_FUNCTIONS = 600
COMPLETION = "Complete the code I provided.\n\n"  # as PARD's HumanEval prompts begin
FUNCTION_CHARS = range(120, 900)


def read(path: Path) -> list[str]:
    """The prompts of a file in PARD's form."""
    return [json.loads(line)["data"] for line in path.read_text().splitlines() if line.strip()]


def renumbered(prompt: str, rng: random.Random) -> str:
    """`prompt` with every number above 2 replaced by one of as many digits: other sums in the same words."""

    def other(match: re.Match[str]) -> str:
        digits = match[0]
        if int(digits) <= 2:
            return digits  # "1 of the 2" and exponents keep their sense
        return str(rng.randint(max(3, 10 ** (len(digits) - 1)), 10 ** len(digits) - 1))

    return re.sub(r"\d+", other, prompt)


def heads() -> Iterator[str]:
    """The heads of the standard library's documented top-level functions, up to the end of the docstring."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                head = "".join(lines[node.lineno - 1 : node.body[0].end_lineno])
                if len(head) in FUNCTION_CHARS:
                    yield head


def write(path: Path, lines: list[dict[str, object]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines)} prompts in {path}")


def chat(prompt: str) -> dict[str, object]:
    """A line of `pace train pard`'s data."""
    return {"messages": [{"role": "user", "content": prompt}]}


def main() -> None:
    """Write the files."""
    data, work = Path(sys.argv[1]), Path(sys.argv[2])
    work.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    learnt, held_out = [], []
    for name in ("humaneval", "gsm8k", "math_500"):
        prompts = read(data / f"{name}.jsonl")
        own = prompts[HELD_OUT - 1 :: HELD_OUT]
        write(work / f"held_out_{name}.jsonl", [{"data": prompt} for prompt in own])
        held_out += own
        for prompt in prompts:
            if prompt not in own:
                learnt += [prompt, *(renumbered(prompt, rng) for _ in range(VARIANTS.get(name, 0)))]
    functions = list(heads())
    learnt += [COMPLETION + head for head in rng.sample(functions, min(N_FUNCTIONS, len(functions)))]
    rng.shuffle(learnt)
    rng.shuffle(held_out)
    write(work / "train.jsonl", [chat(prompt) for prompt in learnt])
    write(work / "held_out.jsonl", [chat(prompt) for prompt in held_out])


if __name__ == "__main__":
    main()
