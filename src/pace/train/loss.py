"""The loss over all guesses of a step, and its gradient, a piece of the vocabulary products at a time.

Logits of all rows at once would be 4.6 GB for a batch of 64 x 512 tokens' first micro-batch of 4 and Llama 3's vocabulary.
The gradient of a softmax is known in closed form, so each piece gives its part of the gradient in the same sweep and its
logits are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pace.train.model import Batch, arithmetic
from pace.train.recipe import Loss

__all__ = ["Counts", "Teacher", "gold_of", "guess_loss", "row_weights"]

PIECE_BYTES = 16 << 20
"""Of f32 logits at once."""


@dataclass
class Counts:
    """Sums over guesses by depth, f64[K] each: how many, their surprise in nats, and how many were right."""

    k: int
    n: Tensor = field(init=False)
    nats: Tensor = field(init=False)
    right: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.n, self.nats, self.right = torch.zeros(3, self.k, dtype=torch.float64)

    def add(self, depths: Tensor, nats: Tensor, right: Tensor) -> None:
        """Add guesses, [R] each."""
        depths = depths.cpu()
        self.n.index_add_(0, depths, torch.ones(len(depths), dtype=torch.float64))
        self.nats.index_add_(0, depths, nats.double().cpu())
        self.right.index_add_(0, depths, right.double().cpu())


@dataclass(frozen=True)
class Teacher:
    """What the target says of a batch's tokens.

    Attributes:
        states: f32[B, L, dim of the target], and its head f32[vocab, dim], of the tokens that the draft may guess.
        gold: f32[B, L]: log probability of the token behind each one; None where nobody asks.
    """

    states: Tensor
    head: Tensor
    gold: Tensor | None = None


@torch.no_grad()
def gold_of(states: Tensor, head: Tensor, ids: Tensor, dtype: str) -> Tensor:
    """f32[B, L]: log probability that the target gives to the token behind each of ids i64[B, L]; 0 behind the last."""
    flat = states[:, :-1].flatten(0, 1)
    following = ids[:, 1:].flatten()
    gold = torch.empty(len(flat), device=flat.device)
    for rows in torch.arange(len(flat), device=flat.device).split(_rows_of_a_piece(len(head))):
        with arithmetic(flat.device, dtype):
            logits = (flat[rows] @ head.T).float()
        gold[rows] = logits.log_softmax(-1).gather(1, following[rows, None])[:, 0]
    return torch.nn.functional.pad(gold.view(len(ids), -1), (0, 1))


def row_weights(
    batches: Sequence[Batch], teachers: Sequence[Teacher | None], loss: Loss, k: int
) -> list[Tensor]:
    """What each guess of a step counts, f32[R] for every micro-batch in the order of `Batch.places`; the sum is 1."""
    weights, depths = [], []
    for batch, teacher in zip(batches, teachers, strict=True):
        b, t = batch.places()
        depths.append(batch.depths[b, t])
        weight = torch.ones(len(b), dtype=torch.float64, device=b.device)
        if loss.cat and teacher is not None and teacher.gold is not None:
            # Between the anchor and the guess lie the tokens anchor + 1 .. anchor + depth.
            before = torch.nn.functional.pad(teacher.gold.double().cumsum(1), (1, 0))
            anchor = batch.anchors[b, t]
            weight = (before[b, anchor + depths[-1]] - before[b, anchor]).exp()
        weights.append(weight)
    totals = torch.zeros(k, dtype=torch.float64, device=weights[0].device)
    for weight, depth in zip(weights, depths, strict=True):
        totals.index_add_(0, depth, weight)
    if loss.normalization == "pooled":
        totals = totals.sum().expand(k)
    else:
        totals = totals * (totals > 0).sum()
    return [(weight / totals[depth]).float() for weight, depth in zip(weights, depths, strict=True)]


def guess_loss(
    states: Tensor,
    head: Tensor,
    batch: Batch,
    weights: Tensor,
    teacher: Teacher | None,
    loss: Loss,
    dtype: str,
    counts: Counts,
) -> Tensor:
    """The weighted sum of a micro-batch's losses, differentiable in `states` and `head`.

    Args:
        states: f32[B, T, dim] of the draft; head: f32[vocab, dim], whose rows the batch's labels count.
        batch: whose guesses.
        weights: f32[R] of `row_weights`.
        teacher: of the same tokens; None where the loss needs none.
        loss: the weights of its two parts.
        dtype: of the products.
        counts: where the guesses are counted.
    """
    total: Tensor = _GuessLoss.apply(states, head, batch, weights, teacher, loss, dtype, counts)
    return total


class _GuessLoss(torch.autograd.Function):
    """Value and gradient in one sweep over pieces of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        batch: Batch,
        weights: Tensor,
        teacher: Teacher | None,
        loss: Loss,
        dtype: str,
        counts: Counts,
    ) -> Tensor:
        b, t = batch.places()
        labels, depths = batch.labels[b, t], batch.depths[b, t]
        sources = batch.anchors[b, t] + depths
        to_states = torch.zeros_like(states)
        to_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float64)
        # Once, and not in every piece: Llama 3's head takes as long to round as 100 rows take to multiply with it.
        factor = head.bfloat16() if dtype == "bf16" else head
        for rows in torch.arange(len(b), device=b.device).split(_rows_of_a_piece(len(head))):
            hidden = states[b[rows], t[rows]]  # f32[r, dim]
            with arithmetic(states.device, dtype):
                logits = (hidden @ factor.T).float()  # f32[r, vocab]
            right = logits.argmax(1) == labels[rows]
            log_p = logits.log_softmax(1)
            label = labels[rows, None]
            nats = -log_p.gather(1, label)[:, 0]
            counts.add(depths[rows], nats, right)
            value = loss.ce * nats
            # d(ce) = p - onehot, d(kl) = p - wanted
            slope = log_p.exp().mul_(loss.ce + loss.kl)
            slope.scatter_add_(1, label, torch.full_like(nats, -loss.ce)[:, None])
            if loss.kl > 0 and teacher is not None:
                wanted, log_wanted = _wanted(teacher, b[rows], sources[rows], len(head), dtype)
                value = value + loss.kl * (wanted * (log_wanted - log_p)).sum(1)
                slope.sub_(wanted, alpha=loss.kl)
            total += (value * weights[rows]).sum().double().cpu()
            slope.mul_(weights[rows, None])
            with arithmetic(states.device, dtype):
                to_states[b[rows], t[rows]] = (slope @ factor).float()
                if to_head is not None:
                    to_head += (slope.T @ hidden).float()
        ctx.save_for_backward(to_states, to_head)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        to_states, to_head = ctx.saved_tensors
        (slope,) = slopes
        return (
            to_states * slope,
            None if to_head is None else to_head * slope,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def _wanted(
    teacher: Teacher, b: Tensor, sources: Tensor, vocab_size: int, dtype: str
) -> tuple[Tensor, Tensor]:
    """The target's distribution behind the given tokens, f32[r, vocab_size], and its log; each token is computed once.

    Embeddings of one family are padded to different sizes: what the draft lacks is cut, what the target lacks is
    improbable.
    """
    at, row = torch.unique_consecutive(b * teacher.states.shape[1] + sources, return_inverse=True)
    with arithmetic(b.device, dtype):
        logits = (teacher.states.flatten(0, 1)[at] @ teacher.head.T).float()
    logits = torch.nn.functional.pad(logits, (0, max(0, vocab_size - logits.shape[1])), value=-1e4)
    log_wanted = logits[:, :vocab_size].log_softmax(1)[row]
    return log_wanted.exp(), log_wanted


def _rows_of_a_piece(vocab_size: int) -> int:
    return max(16, PIECE_BYTES // (4 * vocab_size))
