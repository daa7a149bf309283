"""pace, through its public Python API.

Install: pip install . (or a wheel) in an environment of its own; AMD PACE takes the same module name. PACE_OPTIONS has
more arguments of `LLM` as JSON, such as {"quantization": "int8-head"}.
"""

import json
import os

import common

from pace import LLM, SamplingParams

args = common.arguments()
llm = LLM(
    model=args.directory,
    max_model_len=common.MAX_MODEL_LEN,
    max_num_seqs=common.MAX_NUM_SEQS,
    skip_tokenizer_init=True,
    enable_prefix_caching=False,  # every prompt is asked for several times
    **json.loads(os.environ.get("PACE_OPTIONS", "{}")),
)


def generate(prompts: list[list[int]], n_new: int) -> None:
    params = SamplingParams(max_tokens=n_new, temperature=0, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


common.run(generate, args)
