"""Collect the training corpus: the Python standard library of the interpreter that runs this script.

Three kinds of document come out, one JSON object per line:

``module``  a library module, whole (the part the model is meant to know);
``test``    a file of the library's own test-suite (volume: twice the text of the modules);
``chat``    one turn made from a documented function: its name and docstring asked for, its source answered,
            so that the chat template's tokens mean something to the model.

Every ``HOLDOUT``-th file, chosen by a hash of its path, goes to the validation split with everything made
from it.

    python demo/corpus.py --out build/demo
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HOLDOUT = 50  # one file in 50 is validation: about 0.6 MB, enough for a loss to three digits
MAX_FILE_BYTES = 320_000  # larger files are generated data (pydoc_data/topics.py, 757 kB)
MIN_WORD_SHARE = 0.55  # letters and white space; code has 0.75-0.9, tables of escapes and numbers 0.1-0.5
MAX_ANSWER_LINES = 60  # a chat answer should end within the context the model trains at
SKIP_PARTS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3"}
TEST_PARTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Document:
    """One training document; ``question`` is empty unless ``kind`` is ``chat``."""

    path: str
    kind: str
    split: str
    text: str
    question: str = ""


def word_share(text: str) -> float:
    """Share of letters and white space among the characters of `text`, 0 for an empty text."""
    return sum(c.isalpha() or c.isspace() for c in text) / len(text) if text else 0.0


def read_source(path: Path) -> str | None:
    """Source of a module by its declared encoding, or None when it is no text to learn from."""
    if path.stat().st_size > MAX_FILE_BYTES:
        return None
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeDecodeError):  # the test-suite ships files that are broken on purpose
        return None
    return text if len(text) > 200 and word_share(text) >= MIN_WORD_SHARE else None


def chat_turns(source: str) -> Iterator[tuple[str, str]]:
    """(question, answer) for each documented function of a module: what a user might ask, and its source."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        doc = ast.get_docstring(node)
        n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if not doc or not 3 <= n_lines <= MAX_ANSWER_LINES:
            continue
        wish = " ".join(doc.split("\n\n")[0].split())
        if not 15 <= len(wish) <= 300:
            continue
        answer = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        yield f"Write a function {node.name}: {wish}", answer + "\n"


def collect(root: Path) -> Iterator[Document]:
    """Documents of the library under `root`, files in path order, so that a corpus is reproducible."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIP_PARTS.intersection(parts):
            continue
        text = read_source(path)
        if text is None:
            continue
        name = "/".join(parts)
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        split = "valid" if digest % HOLDOUT == 0 else "train"
        kind = "test" if TEST_PARTS.intersection(parts) else "module"
        yield Document(name, kind, split, text)
        if kind == "module":
            for question, answer in chat_turns(text):
                yield Document(name, "chat", split, answer, question)


def main() -> None:
    """Write ``corpus.jsonl`` and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for corpus.jsonl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    with (args.out / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for document in collect(Path(sysconfig.get_path("stdlib"))):
            file.write(json.dumps(asdict(document)) + "\n")
            n_documents, n_chars = counts.get((document.kind, document.split), (0, 0))
            counts[document.kind, document.split] = (n_documents + 1, n_chars + len(document.text))
    print(f"Python {sys.version.split()[0]}")
    for (kind, split), (n_documents, n_chars) in sorted(counts.items()):
        print(f"{kind:8s}{split:8s}{n_documents:7d} documents{n_chars:12d} characters")


if __name__ == "__main__":
    main()
