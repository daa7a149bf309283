"""OpenVINO GenAI over a model that optimum-intel converted, with continuous batching, its default pipeline on a CPU.

Install: pip install openvino-genai, in an environment of its own. Convert in another one (pip install torch==2.13.0,
then optimum-intel nncf openvino-tokenizers):

    optimum-cli export openvino -m DIRECTORY --task text-generation-with-past --weight-format int8 OUT

(int4: `--weight-format int4 --sym --group-size 128 --ratio 1`; 16 bits: `fp16`). OPENVINO_MODEL names OUT; prompts are
ids, so any tokenizer converted into that folder does.
"""

from __future__ import annotations

import os

import common
import numpy as np
import openvino as ov
import openvino_genai as genai

if __name__ == "__main__":
    args = common.arguments()
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = common.MAX_NUM_SEQS
    scheduler.max_num_batched_tokens = common.MAX_MODEL_LEN
    scheduler.cache_size = 4  # GB, as vLLM has
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(
        os.environ.get("OPENVINO_MODEL", args.directory),
        scheduler,
        "CPU",
        {"INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))},
    )

    def generate(prompts: list[list[int]], n_new: int) -> None:
        config = genai.GenerationConfig(max_new_tokens=n_new, do_sample=False, ignore_eos=True)
        ids = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        pipeline.generate(ids, [config] * len(ids))

    common.run(generate, args)
