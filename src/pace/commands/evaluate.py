"""`pace eval …`: how well a model predicts a text, and a draft the model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pace.commands import options
from pace.commands.texts import read_jsonl, read_texts
from pace.config import KV_CACHE_DTYPES, parse_cpus
from pace.console import out
from pace.errors import ConfigError
from pace.speculative_config import MAX_DRAFT_TOKENS, METHODS, NEEDS_MODEL


def add(commands: Any) -> None:
    """Describe the commands."""
    evaluate = commands.add_parser("eval", help="measure how good predictions of texts and drafts are")
    evaluations = evaluate.add_subparsers(metavar="EVALUATION", required=True)
    _add_perplexity(evaluations)
    _add_speculative(evaluations)


def _add_perplexity(commands: Any) -> None:
    parser = options.add_command(
        commands,
        "perplexity",
        run_perplexity,
        "measure how well a model predicts a text, and how far it is from another one",
        "pace eval perplexity --model ./Llama-3.2-1B --kv-cache-dtype int8 --data book.txt --against ./Llama-3.2-1B",
    )
    options.add_engine_options(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help='UTF-8 text, or JSONL with one {"text": ...} a line: each is scored by itself',
    )
    group.add_argument(
        "--window",
        type=options.positive,
        metavar="N",
        help="tokens read at once (default: 2048, or the context)",
    )
    group.add_argument(
        "--stride",
        type=options.positive,
        metavar="N",
        help="tokens that each window scores behind the one before (default: half of it)",
    )
    group.add_argument(
        "--against", metavar="MODEL", help="compare with this model: KL divergence and greedy agreement"
    )
    group.add_argument(
        "--against-kv-cache-dtype", choices=KV_CACHE_DTYPES, help="of that model (default: bf16)"
    )
    group.add_argument("--json", action="store_true", help="as JSON")
    group.add_argument("--output-json", metavar="FILE", help="write the JSON to a file, too")


def _add_speculative(commands: Any) -> None:
    parser = options.add_command(
        commands,
        "speculative",
        run_speculative,
        "measure what speculative decoding gains over plain decoding, method by method",
        "pace eval speculative --model demo --draft demo-draft --methods pard suffix --data prompts.jsonl --raw",
    )
    options.add_engine_options(parser)
    group = parser.add_argument_group("drafts")
    group.add_argument(
        "--methods",
        nargs="+",
        default=["suffix"],
        choices=["ar", *METHODS],
        metavar="METHOD",
        help=f"ar (plain decoding, always measured beside the others), {', '.join(METHODS)} (default: suffix)",
    )
    group.add_argument("--draft", metavar="MODEL", help=f"the draft of {', '.join(NEEDS_MODEL)}")
    group.add_argument(
        "--num-speculative-tokens",
        nargs="+",
        type=_depth,
        default=[4, 8, 12],
        metavar="K",
        help="tokens of a draft, each K in turn; auto: as many as pay (default: 4 8 12)",
    )
    group.add_argument(
        "--synthetic-acceptance",
        type=_rates,
        metavar="P[,P...]",
        help="accept guesses with this probability, or one for each position: real times without a trained draft",
    )
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help='JSONL with one {"data": TEXT} a line, as PARD has it, or {"prompt": TEXT}',
    )
    group.add_argument(
        "--num-prompts", type=options.positive, metavar="N", help="the first N of them (default: all)"
    )
    group.add_argument("--raw", action="store_true", help="prompts as they are, without the chat template")
    group.add_argument("--system", type=options.text_argument, metavar="TEXT", help="a system message")
    group.add_argument(
        "--chat-template-kwargs", metavar="JSON", help="""such as '{"enable_thinking": false}'"""
    )
    group.add_argument(
        "--max-tokens", type=options.positive, default=128, metavar="N", help="of an output (default: 128)"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: 0, the most probable token"
    )
    group.add_argument(
        "--batch-size",
        nargs="+",
        type=options.positive,
        default=[1],
        metavar="N",
        help="prompts at once, each N in turn on the same engine (default: 1)",
    )
    group = parser.add_argument_group("results")
    group.add_argument("--random-weights", action="store_true", help="invent the weights of both models")
    group.add_argument("--json", action="store_true", help="as JSON")
    group.add_argument("--output-json", metavar="FILE", help="write the JSON to a file, too")
    group.add_argument("--chart", metavar="PNG", help="draw speed-ups and acceptance by position")


def run_speculative(args: argparse.Namespace) -> int:
    """Carry `pace eval speculative` out."""
    from pace.benchmarks import speculative
    from pace.benchmarks.chart import check_chart

    options.check_folder(args.output_json)
    if args.chart is not None:
        check_chart(args.chart)
    needing = [method for method in args.methods if method in NEEDS_MODEL]
    if needing and args.draft is None:
        raise ConfigError(f"method {needing[0]} needs a draft; give its folder or hub id as --draft")
    if args.raw and (args.system is not None or args.chat_template_kwargs is not None):
        raise ConfigError("--raw has no chat, so leave out --system and --chat-template-kwargs")
    prompts = speculative.Prompts(
        args.data,
        read_jsonl(args.data, ("data", "prompt"), args.num_prompts),
        args.system,
        chat=not args.raw,
        template_kwargs=options.parse_json(args.chat_template_kwargs or "{}", "--chat-template-kwargs", dict),
    )
    result = speculative.run(
        # Who is decoded again must read its prompt again, too.
        options.engine_config(args, **_without_prefixes(args), max_num_seqs=max(args.batch_size)),
        prompts,
        methods=list(dict.fromkeys(args.methods)),
        draft=args.draft,
        depths=list(dict.fromkeys(args.num_speculative_tokens)),
        max_tokens=args.max_tokens,
        batch_sizes=list(dict.fromkeys(args.batch_size)),
        temperature=args.temperature,
        synthetic_acceptance=args.synthetic_acceptance,
        random_weights=args.random_weights,
        on_plan=options.print_plan,
    )
    text = json.dumps(result.to_json(), indent=2)
    out(text if args.json else speculative.format_speculative(result))
    if args.output_json is not None:
        options.write_file(args.output_json, text + "\n")
    if args.chart is not None:
        from pace.benchmarks.speculative_chart import save_speculative_chart

        save_speculative_chart(result, args.chart)
    return options.EXIT_OK


def _without_prefixes(args: argparse.Namespace) -> dict[str, bool]:
    return {} if args.enable_prefix_caching is not None else {"enable_prefix_caching": False}


def _depth(text: str) -> int | str:
    if text == "auto":
        return text
    k = options.positive(text)
    if k > MAX_DRAFT_TOKENS:
        raise argparse.ArgumentTypeError(f"{k} is more than {MAX_DRAFT_TOKENS}")
    return k


def _rates(text: str) -> float | tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of probabilities such as 0.9,0.8,0.7"
        ) from None
    return rates[0] if len(rates) == 1 else rates


def run_perplexity(args: argparse.Namespace) -> int:
    """Carry `pace eval perplexity` out."""
    from pace.benchmarks import perplexity
    from pace.config import EngineConfig

    options.check_folder(args.output_json)
    texts = read_texts(args.data)
    defaults: dict[str, Any] = {"max_num_seqs": 1}
    if args.window is not None:
        defaults["max_model_len"] = args.window + 1
    config = options.engine_config(args, **defaults)
    against = None
    if args.against is not None:
        against = EngineConfig(
            model=args.against,
            max_num_seqs=1,
            max_model_len=config.max_model_len,
            kv_cache_dtype=args.against_kv_cache_dtype or "bf16",
            n_threads=args.threads,
            cpus=None if args.cpus is None else parse_cpus(args.cpus),
        )
    elif args.against_kv_cache_dtype is not None:
        raise ConfigError("--against-kv-cache-dtype needs --against MODEL")
    result = perplexity.run(
        config,
        args.data,
        texts,
        window=args.window,
        stride=args.stride,
        against=against,
        on_plan=options.print_plan,
    )
    text = json.dumps(result.to_json(), indent=2)
    out(text if args.json else perplexity.format_perplexity(result))
    if args.output_json is not None:
        options.write_file(args.output_json, text + "\n")
    return options.EXIT_OK
