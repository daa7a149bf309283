"""Look at the exported pair with `transformers`: held-out loss, agreement of the two, and a completion.

python demo/evaluate.py --work build/demo --pair src/pace/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional
from train import CONTEXT_LEN, LONG_CONTEXT_LEN, Batches
from train_tokenizer import BOS, END, PAD
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

PROMPT = "def fibonacci(n):"
QUESTION = "Write a function read_lines: Return the lines of a text file without their line ends."


@torch.no_grad()
def compare(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, batches: Batches, context_len: int
) -> list[float]:
    """Held-out loss of target and draft (nats), and how often they agree, greedily and under sampling.

    The last is the chance that speculative sampling keeps a token drawn from the draft: the sum of min(p, q).
    """
    sums = torch.zeros(4)
    for step in range(12):
        inputs, labels = batches(0, step, context_len)
        p = functional.log_softmax(target(inputs).logits.float(), -1)
        q = functional.log_softmax(draft(inputs).logits.float(), -1)
        sums[0] += functional.nll_loss(p.flatten(0, 1), labels.flatten())
        sums[1] += functional.nll_loss(q.flatten(0, 1), labels.flatten())
        sums[2] += (p.argmax(-1) == q.argmax(-1)).float().mean()
        sums[3] += torch.minimum(p.exp(), q.exp()).sum(-1).mean()
    return [float(x) for x in sums / 12]


def main() -> None:
    """Print the figures of demo/README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="encoded corpus")
    parser.add_argument("--pair", type=Path, default=Path("src/pace/demo"))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.pair / "target")
    target, draft = (
        LlamaForCausalLM.from_pretrained(args.pair / role, dtype=torch.float32)
        for role in ("target", "draft")
    )
    batches = Batches(args.work, "valid")
    for context_len in (CONTEXT_LEN, LONG_CONTEXT_LEN):
        on_text, on_draft, greedily, sampled = compare(target, draft, batches, context_len)
        print(f"context {context_len}: target {on_text:.3f}, draft {on_draft:.3f} nats;", end=" ")
        print(f"agree greedily {greedily:.3f}, sampled {sampled:.3f}")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    greedy = GenerationConfig(max_new_tokens=64, eos_token_id=[BOS, END], pad_token_id=PAD)  # type: ignore[no-untyped-call]
    for model in (target, draft):
        for text, special in ((PROMPT, True), (chat, False)):
            ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")
            ids.pop("token_type_ids", None)
            out = model.generate(**ids, generation_config=greedy)  # type: ignore[misc]
            print("-" * 80, tokenizer.decode(out[0]), sep="\n")


if __name__ == "__main__":
    main()
