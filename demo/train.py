"""Train the embedded target on the encoded corpus.

The run may be stopped (SIGSTOP), killed and started again at will: the schedule counts steps, never seconds,
every batch is a function of (seed, step), and the state is saved every `SAVE_EVERY` steps, so that a resumed
run continues the very same sequence of batches.

    python demo/train.py --work build/demo --steps 5000
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from shapes import model_config
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from train_tokenizer import BOS
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20
BATCH_TOKENS = 4096  # 8 x 512: at this budget many small steps beat few large ones
CONTEXT_LEN = 512
LONG_CONTEXT_LEN = 2048  # every 8th step, every 2nd in the last 15 %: it must hold that far
# A line end shares a token with the punctuation before it ("):\n"), but a prompt often stops between the two.
# Writing this share of them as two tokens ("):", "\n") teaches the model to go on from there.
SPLIT_SHARE = 0.1
MIXTURE = {"module": 0.5, "test": 0.35, "chat": 0.15}
PEAK_LR = 2e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
LOG_EVERY = 50
SAVE_EVERY = 200
VALID_EVERY = 500
N_VALID_BATCHES = 12

IntArray = npt.NDArray[np.int64]
Loss = Callable[[Tensor, Tensor], Tensor]  # (inputs i64[B, T], labels i64[B, T]) -> mean loss in nats


class Stream:
    """One kind of document as a stream of token ids, with the places where a training window may begin."""

    def __init__(self, path: Path, tokenizer: Tokenizer, whole_documents: bool) -> None:
        """Read the ids of `path`, uint16[n]; windows begin at a line, or only at `whole_documents`."""
        self.ids = np.load(path).astype(np.int64)  # i64[n]
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.get_vocab_size())]
        ends_line = np.array([text.endswith("\n") for text in texts])[self.ids]
        indented = np.array([text[:1].isspace() for text in texts])[self.ids]
        documents = self.ids == BOS
        after_newline = np.concatenate([[False], ends_line[:-1]])
        lines = documents if whole_documents else documents | after_newline
        blocks = documents if whole_documents else documents | (after_newline & ~indented)
        self.starts = [np.flatnonzero(lines), np.flatnonzero(blocks)]
        vocabulary = {text: i for i, text in enumerate(texts)}
        self.head, self.tail = np.full((2, len(texts)), -1)  # i64[vocab_size]: the two parts of "):\n", or -1
        for i, text in enumerate(texts):
            head, tail = text.rstrip("\n"), text[len(text.rstrip("\n")) :]
            if head and tail and head in vocabulary and tail in vocabulary:
                self.head[i], self.tail[i] = vocabulary[head], vocabulary[tail]

    def split(self, ids: IntArray, rng: np.random.Generator, share: float) -> IntArray:
        """`ids` with a `share` of the line ends taken off the punctuation before them; same length."""
        at = np.flatnonzero((self.head[ids] >= 0) & (rng.random(len(ids)) < share))
        tails, ids = self.tail[ids[at]], ids.copy()
        ids[at] = self.head[ids[at]]
        return np.insert(ids, at + 1, tails)[: len(ids)]

    def window(self, rng: np.random.Generator, n_ids: int) -> IntArray:
        """`n_ids` ids opening with <|endoftext|>: from any line, or half of the time from an unindented one.

        Every sequence the model will ever see opens with that token, so every window does.
        """
        starts = self.starts[int(rng.integers(2))]
        at = min(int(starts[int(rng.integers(len(starts)))]), len(self.ids) - n_ids)
        ids: IntArray = self.ids[at : at + n_ids]
        return ids if ids[0] == BOS else np.concatenate([[BOS], ids[:-1]])


class Batches:
    """The batches of one split: a function of (seed, step), so that a resumed run repeats nothing."""

    def __init__(self, work: Path, split: str) -> None:
        """Open the streams of `split` ("train" or "valid") that `train_tokenizer.py` wrote into `work`."""
        tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        self.split_share = SPLIT_SHARE if split == "train" else 0.0
        self.streams = {k: Stream(work / f"{split}_{k}.npy", tokenizer, k == "chat") for k in MIXTURE}

    def __call__(self, seed: int, step: int, context_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, i64[BATCH_TOKENS / context_len, context_len]."""
        rng = np.random.default_rng((seed, step))
        kinds = rng.choice(list(MIXTURE), size=BATCH_TOKENS // context_len, p=list(MIXTURE.values()))
        windows = []
        for kind in kinds:
            stream = self.streams[kind]
            windows.append(stream.split(stream.window(rng, context_len + 1), rng, self.split_share))
        rows = torch.from_numpy(np.stack(windows))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def build() -> LlamaForCausalLM:
    """A freshly initialised model in float32 (the master weights; the arithmetic runs in bfloat16)."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig.from_dict(model_config()))
    return model.to(torch.float32)  # type: ignore[no-any-return, arg-type]


def logits(model: LlamaForCausalLM, inputs: Tensor) -> Tensor:
    """Logits f32[B * T, vocab_size], matrix products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        out: Tensor = model(input_ids=inputs, use_cache=False).logits
    return out.float().flatten(0, 1)


def cross_entropy(model: LlamaForCausalLM) -> Loss:
    """The next token's surprise."""
    return lambda inputs, labels: functional.cross_entropy(logits(model, inputs), labels.flatten())


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """Linear warm-up over `WARMUP_STEPS`, then cosine to zero at `n_steps`."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, n_steps - WARMUP_STEPS)))


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with decay on the matrices and none on the norms' vectors."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def state_path(work: Path) -> Path:
    """Where the training state lives."""
    return work / "target.pt"


def save(work: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int) -> None:
    """Replace the state file in one rename, so that a kill leaves the old or the new one, never a half."""
    path = state_path(work)
    partial = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
    partial.replace(path)


@torch.no_grad()
def validate(loss: Loss, batches: Batches) -> float:
    """Mean loss over the same held-out batches each time."""
    return sum(loss(*batches(0, i, CONTEXT_LEN)).item() for i in range(N_VALID_BATCHES)) / N_VALID_BATCHES


def forget_after(curve: Path, step: int) -> None:
    """Drop the rows of `curve` past `step`: a resumed run writes them again."""
    rows = curve.read_text(encoding="utf-8").splitlines(keepends=True) if curve.exists() else []
    curve.write_text("".join(row for row in rows if int(row.split(",")[0]) <= step), encoding="utf-8")


def train(work: Path, n_steps: int) -> None:
    """Train up to `n_steps`, from the saved state if there is one; curve in ``target.csv``."""
    model = build()
    optimizer = optimizer_of(model)
    first, curve = 0, work / "target.csv"
    if state_path(work).exists():
        state = torch.load(state_path(work), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    forget_after(curve, first)
    loss = cross_entropy(model)
    # Fusing the element-wise work makes a step 1.6 times as fast (7300 tokens/s against 4600, two cores).
    compiled = torch.compile(loss, dynamic=False)
    batches, held_out = Batches(work, "train"), Batches(work, "valid")
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params} parameters, steps {first}-{n_steps}", flush=True)
    started, cpu_started, running = time.monotonic(), time.process_time(), []
    for step in range(first, n_steps):
        long = step % (2 if step >= 0.85 * n_steps else 8) == 0
        inputs, labels = batches(SEED, step, LONG_CONTEXT_LEN if long else CONTEXT_LEN)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, PEAK_LR)
        value = compiled(inputs, labels)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        running.append(value.item())
        done = step + 1
        if done % SAVE_EVERY == 0 or done == n_steps:
            save(work, model, optimizer, done)
        if done % LOG_EVERY == 0 or done == n_steps:
            valid = f"{validate(loss, held_out):.4f}" if done % VALID_EVERY == 0 or done == n_steps else ""
            row = [done, done * BATCH_TOKENS, f"{sum(running) / len(running):.4f}", valid]
            with curve.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
            wall, cpu = time.monotonic() - started, time.process_time() - cpu_started
            print(*row, f"wall {wall:.0f} s", f"cpu {cpu:.0f} s", flush=True)
            running.clear()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="encoded corpus")
    parser.add_argument("--steps", type=int, required=True, help=f"steps in all, {BATCH_TOKENS} tokens each")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.work, args.steps)


if __name__ == "__main__":
    main()
