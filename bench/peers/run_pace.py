"""pace, through its public Python API. Arguments: checkpoint directory."""

import sys

from common import measure, report

from pace import LLM, SamplingParams

llm = LLM(model=sys.argv[1], max_model_len=2048, skip_tokenizer_init=True)


def generate(prompts: list[list[int]], n_new: int) -> None:
    params = SamplingParams(max_tokens=n_new, temperature=0, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


report(measure(generate))
