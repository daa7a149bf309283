"""Cut the corpus into prompts, which the target answers when the embedded draft is trained (`pace train pard`).

A prompt is the beginning of a passage, from any line or half of the time from an unindented one, the question of a chat, or
a function's head with its docstring, to be completed. Prompts of held-out files go to a file of their own, and
`held_out.txt` names those files.

    python demo/prompts.py --work build/demo
"""

from __future__ import annotations

import argparse
import ast
import json
import random
from pathlib import Path

from train_tokenizer import read_corpus

SEED = 20
N_PROMPTS = {"train": 2500, "valid": 80}
CHAT_SHARE = 0.1
COMPLETION_SHARE = 0.2  # in the words of PARD's HumanEval file, whose functions are not among them
COMPLETION = "Complete the code I provided.\n"
PROMPT_CHARS = (80, 500)  # about 25 to 145 tokens; a passage goes on for at least as long again


def passage(text: str, rng: random.Random) -> str:
    """Between 80 and 800 characters of `text` that begin with a line."""
    size = rng.randint(*PROMPT_CHARS)
    lines = text[: max(1, len(text) - size)].splitlines(keepends=True)
    unindented = [i for i, line in enumerate(lines) if not line[0].isspace()]
    begin = rng.choice(unindented) if unindented and rng.random() < 0.5 else rng.randrange(len(lines))
    at = sum(map(len, lines[:begin]))
    return text[at : at + size]


def head(function: str) -> str | None:
    """The source of a documented function up to the end of its docstring; None where it can't be parsed by itself."""
    try:
        node = ast.parse(function).body[0]
    except SyntaxError:  # a text inside it goes further left than the function
        return None
    docstring = node.body[0] if isinstance(node, ast.FunctionDef) else node
    return "".join(function.splitlines(keepends=True)[: docstring.end_lineno])


def main() -> None:
    """Write ``prompts_train.jsonl``, ``prompts_valid.jsonl`` and ``held_out.txt``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder with corpus.jsonl")
    args = parser.parse_args()
    documents = list(read_corpus(args.work))
    for split, n_prompts in N_PROMPTS.items():
        rng = random.Random(f"{SEED} {split}")
        chats = [d for d in documents if d["split"] == split and d["kind"] == "chat"]
        questions = [d["question"] for d in chats]
        completions = [COMPLETION + text for d in chats if (text := head(d["text"])) is not None]
        texts = [d["text"] for d in documents if d["split"] == split and d["kind"] != "chat"]
        sizes = [len(text) for text in texts]
        rows: list[dict[str, object]] = []
        for _ in range(n_prompts):
            kind = rng.random()
            if kind < CHAT_SHARE + COMPLETION_SHARE:
                content = rng.choice(questions if kind < CHAT_SHARE else completions)
                rows.append({"messages": [{"role": "user", "content": content}]})
            else:
                rows.append({"prompt": passage(rng.choices(texts, sizes)[0], rng)})
        path = args.work / f"prompts_{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    held_out = sorted({d["path"] for d in documents if d["split"] == "valid"})
    (args.work / "held_out.txt").write_text("\n".join(held_out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
