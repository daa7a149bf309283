"""Arguments that several commands share, and what becomes of them."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pace.config import (
    ACTIVATION_DTYPES,
    ADMISSIONS,
    KV_CACHE_DTYPES,
    KV_CACHE_TYPES,
    QUANTIZATIONS,
    EngineConfig,
    parse_cpus,
    parse_kernels,
)
from pace.console import OutputError, err
from pace.errors import ConfigError, RequestError, show
from pace.speculative_config import SpeculativeConfig

if TYPE_CHECKING:
    from pace.engine.memory import MemoryPlan
    from pace.llm import LLM
    from pace.outputs import RequestOutput
    from pace.params import SamplingParams

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

MAX_CODE_POINT = 0x10FFFF

MAX_PROMPT_BYTES = 256 << 20
"""Of a file or stdin; the tokenizer's own limit is far lower and depends on the model."""

ENGINE_FIELDS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_type",
    "block_size",
    "kv_cache_memory",
    "kv_cache_dtype",
    "quantization",
    "pack_cache",
    "activation_dtype",
    "enable_prefix_caching",
    "generation_config",
    "max_logprobs",
    "admission",
)
"""Options that go into `EngineConfig` under their own names."""

SAMPLING_FIELDS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "ignore_eos",
    "logprobs",
    "n",
)


# ---- describing ------------------------------------------------------------------------------------------


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
) -> Any:
    """A sub-command with its help and an example; `run` carries it out and returns the exit code."""
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_engine_options(
    parser: argparse.ArgumentParser, *, tokenizer: bool = True, positional: bool = False
) -> None:
    """What an engine is built from; where nothing is given, the command or `EngineConfig` decides.

    Args:
        positional: the model is the first argument, without its name; it may come from a file (`config_file`), so that the
            command has to look whether there is one.
    """
    group = parser.add_argument_group("model")
    text = "a checkpoint folder, a hub id org/name, or demo for the embedded model"
    if positional:
        group.add_argument("model", metavar="MODEL", nargs="?", help=text)
    else:
        group.add_argument("--model", required=True, help=text)
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    if tokenizer:
        group.add_argument("--tokenizer", metavar="DIR", help="take the tokenizer from there")
        group.add_argument(
            "--trust-tokenizer", action="store_true", help="skip the probe of an unusual tokenizer"
        )
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-model-len", type=positive, metavar="N", help="longest prompt and output, in tokens"
    )
    group.add_argument(
        "--max-num-seqs",
        type=positive,
        metavar="N",
        help="sequences that run together (default: 64, or what a benchmark needs)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=positive,
        metavar="N",
        help="tokens of one step (default: 2048, or what a benchmark needs)",
    )
    group.add_argument(
        "--generation-config",
        metavar="DIR",
        help="sampling defaults: auto takes the checkpoint's, vllm none, else the folder's (default: auto)",
    )
    group.add_argument(
        "--max-logprobs", type=int, metavar="N", help="most that --logprobs may be; -1: all (default: 20)"
    )
    group.add_argument(
        "--admission",
        choices=ADMISSIONS,
        help="start a request when its prompt fits, or when its longest output does (default: preempt)",
    )
    group.add_argument(
        "--threads", type=positive, metavar="N", help="default: the physical cores that are ours"
    )
    group.add_argument("--cpus", metavar="LIST", help="pin the threads to these CPUs, such as 0-3,8")
    group.add_argument(
        "--kernels", metavar="LIST", help="force kernels, such as attention=reference,gemm=avx2"
    )
    group.add_argument(
        "--speculative-config",
        metavar="JSON",
        help='guess tokens, such as \'{"method": "pard", "model": "demo-draft", "num_speculative_tokens": 8}\'; changes '
        "the speed, never the output",
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="round a bf16 checkpoint's matrices while it is loaded; int8-head: the LM head alone, also of a quantised "
        "checkpoint that leaves it in 16 bits (default: leave them)",
    )
    group.add_argument(
        "--pack-cache",
        metavar="DIR",
        help="keep packed weights there: written on first use, mapped from then on (default: pack them each time)",
    )
    group.add_argument(
        "--activation-dtype",
        choices=ACTIVATION_DTYPES,
        help="round rows to int8 where they meet integer matrices; auto: where that hardly changes outputs (default: auto)",
    )
    group = parser.add_argument_group("KV cache")
    group.add_argument("--kv-cache-type", choices=KV_CACHE_TYPES, help="default: slab")
    group.add_argument("--block-size", type=positive, metavar="N", help="tokens of a block, a power of two")
    group.add_argument(
        "--kv-cache-memory", metavar="SIZE", help="such as 4GiB; auto takes what is left beside the weights"
    )
    group.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, help="default: bf16")
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="keep computed prompts for requests with the same beginning (default: on)",
    )


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    group = parser.add_argument_group(
        "sampling", "What is not given comes from the checkpoint's generation_config.json."
    )
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default: {max_tokens}"
    )
    group.add_argument("--min-tokens", type=int, metavar="N")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the most probable token")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument("--presence-penalty", type=float, metavar="X")
    group.add_argument("--frequency-penalty", type=float, metavar="X")
    group.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="makes the output repeatable (default: another one each time, told with the tokens/s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        type=unescape,
        metavar="TEXT",
        help=r"ends the output; may be repeated; \n, \t, \r, \\, \xNN, \uNNNN and \UNNNNNNNN are escapes",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", default=None, help="don't stop where the model does"
    )


def positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def engines(text: str) -> int | None:
    """How many engines; None: one per NUMA node."""
    return None if text == "auto" else positive(text)


def add_data_parallel(group: Any) -> None:
    """`--data-parallel`, of commands whose engines are processes."""
    group.add_argument(
        "--data-parallel",
        type=engines,
        default=None,
        metavar="N",
        help="engines, each a process with its own copy of the model; auto: one per NUMA node (default: auto)",
    )


def unescape(text: str) -> str:
    r"""What a text with `\n`, `\t`, `\r`, `\\`, `\xNN`, `\uNNNN` and `\UNNNNNNNN` stands for; other backslashes stay."""

    def char(match: re.Match[str]) -> str:
        if match["simple"]:
            return {"n": "\n", "t": "\t", "r": "\r"}.get(match["simple"], match["simple"])
        code = int(match["hex"][1:], 16)
        return chr(code) if code <= MAX_CODE_POINT else match[0]

    return re.sub(
        r"\\(?:(?P<simple>[ntr\\])|(?P<hex>x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}))",
        char,
        text_argument(text),
    )


def text_argument(text: str) -> str:
    """An argument as UTF-8, which Python reads as surrogates in a locale that is ASCII only."""
    try:
        return text if not re.search("[\udc80-\udcff]", text) else os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None


# ---- using -----------------------------------------------------------------------------------------------


def engine_config(args: argparse.Namespace, **defaults: Any) -> EngineConfig:
    """The configuration that the options describe; `defaults` are the command's own.

    Raises:
        ConfigError: an option is out of range.
    """
    given = {name: value for name in ENGINE_FIELDS if (value := getattr(args, name)) is not None}
    return EngineConfig(
        model=args.model,
        revision=args.revision,
        tokenizer=getattr(args, "tokenizer", None),
        trust_tokenizer=getattr(args, "trust_tokenizer", False),
        n_threads=args.threads,
        cpus=None if args.cpus is None else parse_cpus(args.cpus),
        kernels={} if args.kernels is None else parse_kernels(args.kernels),
        speculative=_speculative(getattr(args, "speculative_config", None)),
        **(defaults | given),
    )


def _speculative(text: str | None) -> SpeculativeConfig | None:
    """What --speculative-config says.

    Raises:
        ConfigError: it is no JSON object, or has a wrong field.
    """
    if text is None:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--speculative-config is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--speculative-config is {show(values)}, expected an object")
    return SpeculativeConfig.read(values)


def load_llm(args: argparse.Namespace) -> LLM:
    """Load the model; says what memory it takes before it takes it, unless --no-stats."""
    from pace import LLM  # brings the tokenizer's parts and the engine; `pace --help` needs neither
    from pace.speculative import load

    config = engine_config(args)
    return LLM.from_loaded(config, load(config, on_plan=print_plan if args.stats else None))


def print_plan(plan: MemoryPlan) -> None:
    """What an engine is about to allocate, on stderr."""
    err(f"[memory: {plan.describe()}]")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What was given of the sampling options, and a seed; the rest stays with the checkpoint's defaults.

    Raises:
        RequestError: a value is out of range.
    """
    from pace.params import SamplingParams

    given = {name: getattr(args, name, None) for name in SAMPLING_FIELDS}
    if args.seed is None:
        given["seed"] = draw_seed()
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def draw_seed() -> int:
    """A seed that nobody has asked for: whoever calls a program again wants another sample."""
    return int.from_bytes(os.urandom(4), "little")


def parse_json(text: str, where: str, kind: type) -> Any:
    """The dict or list that a text holds; `where` says where it comes from.

    Raises:
        RequestError: it holds something else.
    """
    expected = "an object" if kind is dict else "a list"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON: {error}; expected {expected}") from None
    if not isinstance(value, kind):
        raise RequestError(f"{where}: holds {show(value)}, expected {expected}")
    return value


def read_file(name: str) -> str:
    """The text of a file.

    Raises:
        RequestError: it can't be read, or is not UTF-8.
    """
    try:
        with Path(name).open("rb") as file:
            return decode(file.read(MAX_PROMPT_BYTES), name)
    except OSError as error:
        raise RequestError(f"{name}: cannot be read: {error.strerror or error}") from None


def decode(data: bytes, where: str) -> str:
    """Bytes from `where` as text, without the byte order mark that some editors write, and the last line's end.

    Raises:
        RequestError: they are neither UTF-8 nor, with a byte order mark, UTF-16.
    """
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise RequestError(f"{where}: not {name} at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")  # what editors and echo add


def check_folder(name: str | None) -> None:
    """Find out before long work whether there is a place for the file that it ends in.

    Raises:
        ConfigError: there is none.
    """
    if name is not None and not Path(name).absolute().parent.is_dir():
        raise ConfigError(f"{name}: its folder does not exist; create it or choose another")


def write_file(name: str, text: str) -> None:
    """Make a file of this text.

    Raises:
        OutputError: it can't be written.
    """
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{name}: cannot be written: {error.strerror or error}") from None


def stats_line(
    outputs: list[RequestOutput], run_s: float, load_s: float | None = None, seed: int | None = None
) -> str:
    """How many tokens came how fast, and from which seed."""
    n_prompt = sum(output.metrics.n_prompt_tokens for output in outputs)
    n_output = sum(output.metrics.n_output_tokens for output in outputs)
    parts = [] if load_s is None else [f"loaded in {load_s:.2f} s"]
    parts.append(f"{n_prompt} prompt tokens, {n_output} new tokens in {run_s:.2f} s")
    if len(outputs) == 1:
        first, rate = outputs[0].metrics.time_to_first_token_s, outputs[0].metrics.decode_tokens_per_s
        parts += [] if first is None else [f"first token after {first:.3f} s"]
        parts += [] if rate is None else [f"{rate:.1f} tokens/s"]
    else:
        parts.append(f"{n_output / run_s:.1f} tokens/s")
    parts += [] if seed is None else [f"seed {seed}"]
    return f"[{'; '.join(parts)}]"
