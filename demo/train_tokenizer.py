"""Train the byte-level BPE of the embedded pair and encode the corpus with it.

The pre-tokenisation pattern is Llama 3's, character for character (engines keep a list of the patterns they
trust); it keeps a line's end with the punctuation before it and an indentation in one piece, as Python
likes.

    python demo/train_tokenizer.py --work build/demo
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
MAX_MODEL_LEN = 2048
# Ids 0-5. <|endoftext|> separates documents and opens every sequence; <|mask|> is what a parallel draft
# (PARD) appends to ask for several tokens at once; no text ever produces it.
SPECIAL = ("<|endoftext|>", "<|pad|>", "<|mask|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS, PAD, MASK, USER, ASSISTANT, END = range(len(SPECIAL))
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def read_corpus(work: Path) -> Iterator[dict[str, str]]:
    """The documents that `corpus.py` wrote."""
    with (work / "corpus.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def train(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` ids whose encodings open with <|endoftext|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A",
        pair=f"{SPECIAL[BOS]} $A {SPECIAL[BOS]} $B",
        special_tokens=[(SPECIAL[BOS], BOS)],
    )
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """``tokenizer_config.json`` for `transformers` and pace."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(i): {"content": text, **flags} for i, text in enumerate(SPECIAL)},
        "bos_token": SPECIAL[BOS],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[BOS],
        "mask_token": SPECIAL[MASK],
        "model_max_length": MAX_MODEL_LEN,
        "pad_token": SPECIAL[PAD],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def encode(tokenizer: Tokenizer, document: dict[str, str]) -> list[int]:
    """Token ids of one document, opened by <|endoftext|>; a chat turn is laid out as the template does."""
    ids = tokenizer.encode(document["text"], add_special_tokens=False).ids
    if document["kind"] != "chat":
        return [BOS, *ids]
    question = tokenizer.encode(document["question"], add_special_tokens=False).ids
    return [BOS, USER, *question, END, ASSISTANT, *ids, END]


def main() -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and one uint16 stream per split and kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder with corpus.jsonl")
    args = parser.parse_args()
    files = (d for d in read_corpus(args.work) if d["split"] == "train" and d["kind"] != "chat")
    tokenizer = train(d["text"] for d in files)
    (args.work / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = json.dumps(tokenizer_config(), indent=2, sort_keys=True)
    (args.work / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    streams: dict[str, list[int]] = {}
    n_chars: dict[str, int] = {}
    for document in read_corpus(args.work):
        name = f"{document['split']}_{document['kind']}"
        streams.setdefault(name, []).extend(encode(tokenizer, document))
        n_chars[name] = n_chars.get(name, 0) + len(document["text"]) + len(document["question"])
    for name, ids in sorted(streams.items()):
        np.save(args.work / f"{name}.npy", np.array(ids, np.uint16))
        print(f"{name:14s}{len(ids):10d} tokens, {n_chars[name] / len(ids):.2f} characters a token")


if __name__ == "__main__":
    main()
