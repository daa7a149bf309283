"""The run: batches by (seed, step), steps, saved states, a look at held-out documents, and the finished checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pace.console import progress_bar
from pace.errors import ConfigError, show
from pace.ops import isas
from pace.train import curves
from pace.train.acceptance import Acceptance, count
from pace.train.checkpoint import save_checkpoint
from pace.train.cod import Packed, Rows, lay_out, pack
from pace.train.data import Document, Target, load_documents
from pace.train.loss import Counts, Teacher, gold_of, guess_loss, row_weights
from pace.train.model import batch_of, hidden_states, load_model, mask_token_of, tokens_of
from pace.train.recipe import Data, Recipe, Training
from pace.train.vocabulary import Vocabulary

__all__ = ["Trainer", "train"]

STATE, METRICS, DRAFT = "state.pt", "metrics.jsonl", "draft"
EVAL_SEQUENCES = 2
"""Sequences of one pass over held-out documents."""
KEPT_BYTES = 4 << 30
"""Of the target's states, which an epoch keeps for the next ones."""


def train(recipe: Recipe, out: Path, *, show_progress: bool | None = None) -> Acceptance | None:
    """Carry a recipe out, or go on with what an interrupted run left in `out`.

    Args:
        recipe: the run.
        out: a folder for answers, states, metrics, curves and, as `draft`, the checkpoint.
        show_progress: a progress bar on stderr; None: where that is a terminal.

    Returns:
        The acceptance on held-out documents in the end; None where there are none.

    Raises:
        ConfigError: the recipe, its data or its models can't be used, or `out` holds the run of another recipe.
        CheckpointError: a model can't be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _threads(recipe.training.threads):
        target = Target(recipe.models.target, recipe.training.context_len, recipe.training.threads)
        try:
            documents = _documents(recipe.data, "data", target, out, recipe.training.seed)
            held_out = _documents(recipe.held_out, "held_out", target, out, recipe.training.seed)
        finally:
            target.close()
        if not documents:
            raise ConfigError(
                f"no document is left to learn from: in all of them the answer begins behind training.context_len, "
                f"{recipe.training.context_len}"
            )
        trainer = Trainer(recipe, documents, held_out, out)
        return trainer.run(target.directory, show_progress)


@contextmanager
def _threads(n_threads: int | None) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _documents(sources: Sequence[Data], kind: str, target: Target, out: Path, seed: int) -> list[Document]:
    return [
        document
        for i, source in enumerate(sources)
        for document in load_documents(source, target, out / f"answers-{kind}-{i}.jsonl", seed)
    ]


@dataclass(frozen=True)
class _Step:
    """What came of a step: its loss and its guesses by depth."""

    loss: float
    counts: Counts
    n_tokens: int
    n_rows: int


class Trainer:
    """Model, optimiser and data of one run; a function of the recipe and the number of steps done."""

    def __init__(
        self, recipe: Recipe, documents: Sequence[Document], held_out: Sequence[Document], out: Path
    ) -> None:
        """Load the models and pack the documents; the state in `out`, if there is one, is taken up."""
        training = recipe.training
        self.recipe, self.out = recipe, out
        self.device = _device(training.device)
        self.dtype = arithmetic_of(training.dtype, self.device)
        models = recipe.models
        self.draft, self.directory = load_model(models.draft, models.layers, models.intermediate_size)
        vocab_size = self.draft.config.vocab_size
        self.mask_id = mask_token_of(self.directory, models.mask_token_id, vocab_size)
        _check_ids([*documents, *held_out], self.mask_id, vocab_size)
        self.vocab = None
        if models.vocab_size is not None:
            self.vocab = Vocabulary.of(documents, models.vocab_size, vocab_size)
        self.sequences = pack(documents, training.context_len)
        self.held_out = pack(held_out, training.context_len) if held_out else []
        per_epoch = math.ceil(len(self.sequences) / training.batch_size)
        self.n_steps = training.steps or max(1, round(per_epoch * training.epochs))
        self.teacher: Any = None
        if recipe.loss.needs_teacher:
            self.teacher = load_model(models.target)[0].to(self.device).eval().requires_grad_(False)
            self._teacher_head = self._rows_of(self.teacher.get_output_embeddings().weight)
        # By the id of the packed sequence, which lives as long as the run.
        self._kept: dict[int, Teacher] = {}
        self.draft.to(self.device).train()
        if training.freeze_embedding:
            self.draft.get_input_embeddings().weight.requires_grad_(False)
        if training.checkpointing:
            # The reentrant kind gives no gradient behind an embedding that is frozen.
            self.draft.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = _optimizer(self.draft, training)
        self.step = 0
        self._resume()

    # ---- a step ------------------------------------------------------------------------------------------

    def batch_at(self, step: int) -> list[Packed]:
        """The sequences of a step: every one once in an epoch, in an order that the seed and the epoch give."""
        training, n = self.recipe.training, len(self.sequences)
        batch = []
        for at in range(step * training.batch_size, (step + 1) * training.batch_size):
            epoch, place = divmod(at, n)
            batch.append(self.sequences[_order(training.seed, epoch, n)[place]])
        return batch

    def train_step(self) -> _Step:
        """Take the next step."""
        training, loss = self.recipe.training, self.recipe.loss
        rng = np.random.default_rng((training.seed, self.step))
        packs = self.batch_at(self.step)
        rows = [self._lay_out(packed, rng) for packed in packs]
        # Padding a batch of 8 to its longest took 4.2 s of one Zen 3 core a step, one sequence at a time 3.0 s.
        size = training.micro_batch_size or (1 if self.device.type == "cpu" else len(packs))
        parts = [slice(at, at + size) for at in range(0, len(packs), size)]
        batches = [batch_of(rows[part], self.device) for part in parts]
        teachers = [self._teacher(packs[part]) for part in parts]
        weights = row_weights(batches, teachers, loss, self.recipe.cod.k)
        counts = Counts(self.recipe.cod.k)
        total = 0.0
        for batch, teacher, weight in zip(batches, teachers, weights, strict=True):
            states = hidden_states(self.draft, batch, self.dtype)
            head = self._rows_of(self.draft.get_output_embeddings().weight)
            value = guess_loss(states, head, batch, weight, teacher, loss, self.dtype, counts)
            value.backward()
            total += value.item()
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), training.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.n_steps, training)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return _Step(total, counts, sum(len(p.ids) for p in packs), sum(len(r.ids) for r in rows))

    @torch.no_grad()
    def _teacher(self, packs: Sequence[Packed]) -> Teacher | None:
        """What the target says of a micro-batch's tokens.

        A sequence that is one has the same answer in every epoch, and it is kept: a target of 135 M weights takes as
        long for a sequence as six of its layers take to learn it. One in a batch has other bits beside other sequences.
        """
        if self.teacher is None:
            return None
        known = self._kept.get(id(packs[0])) if len(packs) == 1 else None
        if known is not None:
            return known
        batch = batch_of(tokens_of(packs), self.device)
        states = hidden_states(self.teacher, batch, self.dtype)
        head = self.teacher.get_output_embeddings().weight
        gold = gold_of(states, head, batch.ids, self.dtype) if self.recipe.loss.cat else None
        teacher = Teacher(states, self._teacher_head, gold)
        if len(packs) == 1 and (len(self._kept) + 1) * states.nbytes <= KEPT_BYTES:
            self._kept[id(packs[0])] = teacher
        return teacher

    def _lay_out(self, packed: Packed, rng: np.random.Generator | None) -> Rows:
        rows = lay_out(packed, self.recipe.cod, self.mask_id, rng)
        return rows if self.vocab is None else self.vocab.relabel(rows)

    def _rows_of(self, head: Tensor) -> Tensor:
        """The rows of a head f32[vocab, dim] that the labels count."""
        return head if self.vocab is None else head[torch.from_numpy(self.vocab.ids).to(head.device)]

    @torch.no_grad()
    def evaluate(self) -> Acceptance:
        """What decoding the held-out documents would have accepted."""
        self.draft.eval()
        outputs: list[npt.NDArray[np.bool_]] = []
        for at in range(0, len(self.held_out), EVAL_SEQUENCES):
            packs = self.held_out[at : at + EVAL_SEQUENCES]
            rows = [self._lay_out(packed, None) for packed in packs]
            batch = batch_of(rows, self.device)
            states = hidden_states(self.draft, batch, self.dtype)
            head = self._rows_of(self.draft.get_output_embeddings().weight)
            for i, packed in enumerate(packs):
                at_rows = torch.nonzero(batch.labels[i] >= 0)[:, 0]
                guesses = (states[i, at_rows] @ head.T).argmax(1)
                right = torch.zeros(len(packed.ids), self.recipe.cod.k, dtype=torch.bool, device=self.device)
                right[batch.anchors[i, at_rows], batch.depths[i, at_rows]] = (
                    guesses == batch.labels[i, at_rows]
                )
                for document in range(int(packed.documents[-1]) + 1):
                    anchors = np.flatnonzero((packed.documents == document) & (packed.reach > 0))
                    outputs.append(right.cpu().numpy()[anchors])
        self.draft.train()
        return count(outputs, self.recipe.cod.k)

    # ---- the run -----------------------------------------------------------------------------------------

    def run(self, target_directory: Path, show_progress: bool | None = None) -> Acceptance | None:
        """Take all steps that are left, and write the checkpoint."""
        training = self.recipe.training
        bar = progress_bar(show_progress, total=self.n_steps, initial=self.step, desc="train", unit="step")
        acceptance = None
        while self.step < self.n_steps:
            result = self.train_step()
            row: dict[str, Any] = {
                "step": self.step,
                "n_tokens": result.n_tokens,
                "n_rows": result.n_rows,
                "loss": result.loss,
                "nats": _means(result.counts.nats, result.counts.n),
                "right": _means(result.counts.right, result.counts.n),
            }
            last = self.step == self.n_steps
            if self.held_out and (last or self.step % training.eval_every == 0):
                acceptance = self.evaluate()
                row["acceptance_length"] = acceptance.length
                row["acceptance_by_depth"] = acceptance.by_depth
            with (self.out / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if last or self.step % training.save_every == 0:
                self._save()
            if bar is not None:
                length = {} if acceptance is None else {"acceptance": f"{acceptance.length:.2f}"}
                bar.set_postfix(loss=f"{result.loss:.3f}", **length)
                bar.update()
        if bar is not None:
            bar.close()
        if acceptance is None and self.held_out:
            acceptance = self.evaluate()
        vocab = None if self.vocab is None else self.vocab.ids
        save_checkpoint(self.draft, self.mask_id, self.directory, self.out / DRAFT, vocab)
        curves.draw(self.out / METRICS, self.out)
        return acceptance

    def _save(self) -> None:
        """Replace the state in one rename: a kill leaves the old one or the new one."""
        state = {
            "recipe": json.dumps(self.recipe.to_json(), sort_keys=True),
            "step": self.step,
            "draft": self.draft.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.out / f"{STATE}.part"
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.out / STATE)

    def _resume(self) -> None:
        """Take up the state in `out`, and drop the metrics of steps that it has not taken."""
        path = self.out / STATE
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            _check_same(json.loads(state["recipe"]), self.recipe.to_json(), path)
            self.draft.load_state_dict(state["draft"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        metrics = self.out / METRICS
        if metrics.exists():
            lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            metrics.write_text("".join(lines[: self.step]), encoding="utf-8")


def learning_rate(step: int, n_steps: int, training: Training) -> float:
    """Of step `step`, 0 .. n_steps - 1: a linear warm-up, then constant or a cosine."""
    n_warmup = round(training.warmup_share * n_steps)
    if step < n_warmup:
        return training.lr * (step + 1) / n_warmup
    if training.schedule == "constant":
        return training.lr
    share = (step - n_warmup) / max(1, n_steps - n_warmup)
    low = training.final_lr_share
    return training.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))


def _order(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, 1 << 32, epoch)).permutation(n)


def _optimizer(model: Any, training: Training) -> torch.optim.AdamW:
    """AdamW; no decay on the norms' vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    first, second = training.betas
    return torch.optim.AdamW(groups, lr=training.lr, betas=(first, second))


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("training.device is cuda, but torch finds no GPU")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def arithmetic_of(dtype: str, device: torch.device) -> str:
    """ "bf16" or "f32"; for "auto" the faster one: a CPU without bf16 products emulates them, in 4 times the time."""
    if dtype != "auto":
        return dtype
    return "bf16" if device.type == "cuda" or {"avx512bf16", "amx"}.intersection(isas()) else "f32"


def _check_ids(documents: Sequence[Document], mask_id: int, vocab_size: int) -> None:
    for document in documents:
        if int(document.ids.max()) >= vocab_size:
            raise ConfigError(
                f"a document has the token {int(document.ids.max())}, but the draft's embedding has {vocab_size} rows; "
                "draft and target need one tokenizer"
            )
        if (document.ids == mask_id).any():
            raise ConfigError(f"a document has the mask token {mask_id}; name one that no text contains")


def _check_same(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    for name, value in new.items():
        if old.get(name) == value:
            continue
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            name, value, was = next(
                (f"{name}.{k}", v, old[name].get(k)) for k, v in value.items() if v != old[name].get(k)
            )
        else:
            was = old.get(name)
        raise ConfigError(
            f"{path} is of a run with {name} = {show(was)}, the recipe says {show(value)}; choose another folder"
        )


def _means(sums: Tensor, counts: Tensor) -> list[float]:
    return [float(x) for x in sums / counts.clamp(min=1)]
