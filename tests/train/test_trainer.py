"""The torch side: a packed pass does what inference does, and a resumed run is the whole one, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from pace import LLM, SamplingParams
from pace.cli import main
from pace.errors import ConfigError
from pace.train.cod import Packed, Rows, lay_out, pack
from pace.train.data import Document
from pace.train.recipe import Cod, Data, Loss, Models, Recipe, Training

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.live

from pace.train import trainer as trainer_module  # noqa: E402  # needs torch
from pace.train.loss import Counts, Teacher, gold_of, guess_loss, row_weights  # noqa: E402  # needs torch
from pace.train.model import batch_of, hidden_states, load_model, tokens_of  # noqa: E402  # needs torch
from pace.train.trainer import Trainer, arithmetic_of, learning_rate, train  # noqa: E402  # needs torch

MASK = 263  # behind the toy tokenizer's tokens, inside its embedding
LENGTHS = ((11, 4), (7, 3), (5, 1))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Passes of microseconds: torch's threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target: the same tokenizer, another depth."""
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "target", num_hidden_layers=3)


def sequences() -> list[Packed]:
    """Two documents in one sequence and one in another, which is padded."""
    rng = np.random.default_rng(5)
    one, two, three = (Document(rng.integers(0, 256, n), begin) for n, begin in LENGTHS)
    return [*pack([one, two], 18), *pack([three], 18)]


def rows_of(packs: list[Packed], seed: int | None = 3) -> list[Rows]:
    rng = None if seed is None else np.random.default_rng(seed)
    return [lay_out(packed, Cod(k=4), MASK, rng) for packed in packs]


def as_inference(model: Any, packed: Packed, rows: Rows, row: int) -> Any:
    """The state of one guess by a pass of its own: the document up to the anchor, and the masks, under a causal mask."""
    anchor, depth = int(rows.anchors[row]), int(rows.depths[row])
    start = anchor - int(packed.positions[anchor])
    ids = [*packed.ids[start : anchor + 1].tolist(), *[MASK] * depth]
    return model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]


def test_a_packed_pass_gives_what_inference_gives(folder: Path) -> None:
    model, _ = load_model(str(folder))
    packs = sequences()
    rows = rows_of(packs)
    states = hidden_states(model, batch_of(rows, torch.device("cpu")), "f32")
    n = 0
    for i, (packed, sequence) in enumerate(zip(packs, rows, strict=True)):
        for row in np.flatnonzero(sequence.labels >= 0):
            wanted = as_inference(model, packed, sequence, int(row))
            torch.testing.assert_close(states[i, row], wanted, atol=2e-5, rtol=1e-4)
            n += 1
    assert n > 20


def separate_loss(model: Any, teacher: Any, packs: list[Packed], rows: list[Rows], loss: Loss, k: int) -> Any:
    """The loss by its definition: a pass for every guess, and one of the teacher for every prefix."""
    terms: list[list[Any]] = [[] for _ in range(k)]
    weights: list[list[float]] = [[] for _ in range(k)]
    for packed, sequence in zip(packs, rows, strict=True):
        for row in np.flatnonzero(sequence.labels >= 0):
            anchor, depth = int(sequence.anchors[row]), int(sequence.depths[row])
            start = anchor - int(packed.positions[anchor])
            head = model.get_output_embeddings()
            log_p = head(as_inference(model, packed, sequence, int(row))).log_softmax(-1)
            with torch.no_grad():
                prefix = torch.tensor([packed.ids[start : anchor + depth + 1].tolist()])
                log_q = teacher(input_ids=prefix).logits[0].log_softmax(-1)
            between = range(anchor + 1, anchor + depth + 1)
            weight = float(sum(log_q[i - 1 - start, packed.ids[i]] for i in between)) if loss.cat else 0.0
            term = -loss.ce * log_p[int(sequence.labels[row])]
            term = term + loss.kl * (log_q[-1].exp() * (log_q[-1] - log_p)).sum()
            terms[depth].append(term)
            weights[depth].append(float(np.exp(weight)))
    sums = [sum(w * t for w, t in zip(ws, ts, strict=True)) for ws, ts in zip(weights, terms, strict=True)]
    if loss.normalization == "pooled":
        return sum(sums) / sum(map(sum, weights))
    return sum(s / sum(ws) for s, ws in zip(sums, weights, strict=True)) / k


@pytest.mark.parametrize(
    "loss",
    [
        Loss(),
        Loss(normalization="pooled"),
        Loss(ce=0.1, kl=1.0, normalization="pooled", cat=True),
        Loss(ce=0.0, kl=1.0, cat=True),
    ],
    ids=["paper", "code", "pard2", "kl"],
)
def test_the_gradient_is_that_of_separate_passes(
    folder: Path, other: Path, loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two micro-batches and pieces of 16 rows, so that what crosses them counts."""
    monkeypatch.setattr("pace.train.loss.PIECE_BYTES", 1)
    model, teacher = load_model(str(folder))[0], load_model(str(other))[0]
    packs = sequences()
    rows = rows_of(packs)
    wanted = separate_loss(model, teacher, packs, rows, loss, 4)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    cpu = torch.device("cpu")
    batches = [batch_of([sequence], cpu) for sequence in rows]
    teachers = []
    for packed in packs:
        batch = batch_of(tokens_of([packed]), cpu)
        with torch.no_grad():
            states = hidden_states(teacher, batch, "f32")
        head = teacher.get_output_embeddings().weight.detach()
        teachers.append(Teacher(states, head, gold_of(states, head, batch.ids, "f32")))
    counts = Counts(4)
    total = 0.0
    for batch, known, weights in zip(batches, teachers, row_weights(batches, teachers, loss, 4), strict=True):
        states = hidden_states(model, batch, "f32")
        head = model.get_output_embeddings().weight
        value = guess_loss(states, head, batch, weights, known, loss, "f32", counts)
        value.backward()
        total += value.item()
    assert total == pytest.approx(wanted.item(), rel=1e-4)
    assert counts.n.sum() == sum((sequence.labels >= 0).sum() for sequence in rows)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, gradients[name], atol=1e-4 * float(gradients[name].abs().max()), rtol=1e-3
        )


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    """Periodic texts: what follows is certain after the first period."""
    file = tmp_path / "texts.jsonl"
    words = ["abcde", "xyz", "12345678", "foo bar ", "qwerty"]
    file.write_text("".join(json.dumps({"text": (word * 9)[:40]}) + "\n" for word in words))
    data = [Data(file=str(file), answers="file")]
    return Recipe(
        models=Models(target=str(folder), draft=str(folder), mask_token_id=MASK),
        data=data,
        held_out=data,
        cod=Cod(k=4),
        training=Training(
            steps=4,
            context_len=96,
            batch_size=2,
            lr=3e-3,
            weight_decay=0.1,
            save_every=2,
            eval_every=2,
            threads=1,
        ),
    )


def files_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix in {".jsonl", ".json", ".safetensors"}
    }


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: weights, and every number that was written."""
    train(recipe, tmp_path / "whole")
    step: Callable[[Trainer], Any] = Trainer.train_step

    def killed(self: Trainer) -> Any:
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "killed")
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 3, (
        "one step was not saved"
    )
    monkeypatch.undo()
    train(recipe, tmp_path / "killed")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    states = [torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("whole", "killed")]
    for name, tensor in states[0]["draft"].items():
        assert torch.equal(tensor, states[1]["draft"][name]), name


def test_micro_batches_change_no_step(recipe: Recipe, tmp_path: Path) -> None:
    small = dataclasses.replace(
        recipe, training=dataclasses.replace(recipe.training, micro_batch_size=1, dtype="f32", steps=1)
    )
    large = dataclasses.replace(
        small, training=dataclasses.replace(small.training, micro_batch_size=small.training.batch_size)
    )
    unsaid = dataclasses.replace(small, training=dataclasses.replace(small.training, micro_batch_size=None))
    losses = []
    for name, run in (("small", small), ("large", large), ("unsaid", unsaid)):
        train(run, tmp_path / name)
        losses.append(json.loads((tmp_path / name / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] == losses[0], "a CPU takes one sequence at a time"


def test_the_target_reads_a_sequence_once(
    recipe: Recipe, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later epochs find what it said, and learn what they would from a target that reads anew."""
    recipe = dataclasses.replace(
        recipe,
        models=dataclasses.replace(recipe.models, target=str(other)),
        loss=Loss(ce=0.5, kl=0.5, cat=True),
        training=dataclasses.replace(recipe.training, micro_batch_size=1, steps=8),
    )
    passes = []

    def seen(model: Any, *rest: Any) -> Any:
        passes.append(model)
        return hidden_states(model, *rest)

    monkeypatch.setattr(trainer_module, "hidden_states", seen)
    weights = []
    for kept_bytes in (1 << 20, 0):
        monkeypatch.setattr(trainer_module, "KEPT_BYTES", kept_bytes)
        passes.clear()
        trainer = Trainer(recipe, *documents(recipe), tmp_path)
        for _ in range(8):
            trainer.train_step()
        n_passes = len(trainer.sequences) if kept_bytes else 8 * recipe.training.batch_size
        assert 8 * recipe.training.batch_size > len(trainer.sequences)
        assert sum(model is trainer.teacher for model in passes) == n_passes
        weights.append(trainer.draft.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        (["avx2"], "f32"),
        (["avx512vnni", "avx512"], "f32"),
        (["avx512bf16", "avx512"], "bf16"),
        (["amx"], "bf16"),
    ],
)
def test_arithmetic_is_bf16_where_the_cpu_has_it(
    tiers: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "isas", lambda: tiers)
    cpu = torch.device("cpu")
    assert arithmetic_of("auto", cpu) == expected
    assert arithmetic_of("auto", torch.device("cuda")) == "bf16"
    assert arithmetic_of("bf16", cpu) == "bf16" and arithmetic_of("f32", cpu) == "f32"


def test_a_state_of_another_recipe_is_not_taken_up(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run")
    changed = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, lr=1e-3))
    with pytest.raises(
        ConfigError, match=r"training\.lr = 0\.003, the recipe says 0\.001; choose another folder"
    ):
        train(changed, tmp_path / "run")


def test_a_toy_learns_to_guess_ahead_and_its_checkpoint_loads(recipe: Recipe, tmp_path: Path) -> None:
    # 200 steps: after 120 one guess of the three below is still wrong where the CPU multiplies bf16 (f32 needs no more).
    recipe = dataclasses.replace(
        recipe, training=dataclasses.replace(recipe.training, steps=200, save_every=300, eval_every=300)
    )
    before = Trainer(recipe, *documents(recipe), tmp_path).evaluate()
    after = train(recipe, tmp_path / "run")
    assert after is not None and after.length > 3.0 > 1.5 > before.length
    assert after.by_depth[3] > 0.5, "the deepest guess is learnt, too"
    for name in ("loss.png", "acceptance.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")

    draft = tmp_path / "run" / "draft"
    config = json.loads((draft / "config.json").read_text())
    assert (
        config["pard_token"] == MASK and config["spd_type"] == "pard" and config["torch_dtype"] == "bfloat16"
    )
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
    llm = LLM(draft, threads=1, max_model_len=64)
    prompt = llm.get_tokenizer().encode("abcdeabcdeabc")
    (output,) = llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=6))
    llm.close()
    assert output.outputs[0].text == "deabcd"
    guess = theirs(input_ids=torch.tensor([[*prompt, MASK, MASK]])).logits[0, -3:].argmax(-1)
    assert guess.tolist() == list(output.outputs[0].token_ids[:3])


def documents(recipe: Recipe) -> tuple[list[Document], list[Document]]:
    from pace.train.data import Target, load_documents

    target = Target(recipe.models.target, recipe.training.context_len, 1)
    found = load_documents(recipe.data[0], target, Path("unused"), 0)
    return found, found


def test_layers_and_channels_can_be_taken_from_a_larger_model(other: Path) -> None:
    whole, _ = load_model(str(other))
    smaller, _ = load_model(str(other), layers=[0, 2, 2], intermediate_size=32)
    layers, chosen = whole.model.layers, smaller.model.layers
    assert smaller.config.num_hidden_layers == 3 and smaller.config.intermediate_size == 32
    for new, old in ((0, 0), (1, 2), (2, 2)):
        assert torch.equal(chosen[new].self_attn.q_proj.weight, layers[old].self_attn.q_proj.weight)
        rows = {tuple(row) for row in layers[old].mlp.gate_proj.weight.tolist()}
        assert {tuple(row) for row in chosen[new].mlp.gate_proj.weight.tolist()} < rows
    assert chosen[1].mlp.up_proj.weight is not chosen[2].mlp.up_proj.weight
    same, _ = load_model(str(other), layers=[0, 1, 2], intermediate_size=128)
    ids = torch.arange(9)[None]
    assert torch.equal(same(input_ids=ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "models.layers has 3, but .* has the layers 0 to 1"),
        ({"layers": []}, "models.layers is empty"),
        ({"intermediate_size": 129}, "have 128 channels"),
        ({"mask_token_id": 4096}, "mask_token_id is 4096, but the draft's embedding has 272 rows"),
        ({"mask_token_id": None}, "no pard_token; name an unused token"),
    ],
)
def test_a_wrong_draft_is_refused(
    recipe: Recipe, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    wrong = dataclasses.replace(recipe, models=dataclasses.replace(recipe.models, **options))
    with pytest.raises(ConfigError, match=message):
        train(wrong, tmp_path / "run")


def test_a_mask_that_texts_contain_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    token = int(documents(recipe)[0][0].ids[1])
    wrong = dataclasses.replace(recipe, models=dataclasses.replace(recipe.models, mask_token_id=token))
    with pytest.raises(ConfigError, match=f"a document has the mask token {token}"):
        train(wrong, tmp_path / "run")


def test_the_schedule_warms_up_and_decays() -> None:
    training = Training(lr=1.0, schedule="cosine", warmup_share=0.1, final_lr_share=0.2)
    rates = [learning_rate(step, 100, training) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0 and rates[99] == pytest.approx(0.2, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(99, 100, Training(lr=2.0)) == 2.0


def test_the_command_trains_and_says_where_the_draft_is(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.toml"
    models, data = recipe.models, recipe.data[0]
    source = f'file = "{data.file}"\nanswers = "file"\n'
    config.write_text(
        f'[models]\ntarget = "{models.target}"\ndraft = "{models.draft}"\nmask_token_id = {MASK}\n'
        f"[[data]]\n{source}[[held_out]]\n{source}"
        "[cod]\nk = 2\n[training]\nsteps = 1\ncontext_len = 96\nbatch_size = 1\nthreads = 1\n"
    )
    assert main(["train", "pard", "--config", str(config)]) == 0
    text = capsys.readouterr().out
    assert f"draft: {tmp_path / 'small' / 'draft'}\n" in text and "at K = 2" in text
    assert (tmp_path / "small" / "draft" / "model.safetensors").is_file()
    assert main(["train", "pard", "--config", str(config), "--json"]) == 0, (
        "a finished run is only looked at again"
    )
    assert json.loads(capsys.readouterr().out)["held_out"]["n_rounds"] > 0
