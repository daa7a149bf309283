"""Make prompts that ask for an edit of code, as editors and agents do: the answer is the given code with a name changed.

    python bench/code_edit_prompts.py FILE [N] [MODULE...]

Writes N (default 24) lines {"data": prompt} for `pace eval speculative`: functions of 10 to 25 lines of this Python's
standard library (of ten modules unless others are named), each with its most used parameter to be renamed. Nearly all of
the answer stands in the prompt.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

MODULES = (
    "textwrap",
    "bisect",
    "heapq",
    "shlex",
    "fnmatch",
    "statistics",
    "string",
    "calendar",
    "csv",
    "difflib",
)
LINES = range(10, 26)


def functions(module: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Top-level functions of a module with their source, without their docstrings."""
    source = Path(sysconfig.get_paths()["stdlib"], f"{module}.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or node.body
            yield ast.unparse(node), node


def prompts(modules: Sequence[str]) -> Iterator[str]:
    for module in modules:
        for source, node in functions(module):
            parameters = {argument.arg for argument in node.args.args}
            names = (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in parameters)
            used = Counter(names).most_common(1)
            if used and len(source.splitlines()) in LINES:
                name = used[0][0]
                yield (
                    f"Rename the parameter `{name}` to `{name}_value`. Answer with the whole function only.\n\n"
                    f"```python\n{source}\n```"
                )


def main() -> None:
    path, n = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 24
    lines = [
        json.dumps({"data": prompt})
        for prompt, _ in zip(prompts(sys.argv[3:] or MODULES), range(n), strict=False)
    ]
    path.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} prompts in {path}")


if __name__ == "__main__":
    main()
