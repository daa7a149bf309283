"""A draft that guesses frequent tokens only, and one whose embedding stays: what is learnt, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from pace import LLM, SamplingParams
from pace.errors import ConfigError
from pace.train.cod import Rows, lay_out, pack
from pace.train.data import Document
from pace.train.recipe import Cod, Data, Loss, Models, Recipe, Training
from pace.train.vocabulary import Vocabulary

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.live

from pace.train.loss import Counts, Teacher, guess_loss, row_weights  # noqa: E402  # needs torch
from pace.train.model import batch_of, load_model  # noqa: E402  # needs torch
from pace.train.trainer import train  # noqa: E402  # needs torch

MASK = 263


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    file = tmp_path / "texts.jsonl"
    words = ["abcde", "xyz", "12345678", "foo bar ", "qwerty"]
    file.write_text("".join(json.dumps({"text": (word * 9)[:40]}) + "\n" for word in words))
    data = [Data(file=str(file), answers="file")]
    training = Training(steps=2, context_len=96, batch_size=2, lr=3e-3, weight_decay=0.1, threads=1)
    return Recipe(
        models=Models(target=str(folder), draft=str(folder), mask_token_id=MASK),
        data=data,
        held_out=data,
        cod=Cod(k=4),
        training=training,
    )


def changed(recipe: Recipe, *, vocab_size: int | None = None, **training: Any) -> Recipe:
    return dataclasses.replace(
        recipe,
        models=dataclasses.replace(recipe.models, vocab_size=vocab_size),
        training=dataclasses.replace(recipe.training, **training),
    )


def test_the_most_frequent_tokens_of_answers_stay() -> None:
    """Prompts decide between equals only, then the lower stays; where answers have fewer, others fill the rows."""
    documents = [Document(np.array([9, 9, 9, 5, 5, 7]), 3), Document(np.array([9, 7, 3, 4]), 1)]
    assert Vocabulary.of(documents, 3, 12).ids.tolist() == [3, 5, 7]
    filled = Vocabulary.of(documents, 6, 12)
    assert filled.ids.tolist() == [0, 3, 4, 5, 7, 9]
    assert filled.places.tolist() == [0, -1, -1, 1, 2, 3, -1, 4, -1, 5, -1, -1, -1]
    assert Vocabulary.of(documents, 99, 12).ids.tolist() == list(range(12))


def test_a_row_of_another_token_guesses_nothing_and_is_seen() -> None:
    (packed,) = pack([Document(np.array([1, 2, 3, 2, 4]), 1)], 8)
    rows = lay_out(packed, Cod(k=2, min_retention=1.0), MASK, None)
    few = Vocabulary.of([Document(np.array([2, 2, 4, 4, 4]), 0)], 2, 300).relabel(rows)
    assert rows.labels[:5].tolist() == [2, 3, 2, 4, -1]
    assert few.labels[:5].tolist() == [0, -1, 0, 1, -1]
    for name in (f.name for f in dataclasses.fields(Rows)):
        assert name == "labels" or np.array_equal(getattr(rows, name), getattr(few, name))


@pytest.mark.parametrize("loss", [Loss(), Loss(ce=0.5, kl=1.0)], ids=["ce", "kl"])
def test_the_loss_is_that_of_a_softmax_over_the_kept_tokens(folder: Path, loss: Loss) -> None:
    model, _ = load_model(str(folder))
    ids = torch.tensor([2, 5, 9, 200])
    packs = pack([Document(np.array([2, 5, 9, 7, 200, 2]), 1)], 8)
    vocab = Vocabulary.of([Document(ids.numpy(), 0)], 4, 272)
    batch = batch_of([vocab.relabel(lay_out(packs[0], Cod(k=1), MASK, None))], torch.device("cpu"))
    head = model.get_output_embeddings().weight
    states = torch.randn(1, 6, head.shape[1], requires_grad=True)
    teacher = Teacher(torch.randn(1, 6, head.shape[1]), torch.randn(4, head.shape[1]))
    (weights,) = row_weights([batch], [teacher], loss, 1)
    value = guess_loss(states, head[ids], batch, weights, teacher, loss, "f32", Counts(1))
    at = [0, 1, 3, 4]  # behind 9 comes 7, which is not kept
    log_p = (states[0, at] @ head[ids].T).log_softmax(-1)
    log_q = (teacher.states[0, at] @ teacher.head.T).log_softmax(-1)
    wanted = -loss.ce * log_p[range(4), [1, 2, 3, 0]] + loss.kl * (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(value, wanted.mean())
    gradients = [torch.autograd.grad(v, (states, head)) for v in (value, wanted.mean())]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_a_draft_of_few_tokens_is_loaded_with_them(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    acceptance = train(changed(recipe, vocab_size=6, steps=60), out)
    assert acceptance is not None and acceptance.length > 1.0
    kept = json.loads((out / "draft" / "draft_vocab.json").read_text())["token_ids"]
    assert len(kept) == 6 and kept == sorted(kept)
    config = {
        "method": "pard",
        "model": str(out / "draft"),
        "num_speculative_tokens": 4,
        "adaptive": False,
        "draft_vocab": str(out / "draft" / "draft_vocab.json"),
    }
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    tokens = []
    for speculative in (None, config):
        llm = LLM(recipe.models.target, threads=1, max_model_len=64, speculative=speculative)
        tokens.append(llm.generate("abcdeabcdeabc", params)[0].outputs[0].token_ids)
        llm.close()
    assert tokens[0] == tokens[1]


def test_an_embedding_stays_as_it_is(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    """In both forms of the backward pass; everything else learns."""
    before = load_model(str(folder))[0].state_dict()
    moved = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        train(changed(recipe, freeze_embedding=True, checkpointing=checkpointing, dtype="f32"), out)
        after = torch.load(out / "state.pt", weights_only=True)["draft"]
        moved.append(
            {name: tensor for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        )
        assert moved[-1] and "model.embed_tokens.weight" not in moved[-1]
        assert "model.layers.0.self_attn.q_proj.weight" in moved[-1]
    for name, tensor in moved[0].items():
        torch.testing.assert_close(tensor, moved[1][name])


def test_a_vocabulary_of_nothing_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"models\.vocab_size is 0, expected a number from 1"):
        changed(recipe, vocab_size=0)
