"""Encoding is bounded and exact, and ids are checked."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text.kit import CORPUS, byte_fallback, byte_level, load, save, token_ids
from tokenizers import AddedToken, normalizers, processors

from pace.errors import RequestError, TokenizerError
from pace.text.tokenizer import Tokenizer


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


@pytest.mark.parametrize("bad", ["lone \ud800", 5, None, b"bytes"])
def test_encode_refuses(gpt: Tokenizer, bad: Any) -> None:
    with pytest.raises(RequestError) as error:
        gpt.encode_batch(["fine", bad])
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("char", ["a", "é", "你"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(tmp_path: Path, char: str) -> None:
    tokenizer = load(save(tmp_path, byte_level()), max_model_len=64)
    n = tokenizer.max_prompt_bytes // len(char.encode())
    tokenizer.encode(char * n)
    with pytest.raises(RequestError, match=r"has \d+ bytes or more, expected at most"):
        tokenizer.encode(char * (n + 1))


def test_no_prompt_whose_tokens_fit_is_refused_by_its_bytes(tmp_path: Path) -> None:
    """An average of 8 bytes for each token refused 18 200 bytes that were 1 681 of 2 047 tokens."""
    rust = byte_level()
    line = " " * 128
    rust.add_tokens([line, "č" * 100])
    tokenizer = load(save(tmp_path, rust), max_model_len=100)
    for word in (line, "č" * 100):
        assert len(tokenizer.encode(word * 99, add_special_tokens=False)) == 99
    rust.normalizer = normalizers.NFC()
    composed = "\u1112\u1161\u11ab"  # 9 bytes of jamo become one syllable of 3
    rust.add_tokens([AddedToken(unicodedata.normalize("NFC", composed) * 50, normalized=True)])
    tokenizer = load(save(tmp_path, rust), max_model_len=100)
    assert len(tokenizer.encode(composed * 50 * 99, add_special_tokens=False)) == 99


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


@pytest.mark.parametrize("indent", [None, 2])
def test_an_added_token_that_gets_another_id_is_a_warning(
    tmp_path: Path, indent: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The library ignores the ids of added tokens: where they have a gap, the model's rows would be others."""
    path = save(tmp_path, byte_level()) / "tokenizer.json"
    document = json.loads(path.read_text())
    load(tmp_path)
    assert not caplog.text
    token = document["added_tokens"][-1]
    document["added_tokens"].append({**token, "id": token["id"] + 5, "content": "<late>"})
    path.write_text(json.dumps(document, indent=indent))
    assert load(tmp_path).token_to_id("<late>") == token["id"] + 1
    assert f"'<late>' has id {token['id'] + 5}, but gets id {token['id'] + 1}" in caplog.text


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


def test_decode_token(gpt: Tokenizer, llama: Tokenizer) -> None:
    assert gpt.decode_token(1) == llama.decode_token(1) == "</s>"
    assert llama.decode_token(token_ids(llama, "brown")[0]) == "brown"
    for token_id in range(gpt._rust.get_vocab_size()):
        assert gpt.decode_token(token_id) == gpt.decode([token_id], skip_special_tokens=False)


# ---- exactly one BOS


def with_bos(folder: Path, *, added: bool) -> Tokenizer:
    rust = byte_level()
    if not added:
        rust.post_processor = processors.ByteLevel(trim_offsets=False)
    return load(save(folder, rust, {"bos_token": "<s>"}))


@pytest.mark.parametrize("rendered", ["<s>hi", "hi", "<s><s>hi"])
def test_a_chat_has_one_bos_whatever_template_and_tokenizer_say(tmp_path: Path, rendered: str) -> None:
    """R1-Distill's template writes one and its tokenizer adds one; others leave it to the tokenizer."""
    tokenizer = with_bos(tmp_path, added=True)
    assert tokenizer.encode_chats([rendered]) == [tokenizer.encode("hi")]
    assert tokenizer.encode("hi").count(0) == 1


def test_a_rendered_chat_given_as_a_prompt_gets_no_second_bos(tmp_path: Path) -> None:
    tokenizer = with_bos(tmp_path, added=True)
    assert tokenizer.encode("<s>hi") == tokenizer.encode("hi")
    assert tokenizer.encode("hi<s>").count(0) == 2  # inside a text it is the text's
    assert tokenizer.encode("<s>") == tokenizer.encode("") == [0]


def test_a_model_without_bos_gets_none(tmp_path: Path) -> None:
    """Qwen's prompts have none; SmolLM2 calls its <|im_start|> BOS, and a template may write it."""
    tokenizer = with_bos(tmp_path, added=False)
    assert 0 not in tokenizer.encode_chats(["hi"])[0]
    assert tokenizer.encode_chats(["<s>hi"])[0].count(0) == tokenizer.encode("<s>hi").count(0) == 1


def test_what_is_put_behind_a_prompt_is_no_bos(tmp_path: Path) -> None:
    rust = byte_level()
    rust.post_processor = processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 0)])
    tokenizer = load(save(tmp_path, rust))
    assert tokenizer.encode_chats(["hi"]) == [tokenizer.encode("hi", add_special_tokens=False)]


# ---- ids without a token


def test_ids_without_a_token_are_known(tmp_path: Path) -> None:
    """The union of the vocabulary, the added tokens, and those that only tokenizer_config.json lists."""
    rust = byte_level()
    n_tokens = rust.get_vocab_size()
    rust.add_special_tokens(["<a>"])
    config = {"added_tokens_decoder": {"500": {"content": "<tool>"}, "x": {}, "99999999999": {}}}
    tokenizer = load(save(tmp_path, rust, config))
    assert tokenizer.unused_ids.tolist() == [*range(n_tokens + 1, 500), *range(501, 512)]
    assert load(tmp_path, vocab_size=n_tokens).unused_ids.tolist() == []
