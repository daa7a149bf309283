"""The two usual kinds of tokenizer, ready to use."""

from __future__ import annotations

import pytest
from text.kit import byte_fallback, byte_level, load, save

from pace.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("gpt")
    return load(save(folder, byte_level(), {"bos_token": "<s>", "eos_token": {"content": "</s>"}}))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(save(tmp_path_factory.mktemp("llama"), byte_fallback(), {"eos_token": "</s>"}))
