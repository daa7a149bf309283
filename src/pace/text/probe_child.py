"""The child of `probe`: run as a program, it reads a `tokenizer.json` from stdin and tries it on hostile texts.

    python -I probe_child.py FOLDER_OF_TOKENIZERS < tokenizer.json

It imports nothing of pace, and may die at any moment: before each step it writes a line that says what follows, and
the last line holds the verdict, {"harm": text or null, "slow": whether it is a matter of time}. Time is that of the CPU,
so other programs change no verdict; but the first long text finds its memory's pages untouched, and a machine may slow
down from one text to the next (0.16 to 0.32 s for one text was seen), so what seems slow is timed again.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NoReturn

BUDGET_S = 3.0  # CPU time after which no further text is tried
TEXT_S = 0.5  # CPU time of a short text, after which the system ends the process
LOAD_S = 30.0
SLOW_S_PER_BYTE = 20e-6  # 40 times what encoding usually takes
SLOW_S = 0.1  # below this nothing is slow
MAX_RATIO = 8.0  # of the times of two texts, one 4 times as long as the other: linear is 4, quadratic 16
N_TRIALS = 3  # of what seems slow; the fastest counts
MAX_GROWTH, GROWTH_SLACK = 16, 1024
MAX_BYTES = 4 << 30  # of address space
MAX_UNITS = 16  # characters and words that texts are made of
SIZES = (64, 512)  # characters: exponential patterns show in the first, others in the second
LARGE_SIZES = (4096, 16384, 65536)
N_SLOWEST = 6  # texts of one size that are tried at the next

# A character or two of each class that patterns name; what isn't here stands for itself.
CLASSES = {
    "L": "aA中", "Lu": "A", "Ll": "a", "Lt": "ǅ", "Lm": "ʰ", "Lo": "中", "M": "\u0301", "Mn": "\u0301",
    "N": "1²", "Nd": "7", "Nl": "Ⅷ", "No": "²", "P": "!-", "S": "+€", "Z": " \u3000", "Zs": " ", "C": "\x01",
    "Han": "中", "Hiragana": "あ", "Katakana": "ア", "Hangul": "가", "Cyrillic": "ж", "Greek": "λ",
    "Arabic": "ع", "Hebrew": "א", "Thai": "ก", "Devanagari": "क", "Latin": "é",
    "s": " \n\t", "S_": "a", "d": "1", "D": "a", "w": "a_", "W": "!", "h": "f",
    "r": "\r", "n": "\n", "t": "\t",
}  # fmt: skip
ALWAYS = ("a", "1", " ", "\n", "!", "中")
ENDS = ("", "!", "\n", "a", "\U0001f9ff")
_TOKENS = re.compile(
    r"\\[pP]\{\^?(?P<name>\w+)\}|\\u(?P<u>[0-9a-fA-F]{4})|\\x\{?(?P<x>[0-9a-fA-F]{2,6})\}?|\\(?P<escape>.)"
    r"|\(\?[a-zA-Z<!=:>-]*|\{\d*,?\d*\}|(?P<word>[^\\()\[\]{}|?*+.^$]+)|.",
    re.DOTALL,
)


def write(line: dict[str, Any]) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def end(harm: str | None, *, slow: bool = False) -> NoReturn:
    write({"harm": harm, "slow": slow})
    os._exit(0)  # the library may abort while it tidies up


def units_of(pattern: str) -> Iterator[str]:
    """The characters and words that a regular expression names, roughly."""
    for match in _TOKENS.finditer(pattern[:10_000]):
        if match["name"]:
            yield from CLASSES.get(match["name"], CLASSES.get(match["name"][:1], ""))
        elif match["u"] or match["x"]:
            code = int(match["u"] or match["x"], 16)
            if code < 0x110000 and not 0xD800 <= code < 0xE000:
                yield chr(code)
        elif match["escape"]:
            yield from CLASSES.get(match["escape"], match["escape"] if not match["escape"].isalnum() else "")
        elif match["word"]:
            yield from match["word"][:8]
            if len(match["word"]) > 1:
                yield match["word"][:8]


def strings_of(value: object) -> Iterator[tuple[str, bool]]:
    """Every text in a component, and whether it is a regular expression."""
    stack = [(value, "")]
    while stack:
        item, key = stack.pop()
        if isinstance(item, dict):
            stack.extend((child, name) for name, child in item.items())
        elif isinstance(item, list):
            stack.extend((child, "") for child in item)
        elif isinstance(item, str) and key != "type":
            yield item, key == "Regex"


def units(rust: Any) -> list[str]:
    """What hostile texts are made of: what the tokenizer's components name, and what every text has."""
    named = []
    for part in (rust.normalizer, rust.pre_tokenizer, rust.decoder):
        state = {} if part is None else json.loads(part.__getstate__())
        for text, is_pattern in strings_of(state):
            named.append(list(units_of(text)) if is_pattern else [text[:8]])
    # In turns, so that one long pattern can't take all places.
    own = dict.fromkeys(unit for turn in zip_longest(*named) for unit in turn if unit)
    return list(dict.fromkeys([*list(own)[:MAX_UNITS], *ALWAYS]))


def shapes(parts: list[str]) -> list[tuple[str, str]]:
    """What to repeat, and what to put behind it: each unit, each pair, and some mixtures."""
    rng = random.Random(0)
    repeated = [*parts, *(a + b for a in parts for b in parts if a != b)]
    repeated += ["".join(rng.choices(parts, k=97)) for _ in range(16)]
    return [(unit, last) for unit in repeated for last in (ENDS if unit in parts else ENDS[:2])]


def try_text(rust: Any, shape: tuple[str, str], n_chars: int) -> float:
    """Encode and decode one text; returns the CPU time of the encoding, in seconds."""
    unit, last = shape
    text = (unit * (n_chars // len(unit) + 1))[:n_chars] + last
    label = f"{unit[:16]!a} repeated to {n_chars} characters, then {last!a}"
    write({"doing": f"encoding {label}"})
    n_bytes = len(text.encode())
    slow_s = SLOW_S + SLOW_S_PER_BYTE * n_bytes
    seconds = math.inf
    try:
        for _ in range(N_TRIALS):
            signal.setitimer(signal.ITIMER_PROF, TEXT_S + SLOW_S_PER_BYTE * n_bytes)
            start = time.process_time()
            ids = rust.encode(text, add_special_tokens=False).ids
            seconds = min(seconds, time.process_time() - start)
            if seconds <= slow_s:
                break
        decoded = rust.decode(ids)
    except Exception:  # such as an unknown word without a token for it: an error of that request
        return 0.0
    except BaseException as error:  # a panic of the library, for instance where a pattern tries too often
        end(f"it fails on {label}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if len(ids) > MAX_GROWTH * n_bytes + GROWTH_SLACK:
        end(f"it makes {len(ids)} tokens of {label}")
    n_token_chars = sum(len(rust.id_to_token(token_id) or "") for token_id in ids)
    if len(decoded) > MAX_GROWTH * n_token_chars + GROWTH_SLACK:
        end(f"it decodes {n_token_chars} characters of tokens to {len(decoded)}")
    if seconds > slow_s:
        end(f"it takes {seconds:.2f} s for {label}", slow=True)
    return seconds


def grows_too_fast(shorter_s: float, longer_s: float) -> bool:
    """Judges the times of a text and of one 4 times as long."""
    return longer_s > SLOW_S and longer_s > MAX_RATIO * shorter_s


def time_again(rust: Any, shape: tuple[str, str], n_chars: int) -> tuple[float, float]:
    """The fastest times of a text of n_chars / 4 and of one of n_chars, in turns: a slow minute meets both."""
    trials = [(try_text(rust, shape, n_chars // 4), try_text(rust, shape, n_chars)) for _ in range(N_TRIALS)]
    shorter, longer = zip(*trials, strict=True)
    return min(shorter), min(longer)


def check_single_tokens(rust: Any) -> None:
    """A normaliser that puts a long text before each prompt, and a decoder that hangs on one token."""
    write({"doing": "normalising a short text"})
    signal.setitimer(signal.ITIMER_PROF, TEXT_S)
    if rust.normalizer is not None and len(rust.normalizer.normalize_str("a")) > GROWTH_SLACK:
        end("its normalizer makes a long text of a single letter")
    vocabulary = rust.get_vocab(with_added_tokens=True)
    for token in heapq.nlargest(64, vocabulary, key=len):
        write({"doing": f"decoding the token {token[:64]!a}"})
        signal.setitimer(signal.ITIMER_PROF, TEXT_S)
        try:
            rust.decode([vocabulary[token]], skip_special_tokens=False)
        except Exception:
            continue
        except BaseException as error:
            end(f"it fails on decoding {token[:64]!a}: {error}")
    signal.setitimer(signal.ITIMER_PROF, 0)


def try_all(rust: Any) -> None:
    candidates = shapes(units(rust))
    times: dict[tuple[str, str], float] = {}
    for n_chars in SIZES:
        for shape in candidates:
            if time.process_time() > BUDGET_S and n_chars > SIZES[0]:
                return
            times[shape] = try_text(rust, shape, n_chars)
    slowest = sorted(candidates, key=lambda shape: times[shape], reverse=True)[:N_SLOWEST]
    before: dict[tuple[str, str], float] = {}
    for n_chars in LARGE_SIZES:
        for shape in slowest:
            seconds = try_text(rust, shape, n_chars)
            if grows_too_fast(before.get(shape, seconds), seconds) and grows_too_fast(
                *time_again(rust, shape, n_chars)
            ):
                end(
                    f"it takes {seconds:.2f} s for {shape[0][:16]!a} repeated, and longer the longer the text",
                    slow=True,
                )
            before[shape] = seconds


def main() -> NoReturn:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    n_bytes = MAX_BYTES if hard == resource.RLIM_INFINITY else min(MAX_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, hard))
    # A parent that ignores or blocks the timer's signal would hand that down.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    sys.path.insert(0, sys.argv[1])
    from tokenizers import Tokenizer

    data = sys.stdin.buffer.read()
    write({"doing": "reading the file"})
    signal.setitimer(signal.ITIMER_PROF, LOAD_S)
    try:
        rust = Tokenizer.from_buffer(data)
    except Exception:  # malformed: the parent will say so better
        end(None)
    except BaseException as error:
        end(f"reading it fails: {error}")
    signal.setitimer(signal.ITIMER_PROF, 0)
    rust.no_truncation()
    rust.no_padding()
    check_single_tokens(rust)
    try_all(rust)
    end(None)


if __name__ == "__main__":
    main()
