"""vLLM for CPU in its own environment, eager. Arguments: directory. Set VLLM_CPU_KVCACHE_SPACE=4."""

import sys

from common import measure, report
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1],
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=32,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], n_new: int) -> None:
        params = SamplingParams(max_tokens=n_new, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    report(measure(generate))
