"""AMD PACE 1.3.0 in its own environment (it is called `pace` too), configured at its best. Arguments: directory."""

import sys

import torch
from common import measure, report
from pace.llm.attention.base import AttentionBackendType

from pace.llm import KVCacheType, LLMBackendType, LLMModel, LLMOperatorType, OperatorConfig, SamplingConfig

tpp = LLMBackendType.TPP
op = LLMOperatorType
config = OperatorConfig(
    **{
        op.Norm.value: LLMBackendType.JIT,
        op.QKVProjection.value: tpp,
        op.Attention.value: AttentionBackendType.SLAB,
        op.OutProjection.value: tpp,
        op.MLP.value: tpp,
        op.LMHead.value: tpp,
    }
)
model = LLMModel(
    sys.argv[1], dtype=torch.bfloat16, kv_cache_type=KVCacheType.SLAB_POOL, opconfig=config, disable_tqdm=True
)


def generate(prompts: list[list[int]], n_new: int) -> None:
    params = SamplingConfig(
        max_new_tokens=n_new, min_new_tokens=n_new, ignore_eos=True, do_sample=False, pad_token_id=0
    )
    model.generate(torch.tensor(prompts), params)


report(measure(generate))
