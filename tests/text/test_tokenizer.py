"""Encoding is bounded and audited; text comes back exactly, token by token, and stops where it should."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pace.errors import RequestError, TokenizerError
from pace.text.detokenizer import IncrementalDetokenizer
from pace.text.stop import StopChecker
from pace.text.stream import TextStream
from pace.text.tokenizer import Tokenizer

CORPUS = [
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "größer, naïve, Ünïcödé, 你好世界, здравствуй мир, 👋🏽 🎉 e\u0301",
]
SPECIAL = ["<s>", "</s>", "<|user|>"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Edit = Callable[[tokenizers.Tokenizer], None]


def byte_level() -> tokenizers.Tokenizer:
    """A GPT-2-like tokenizer of 400 tokens, all 256 bytes among them."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>é", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """A Llama-2-like tokenizer: words that start with ▁, and the 256 bytes as <0x00> … <0xFF>."""
    words = ["▁", "▁the", "▁quick", "brown", "▁fox", "e", "t", "q", "▁a", "ü", "\n"]
    vocab = {
        token: i for i, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<s>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def save(folder: Path, rust: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Path:
    rust.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, *, vocab_size: int = 512, max_model_len: int = 4096, trust: bool = False) -> Tokenizer:
    return Tokenizer(folder, vocab_size=vocab_size, max_model_len=max_model_len, trust_patterns=trust)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("gpt")
    return load(save(folder, byte_level(), {"bos_token": "<s>", "eos_token": {"content": "</s>"}}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(save(tmp_path_factory.mktemp("llama"), byte_fallback(), {"eos_token": "</s>"}))


def stream(detokenizer: IncrementalDetokenizer, ids: list[int]) -> str:
    return "".join([*map(detokenizer.push, ids), detokenizer.finish()])


def test_libraries_are_imported_when_needed() -> None:
    """`import pace` and its façade stay quick: these three together take longer than everything else."""
    code = (
        "import sys, pace.text.tokenizer, pace.text.chat, pace.checkpoint, pace.params\n"
        "print([name for name in ('tokenizers', 'jinja2', 'huggingface_hub') if name in sys.modules])"
    )
    env = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "[]\n"


# ---- encoding


def test_encode(gpt: Tokenizer) -> None:
    assert gpt.byte_level and gpt.bos_token_id == 0 and gpt.eos_token_id == 1
    for text in CORPUS:
        ids = gpt.encode(text)
        assert ids[0] == 0 and ids[1:] == gpt.encode(text, add_special_tokens=False)
        assert gpt.decode(ids) == text.replace("e\u0301", "é")  # the normaliser is NFC
        assert gpt.decode(ids, skip_special_tokens=False).startswith("<s>")
    assert gpt.encode_batch(CORPUS) == [gpt.encode(text) for text in CORPUS]
    assert gpt.encode("") == [0]
    assert gpt.encode("<|user|>", add_special_tokens=False) == [2]


@pytest.mark.parametrize(
    "bad", ["a" * (8 * 4096 + 1025), "é" * (4 * 4096 + 513), "lone \ud800", 5, None, b"bytes"]
)
def test_encode_refuses(gpt: Tokenizer, bad: Any) -> None:
    with pytest.raises(RequestError) as error:
        gpt.encode_batch(["fine", bad])
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_encode_leaves_the_gil(tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, byte_level()), max_model_len=1 << 20)
    text = " ".join(CORPUS) * 2000
    gaps, running = [0.0], True

    def heartbeat() -> None:
        last = time.perf_counter()
        while running:
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=heartbeat)
    thread.start()
    start = time.perf_counter()
    tokenizer.encode(text)
    encode_s = time.perf_counter() - start
    running = False
    thread.join()
    # With the GIL held there would be two beats at most, and one gap as long as the call; without, dozens.
    assert len(gaps) > 10 or encode_s < 0.02, (len(gaps), max(gaps), encode_s)


def test_ids_are_checked(gpt: Tokenizer) -> None:
    gpt.check_ids([0, 511])
    for bad in (-1, 512, 1 << 70, True, 1.0, "1", None):
        with pytest.raises(RequestError, match="position 1"):
            gpt.check_ids([0, bad])
    with pytest.raises(RequestError):
        gpt.decode([1 << 40])


@pytest.mark.live
@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
@pytest.mark.parametrize("build", [byte_level, byte_fallback])
def test_as_transformers(tmp_path: Path, build: Callable[[], Any], flags: dict[str, Any]) -> None:
    """The post-processor of tokenizer.json alone decides about BOS and EOS, whatever the older flags say."""
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **flags}
    ours = load(save(tmp_path, build(), config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == theirs.eos_token_id and ours.bos_token_id == theirs.bos_token_id


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    rust = byte_level()
    expected = rust.encode(CORPUS[0]).ids
    rust.enable_truncation(4)
    rust.enable_padding(length=500)
    assert load(save(tmp_path, rust)).encode(CORPUS[0]) == expected


# ---- the audit


def replace_twice(count: int) -> Edit:
    def edit(rust: tokenizers.Tokenizer) -> None:
        rust.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa") for _ in range(count)])

    return edit


def split(pattern: str) -> Edit:
    def edit(rust: tokenizers.Tokenizer) -> None:
        rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated")])

    return edit


def setter(part: str, value: Any) -> Edit:
    return lambda rust: setattr(rust, part, value)


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (split("(a|aa)+$"), "pre_tokenizer"),
        (setter("normalizer", normalizers.Replace(Regex("(a+)+$"), "b")), "normalizer"),
        (setter("normalizer", normalizers.Replace("", "b")), "lengthen"),
        (setter("normalizer", normalizers.Prepend("x" * 10**4)), "lengthen"),
        (setter("normalizer", normalizers.Replace("a", "b" * 1000)), "lengthen"),
        (replace_twice(40), "lengthen"),
        (setter("decoder", decoders.Replace(Regex("(a+)+$"), "b")), "decoder"),
        (setter("decoder", decoders.Sequence([decoders.Replace("a", "b" * 1000)])), "lengthen"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_audit(tmp_path: Path, edit: Edit, word: str) -> None:
    rust = byte_level()
    edit(rust)
    save(tmp_path, rust)
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match="allow-list") as error:
        load(tmp_path)
    assert time.perf_counter() - start < 1
    assert word in str(error.value) and "\n" not in str(error.value)
    assert load(tmp_path, trust=True).vocab_size == 512


def test_panics_become_errors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rust = byte_level()
    rust.normalizer = normalizers.Replace(Regex("(a+)+$"), "b")
    tokenizer = load(save(tmp_path, rust), trust=True)
    with pytest.raises(RequestError, match="tokenizer failed"):
        tokenizer.encode("a" * 40 + "!")
    capfd.readouterr()  # the Rust library prints the panic
    assert tokenizer.encode("x!")


@pytest.mark.parametrize("replacements", [1, 4])
def test_bounded_growth_is_taken(tmp_path: Path, replacements: int) -> None:
    rust = byte_level()
    replace_twice(replacements)(rust)
    assert load(save(tmp_path, rust)).encode("a", add_special_tokens=False)


def test_vocabulary_must_fit_the_model(tmp_path: Path) -> None:
    rust = byte_level()
    save(tmp_path, rust)
    n_tokens = rust.get_vocab_size()
    n_base = max(rust.get_vocab(with_added_tokens=False).values()) + 1
    load(tmp_path, vocab_size=n_tokens)
    with pytest.raises(
        TokenizerError, match=f"id {n_base - 1}, but the model's embedding has {n_base - 1} rows"
    ):
        load(tmp_path, vocab_size=n_base - 1)


def test_an_added_token_beyond_the_embedding_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rust = byte_level()
    n_tokens = rust.get_vocab_size()
    rust.add_special_tokens(["[PAD]", "[PAD2]"])
    save(tmp_path, rust)
    tokenizer = load(tmp_path, vocab_size=n_tokens)
    assert "2 added tokens can't be used, the first is '[PAD]'" in caplog.text
    assert tokenizer.encode("a[PAD]")[-1] == n_tokens  # the engine refuses the request, by this id
    with pytest.raises(RequestError, match="expected ids from 0"):
        tokenizer.check_ids([n_tokens])


# ---- detokenising


@pytest.mark.parametrize("skip", [True, False])
def test_byte_level_stream_equals_the_whole(gpt: Tokenizer, skip: bool) -> None:
    rng = random.Random(0)
    n_tokens = gpt._rust.get_vocab_size()
    for length in (1, 2, 3, 7, 50, 400):
        for _ in range(20):
            ids = [rng.randrange(n_tokens) for _ in range(length)]  # mostly invalid UTF-8
            detokenizer = IncrementalDetokenizer(gpt, skip_special_tokens=skip)
            assert stream(detokenizer, ids) == gpt.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("skip", [True, False])
def test_tokens_may_come_in_any_runs(gpt: Tokenizer, llama: Tokenizer, skip: bool) -> None:
    rng = random.Random(3)
    for tokenizer in (gpt, llama):
        n_tokens = tokenizer._rust.get_vocab_size()
        for length in (1, 7, 60):
            ids = [rng.randrange(n_tokens) for _ in range(length)]
            alone = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
            runs = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
            text, at = "", 0
            while at < length:
                end = at + rng.randrange(9)
                text += runs.extend(ids[at:end])
                at = end
            assert text + runs.finish() == stream(alone, ids)


def test_characters_are_never_split(gpt: Tokenizer) -> None:
    for text in CORPUS:
        detokenizer = IncrementalDetokenizer(gpt)
        parts = [detokenizer.push(token_id) for token_id in gpt.encode(text)]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) == gpt.decode(gpt.encode(text))
        assert detokenizer.finish() == ""


def test_an_incomplete_end_is_marked(gpt: Tokenizer) -> None:
    ids = gpt.encode("\U0001f9ff", add_special_tokens=False)
    assert len(ids) > 2
    detokenizer = IncrementalDetokenizer(gpt)
    assert {detokenizer.push(token_id) for token_id in ids[:-1]} == {""}
    assert detokenizer.finish() == "\ufffd"


def test_unused_ids_have_no_text(gpt: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer in (gpt, llama):
        assert tokenizer.decode([511]) == tokenizer.decode_token(511) == ""
        assert stream(IncrementalDetokenizer(tokenizer), [511, 511, 511, 511, 511, 511, 511]) == ""


def llama_ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids
    return [token_id for token_id in ids if token_id is not None]


def utf8_tokens(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


def test_byte_fallback_stream_equals_the_whole(llama: Tokenizer) -> None:
    assert not llama.byte_level
    rng = random.Random(1)
    pieces = [["▁the"], ["▁quick"], ["brown"], ["▁"], ["ü"], ["\n"], ["</s>"], *map(utf8_tokens, "你好é👋z")]
    for _ in range(200):
        tokens = [token for _ in range(rng.randrange(1, 12)) for token in rng.choice(pieces)]
        ids = llama_ids(llama, *tokens)
        for skip in (True, False):
            detokenizer = IncrementalDetokenizer(llama, skip_special_tokens=skip)
            assert stream(detokenizer, ids) == llama.decode(ids, skip_special_tokens=skip), tokens


def test_leading_space_depends_on_the_prompt(llama: Tokenizer) -> None:
    the, fox, end = llama_ids(llama, "▁the", "▁fox", "</s>")
    assert stream(IncrementalDetokenizer(llama), [fox]) == "fox"
    assert stream(IncrementalDetokenizer(llama, [the]), [fox]) == " fox"
    assert stream(IncrementalDetokenizer(llama, [the, end, end]), [fox]) == " fox"
    assert stream(IncrementalDetokenizer(llama), [the, end, fox]) == "the fox"


def test_invalid_bytes_neither_stall_nor_grow(llama: Tokenizer) -> None:
    (byte,) = llama_ids(llama, "<0xE4>")
    detokenizer = IncrementalDetokenizer(llama)
    parts = [detokenizer.push(byte) for _ in range(1000)]
    assert len("".join(parts)) >= 990
    assert len(detokenizer._context) + len(detokenizer._pending) <= 10
    rng = random.Random(2)
    for _ in range(50):
        ids = [rng.randrange(llama._rust.get_vocab_size()) for _ in range(60)]
        stream(IncrementalDetokenizer(llama), ids).encode("utf-8")


def test_decode_token(gpt: Tokenizer, llama: Tokenizer) -> None:
    assert gpt.decode_token(1) == llama.decode_token(1) == "</s>"
    assert llama.decode_token(llama_ids(llama, "brown")[0]) == "brown"
    for token_id in range(gpt._rust.get_vocab_size()):
        assert gpt.decode_token(token_id) == gpt.decode([token_id], skip_special_tokens=False)


# ---- stop strings


def stop_reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The match that is complete first; of those that end together, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def test_stop_checker_equals_the_reference_however_the_text_is_cut() -> None:
    rng = random.Random(3)
    for trial in range(2000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(20)))
        stops = [
            "".join(rng.choice("ab") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))
        ]
        include = trial % 2 == 0
        checker = StopChecker(stops, include_in_output=include)
        shown, at = "", 0
        while at < len(text) and checker.matched is None:
            size = rng.randrange(1, 5)
            new = checker.push(text[at : at + size])
            at += size
            shown += new
            assert text.startswith(shown)
        shown += checker.finish()
        assert (shown, checker.matched) == stop_reference(text, stops, include), (text, stops)


def test_only_a_possible_match_is_held_back() -> None:
    checker = StopChecker(["STOP"])
    assert [checker.push(text) for text in ("go", " S", "T", "x", "ST", "OP", "more")] == [
        "go", " ", "", "STx", "", "", "",
    ]  # fmt: skip
    assert checker.matched == "STOP" and checker.finish() == ""
    assert StopChecker([]).push("anything") == "anything"
    assert StopChecker(["ab"], include_in_output=True).push("a") == "a"


def test_matches_before_min_tokens_are_ignored() -> None:
    checker = StopChecker(["ab"])
    assert checker.push("xab", check=False) + checker.push("a", check=False) == "xab"
    assert checker.matched is None
    assert checker.push("b") == "" and checker.matched == "ab"


def test_long_stop_strings_cost_constant_time() -> None:
    checker = StopChecker(["a" * 1000 + "b" * (i + 1) for i in range(20)])
    start = time.perf_counter()
    shown = "".join(checker.push("a") for _ in range(5000))
    assert time.perf_counter() - start < 1
    assert shown + checker.finish() == "a" * 5000


def test_text_stream(gpt: Tokenizer) -> None:
    ids = gpt.encode("The quick brown fox jumps", add_special_tokens=False)
    texts = TextStream(gpt, stop=["fox"])
    shown = ""
    for token_id in ids:
        shown += texts.push(token_id)
        assert texts.text == shown
        if texts.matched:
            break
    assert shown + texts.finish() == texts.text == "The quick brown "
    assert texts.matched == "fox"

    texts = TextStream(gpt, stop=["fox"], include_stop_str_in_output=True)
    shown = "".join(map(texts.push, ids))
    assert shown == texts.text == "The quick brown fox"

    texts = TextStream(gpt)
    assert texts.extend(ids) + texts.finish() == texts.text == "The quick brown fox jumps"

    texts = TextStream(gpt, stop=["jumpsuit"])
    assert "".join(map(texts.push, ids)) + texts.finish() == "The quick brown fox jumps"
    assert texts.matched is None


def test_finish_can_complete_a_stop_string(gpt: Tokenizer) -> None:
    ids = gpt.encode("\U0001f9ff", add_special_tokens=False)[:2]
    texts = TextStream(gpt, stop=["\ufffd"])
    assert [texts.push(token_id) for token_id in ids] == ["", ""]
    assert texts.finish() == "" and texts.matched == "\ufffd"
