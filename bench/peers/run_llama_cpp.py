"""llama.cpp over a BF16 GGUF file, through its own llama-batched-bench, which times prompt and decode apart.

Build it from the source tree (the sdist of llama-cpp-python has one in vendor/llama.cpp):

    cmake -B BUILD -DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
    cmake --build BUILD --target llama-batched-bench

Make the file DIRECTORY/model-bf16.gguf with the tree's converter, in an environment with its requirements:

    python convert_hf_to_gguf.py DIRECTORY --outtype bf16 --outfile DIRECTORY/model-bf16.gguf

or, of a checkpoint whose tokenizer the converter does not know, with make_gguf.py beside this file. Any Python runs
this script; LLAMA_CPP_BIN names the folder of the binary (BUILD/bin), LLAMA_CPP_THREADS its threads where its default
is not wanted. Its KV cache stays f16, its default. LLAMA_CPP_MODEL names another file, such as what llama-quantize made
of that one, to stand beside a checkpoint that `pace quantize` wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import common


def bench(directory: str, n_seqs: int, n_prompts: list[int], n_new: int) -> list[dict[str, float]]:
    """One process: a row for each of the prompt lengths, with t_pp, t_tg and t in seconds."""
    binary = Path(os.environ.get("LLAMA_CPP_BIN", ".")) / "llama-batched-bench"
    model = os.environ.get("LLAMA_CPP_MODEL") or str(Path(directory) / "model-bf16.gguf")
    command = [str(binary), "-m", model, "--output-format", "jsonl", "-ntg", str(n_new)]
    command += ["-npp", ",".join(map(str, n_prompts)), "-npl", str(n_seqs)]
    command += ["-c", str(n_seqs * -(-(max(n_prompts) + n_new) // 256) * 256)]
    if "LLAMA_CPP_THREADS" in os.environ:
        command += ["-t", os.environ["LLAMA_CPP_THREADS"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(rows) != len(n_prompts):
        sys.exit(f"{' '.join(command)} failed (exit {done.returncode}):\n{done.stderr[-3000:]}")
    return rows


def main() -> None:
    """Measure what compare.py asks for."""
    args = common.arguments()
    result: dict[str, float] = {}
    if args.suite == "throughput":
        for name in args.cells:
            n_seqs, n_prompt = common.split(name)
            (row,) = bench(args.directory, n_seqs, [n_prompt], common.CELL_TOKENS)
            result[name] = n_seqs * common.CELL_TOKENS / row["t"]
            common.report(result)
        return
    if args.suite == "latency":
        lengths = [n for n in args.prefill for _ in range(common.REPEAT)]
        rows = bench(args.directory, 1, lengths, 1)
        for n in args.prefill:
            times = [row["t_pp"] for row, length in zip(rows, lengths, strict=True) if length == n]
            result[f"prefill {n}"] = n / median(times)
    n_steps = common.NEW_TOKENS - 1
    for batch in args.decode:
        rows = bench(args.directory, batch, [common.DECODE_PROMPT] * common.REPEAT, n_steps)
        result[f"decode {batch}"] = batch * n_steps / median(row["t_tg"] for row in rows)
    common.report(result)


if __name__ == "__main__":
    main()
