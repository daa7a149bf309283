"""AMD PACE 1.3.0, configured at its best: SLAB_POOL, JIT norms, every linear and the LM head TPP.

Its offline API takes one static batch: all prompts of a case go through one call. As its LM head runs on every row of
a prompt, a batch of 32 x 1920 tokens would need 16 GB for logits alone, so that larger ones are cut into calls of at
most MAX_ROWS rows, each run to its end.

It needs AVX-512 with BF16: elsewhere its RoPE ends in an illegal instruction, whatever is configured (serve.py says what
runs without).

Install: pip install torch==2.13.0, then pip install amd-pace==1.3.0, in an environment of its own (it is called
`pace` too).
"""

import importlib
from typing import Any

import common
import torch

amd: Any = importlib.import_module("pace.llm")  # theirs: mypy would read ours
attention: Any = importlib.import_module("pace.llm.attention.base")

MAX_ROWS = 16384  # 4 GB of logits at a vocabulary of 128k

args = common.arguments()
tpp = amd.LLMBackendType.TPP
op = amd.LLMOperatorType
config = amd.OperatorConfig(
    **{
        op.Norm.value: amd.LLMBackendType.JIT,
        op.QKVProjection.value: tpp,
        op.Attention.value: attention.AttentionBackendType.SLAB,
        op.OutProjection.value: tpp,
        op.MLP.value: tpp,
        op.LMHead.value: tpp,
    }
)
model = amd.LLMModel(
    args.directory,
    dtype=torch.bfloat16,
    kv_cache_type=amd.KVCacheType.SLAB_POOL,
    opconfig=config,
    disable_tqdm=True,
)


def generate(prompts: list[list[int]], n_new: int) -> None:
    params = amd.SamplingConfig(
        max_new_tokens=n_new, min_new_tokens=n_new, ignore_eos=True, do_sample=False, pad_token_id=0
    )
    n = max(1, MAX_ROWS // len(prompts[0]))
    for i in range(0, len(prompts), n):
        model.generate(torch.tensor(prompts[i : i + n]), params)


common.run(generate, args)
