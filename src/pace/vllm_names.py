"""Names that callers of vLLM know and pace lacks: what each may be without meaning anything, and what to use instead.

pace takes over vLLM's names, so programs arrive with more of them than it has. One whose value asks for nothing that
pace does not do is taken; any other is refused by name, with the way to get the same thing here.
docs/coming-from-vllm.md has the whole list of differences.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

from pace.errors import ConfigError, PaceError, RequestError, show

__all__ = [
    "ENGINE_OPTIONS",
    "METHODS",
    "OUTPUT_FIELDS",
    "REQUEST_OPTIONS",
    "SAMPLING_FIELDS",
    "TOKENIZER_NAMES",
    "AnswersByName",
    "Foreign",
    "refuse_attribute",
    "takes_class",
    "takes_names",
]

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


class Foreign(NamedTuple):
    """An argument that pace does not have."""

    instead: str
    """What to do, as the end of a sentence."""
    neutral: tuple[object, ...] | None = (None,)
    """Values that ask for nothing; None: every value does."""


_PLAIN = (str, int, float, list, tuple, dict, type(None))

_ANY = None  # of Foreign.neutral
_NO = (None, False)

SAMPLING_FIELDS: dict[str, Foreign] = {
    "best_of": Foreign("use n, and choose by cumulative_logprob", (None, 1)),
    "use_beam_search": Foreign("pace has no beam search; use n", _NO),
    "length_penalty": Foreign("pace has no beam search", (None, 1.0)),
    "early_stopping": Foreign("pace has no beam search", _NO),
    "guided_decoding": Foreign("it is called structured_outputs"),
    "logits_processors": Foreign("use logit_bias, bad_words or allowed_token_ids", (None, [], ())),
    "thinking_token_budget": Foreign("use max_tokens, or stop at the string that ends the thoughts"),
    "repetition_detection": Foreign("use repetition_penalty, frequency_penalty or max_tokens"),
    "logprob_token_ids": Foreign("use logprobs=-1 with the engine's max_logprobs=-1, and pick them"),
    "prompt_logprob_token_ids": Foreign(
        "use prompt_logprobs=-1 with the engine's max_logprobs=-1, and pick them"
    ),
    "prompt_logprob_start": Foreign("prompt_logprobs has every position"),
    "flat_logprobs": Foreign("logprobs are a list of dictionaries", _NO),
    "truncate_prompt_tokens": Foreign("cut the prompt_token_ids"),
    "stream_interval": Foreign(
        "a reader that is slower than the engine gets several tokens in one output", (None, 1)
    ),
    "extra_args": Foreign("pace has no plug-ins", (None, {})),
    "watermarking": Foreign("pace has no watermark", _NO),
    "trace_decode_token_ids": Foreign("put the tokens into the prompt and ask for prompt_logprobs"),
    "routed_experts_prompt_start": Foreign("pace does not return routed experts", (None, 0)),
    "skip_reading_prefix_cache": Foreign("give the prompt a cache_salt of its own", _NO),
    "skip_clone": Foreign("instances never change", _ANY),
}
"""Of SamplingParams."""

REQUEST_OPTIONS: Mapping[str, Foreign] = {
    "lora_request": Foreign("merge the adapter into the weights"),
    "prompt_adapter_request": Foreign("merge the adapter into the weights"),
    "tokenization_kwargs": Foreign("encode the prompt yourself and give prompt_token_ids", (None, {})),
    "mm_processor_kwargs": Foreign("pace reads text only", (None, {})),
    "prompt_token_ids": Foreign("give the ids as the prompt itself"),
    "prompt_text": Foreign("the prompt is a mapping with prompt and prompt_token_ids"),
    "guided_options_request": Foreign("give structured_outputs to SamplingParams"),
    "chat_template_content_format": Foreign(
        "templates that loop over a message's content get lists of parts, others one text",
        (None, "auto", "string"),
    ),
    "trace_headers": Foreign("pace writes no traces", (None, {})),
    "data_parallel_rank": Foreign("an engine is one process", (None, 0)),
}
"""Of generate, chat and stream."""

_ONE = (None, 1)
_GPU = "pace runs on the CPU"
_ONE_PROCESS = "an engine is one process with all the cores it may use; start one engine per NUMA node"

ENGINE_OPTIONS: dict[str, Foreign] = {
    "tensor_parallel_size": Foreign(_ONE_PROCESS, _ONE),
    "pipeline_parallel_size": Foreign(_ONE_PROCESS, _ONE),
    "data_parallel_size": Foreign(_ONE_PROCESS, _ONE),
    "distributed_executor_backend": Foreign(_ONE_PROCESS, (None, "uni")),
    "enable_expert_parallel": Foreign(_ONE_PROCESS, _NO),
    "dtype": Foreign(
        "pace computes in bfloat16 with float32 sums, whatever the checkpoint holds",
        (None, "auto", "bfloat16", "bf16"),
    ),
    "gpu_memory_utilization": Foreign(
        "say how much with kv_cache_memory='4GiB', or take all with 'auto'", ()
    ),
    "kv_cache_memory_bytes": Foreign("it is called kv_cache_memory, and takes '4GiB', too"),
    "swap_space": Foreign("a preempted sequence is computed again, nothing is swapped", (None, 0)),
    "cpu_offload_gb": Foreign("everything is in the CPU's memory", _ANY),
    "enforce_eager": Foreign("there are no graphs", _ANY),
    "compilation_config": Foreign("there is nothing to compile", _ANY),
    "disable_custom_all_reduce": Foreign(_GPU, _ANY),
    "max_seq_len_to_capture": Foreign("there are no graphs", _ANY),
    "enable_chunked_prefill": Foreign("prompts are always read in chunks", (None, True)),
    "disable_log_stats": Foreign("ask llm.stats()", _ANY),
    "trust_remote_code": Foreign(
        "pace runs no code of a checkpoint; leave it out where the architecture is one that pace knows", _NO
    ),
    "hf_token": Foreign("set HF_TOKEN, which huggingface_hub reads"),
    "download_dir": Foreign("set HF_HOME, which huggingface_hub reads"),
    "load_format": Foreign("pace reads safetensors", (None, "auto", "safetensors")),
    "tokenizer_mode": Foreign("pace reads tokenizer.json", (None, "auto", "hf")),
    "tokenizer_revision": Foreign("give tokenizer the folder of the revision"),
    "hf_overrides": Foreign("change a copy of config.json", (None, {})),
    "override_generation_config": Foreign(
        "write a generation_config.json and name its folder as generation_config", (None, {})
    ),
    "served_model_name": Foreign("it is an option of pace serve", _ANY),
    "speculative_config": Foreign(
        "give the same mapping as speculative, which takes the methods pard, draft_model, suffix and hybrid"
    ),
    "enable_lora": Foreign("merge the adapter into the weights", _NO),
    "logits_processors": Foreign("use logit_bias, bad_words or allowed_token_ids", (None, [], ())),
    "structured_outputs_config": Foreign(
        "llguidance is the only backend, and there is nothing to set", (None, {})
    ),
    "limit_mm_per_prompt": Foreign("pace reads text only", (None, {})),
    "runner": Foreign("every model generates, and embed() pools", (None, "auto", "generate", "pooling")),
    "task": Foreign("every model generates, and embed() pools", (None, "auto", "generate", "embed")),
    "convert": Foreign("every model generates, and embed() pools", (None, "auto", "none", "embed")),
    "logprobs_mode": Foreign("logprobs are of the unmodified distribution", (None, "raw_logprobs")),
    "quantization_config": Foreign("name a scheme as quantization; docs/quantisation.md lists them"),
    "offload_group_size": Foreign("everything is in the CPU's memory", _ANY),
    "offload_num_in_group": Foreign("everything is in the CPU's memory", _ANY),
    "offload_prefetch_step": Foreign("everything is in the CPU's memory", _ANY),
    "offload_params": Foreign("everything is in the CPU's memory", _ANY),
    "attention_config": Foreign("force a kernel with kernels={'attention': 'avx2'}", (None, {})),
    "attention_backend": Foreign("force a kernel with kernels={'attention': 'avx2'}"),
    "profiler_config": Foreign("use pace bench latency --profile"),
    "pooler_config": Foreign("give pooling_params to embed()"),
    "mm_processor_kwargs": Foreign("pace reads text only", (None, {})),
    "allowed_local_media_path": Foreign("pace reads text only", (None, "")),
    "allowed_media_domains": Foreign("pace reads text only", (None, [])),
    "enable_prompt_embeds": Foreign("prompts are text or token ids", _NO),
    "enable_sleep_mode": Foreign("close() gives the memory back", _NO),
    "enable_return_routed_experts": Foreign("pace does not return routed experts", _NO),
    "return_sampling_mask": Foreign("use logprobs", _NO),
    "spec_method": Foreign("give it as method of speculative"),
    "spec_model": Foreign("give it as model of speculative"),
    "spec_tokens": Foreign("give it as num_speculative_tokens of speculative"),
    "max_num_queued_reqs": Foreign("it is called max_num_waiting, and counts sequences"),
    "max_num_partial_prefills": Foreign(
        "the token budget of a step, max_num_batched_tokens, is the only bound", _ONE
    ),
    "long_prefill_token_threshold": Foreign(
        "prompts are cut by themselves while somebody streams; see max_num_batched_tokens", (None, 0)
    ),
    "numa_bind": Foreign("name the CPUs with cpus='0-31'", _NO),
    "scheduling_policy": Foreign(
        "requests run by priority, then by arrival; leave priority out", (None, "fcfs", "priority")
    ),
    "async_scheduling": Foreign("an engine steps in its own thread", _ANY),
    "device": Foreign(_GPU, (None, "auto", "cpu")),
}
"""Of LLM and AsyncLLM."""

METHODS: Mapping[str, str] = {
    "from_engine_args": "give the options to the class itself",
    "from_vllm_config": "give the options to the class itself",
    "encode": "embed() makes vectors, get_tokenizer().encode(text) token ids",
    "classify": "pace has no classifiers",
    "reward": "pace has no classifiers",
    "score": "embed() makes vectors, prompt_logprobs scores texts",
    "beam_search": "pace has no beam search; use n and cumulative_logprob",
    "enqueue": "use stream(), or AsyncLLM",
    "enqueue_chat": "use stream_chat(), or AsyncLLM",
    "wait_for_completion": "use stream(), or AsyncLLM",
    "add_request": "use stream(), or AsyncLLM.generate()",
    "sleep": "close() gives the memory back",
    "wake_up": "make a new one",
    "reset_prefix_cache": "give the prompts a cache_salt of their own",
    "reset_mm_cache": "pace reads text only",
    "start_profile": "use pace bench latency --profile",
    "stop_profile": "use pace bench latency --profile",
    "collective_rpc": "there are no workers",
    "apply_model": "there is no torch module",
    "add_lora": "merge the adapter into the weights",
    "get_metrics": "use stats()",
    "get_world_size": "it is 1",
    "set_tokenizer": "give tokenizer to the class",
    "llm_engine": "use stats(), get_tokenizer() and config",
    "model_config": "use config and loaded.spec",
    "shutdown": "it is called close()",
    "check_health": "a dead engine raises EngineDeadError at the next call",
    "is_tracing_enabled": "pace writes no traces",
    "do_log_stats": "use stats()",
    "get_supported_tasks": "pace generates",
    "pause_generation": "requests run as long as somebody reads; abort() ends them",
    "resume_generation": "requests run as long as somebody reads; abort() ends them",
    "is_paused": "it never is",
    "is_running": "a dead engine raises EngineDeadError at the next call",
    "is_stopped": "a closed or dead engine raises at the next call",
    "errored": "a dead engine raises EngineDeadError at the next call",
    "dead_error": "a dead engine raises EngineDeadError at the next call, with the reason as its cause",
}
"""Of LLM and AsyncLLM."""

OUTPUT_FIELDS: Mapping[str, str] = {
    "arrival_time": "it is called arrival_s, in seconds of time.monotonic()",
    "first_scheduled_time": "it is called scheduled_s, in seconds of time.monotonic()",
    "scheduled_ts": "it is called scheduled_s",
    "queued_ts": "it is called arrival_s",
    "first_token_time": "it is called first_token_s, in seconds of time.monotonic()",
    "first_token_ts": "it is called first_token_s",
    "first_token_latency": "it is called time_to_first_token_s",
    "finished_time": "it is called finished_s, in seconds of time.monotonic()",
    "last_token_ts": "it is called finished_s",
    "time_in_queue": "it is scheduled_s - arrival_s",
    "num_generation_tokens": "it is called n_output_tokens",
    "lora_request": "pace has no adapters",
    "encoder_prompt": "pace has no encoders",
    "encoder_prompt_token_ids": "pace has no encoders",
    "prompt_token_id_logprobs": "use prompt_logprobs",
    "num_cache_creation_tokens": "len(prompt_token_ids) - num_cached_tokens were computed",
    "kv_transfer_params": "caches are not moved between engines",
    "routed_experts": "pace does not return routed experts",
    "sampling_mask": "use logprobs",
    "spec_decode_metrics": "read speculative",
}
"""Of RequestOutput, CompletionOutput and their metrics."""


TOKENIZER_NAMES: Mapping[str, str] = {
    "apply_chat_template": "use llm.chat(), which renders the checkpoint's template",
    "chat_template": "use llm.chat(), which renders the checkpoint's template",
    "batch_decode": "call decode() for each",
    "batch_encode_plus": "use encode_batch()",
    "encode_plus": "use encode()",
    "tokenize": "use encode(), and decode_token() for each id",
    "convert_tokens_to_ids": "use token_to_id()",
    "convert_ids_to_tokens": "use decode_token()",
    "convert_tokens_to_string": "use decode()",
    "eos_token": "use special_tokens['eos_token'], or eos_token_id",
    "bos_token": "use special_tokens['bos_token'], or bos_token_id",
    "pad_token": "nothing is padded",
    "pad_token_id": "nothing is padded",
    "all_special_ids": "use is_special()",
    "get_vocab": "use token_to_id() and decode_token()",
    "max_token_id": "use vocab_size",
    "name_or_path": "use directory",
    "model_max_length": "use max_model_len of the engine",
}
"""Of what get_tokenizer() returns, which is transformers' in vLLM."""


def takes_names(known: Mapping[str, Foreign], error: type[PaceError] = RequestError) -> Callable[[F], F]:
    """Let a function take the arguments of `known` that ask for nothing, and answer the others by name.

    Args:
        error: what the others raise.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for name in [name for name in options if name in known]:
                instead, neutral = known[name]
                value = options.pop(name)
                if neutral is not None and not _is_one_of(value, neutral):
                    raise error(f"{name} is {show(value)}, which pace does not have: {instead}")
            return function(*args, **options)

        return call  # type: ignore[return-value]  # a wrapper with the same signature

    return decorate


def _is_one_of(value: object, neutral: tuple[object, ...]) -> bool:
    if not isinstance(value, _PLAIN):
        value = str(value).removeprefix("torch.")  # a dtype, say
    return any(value == n and (value is not True or n is True) for n in neutral)  # True == 1 in Python


def takes_class(known: Mapping[str, Foreign], error: type[PaceError] = ConfigError) -> Callable[[C], C]:
    """`takes_names` for a class's constructor."""

    def decorate(cls: C) -> C:
        cls.__init__ = takes_names(known, error)(cls.__init__)  # type: ignore[misc]  # of a class that is known
        return cls

    return decorate


def refuse_attribute(owner: str, name: str, known: Mapping[str, str]) -> NoReturn:
    """Raise the AttributeError of a missing attribute, with what to use instead where vLLM has it."""
    instead = f", as vLLM's has: {known[name]}" if name in known else ""
    raise AttributeError(f"{owner!r} object has no attribute {name!r}{instead}", name=name)


class AnswersByName(ABCMeta):
    """The class of classes whose missing class methods are answered by name; they can still inherit from an ABC, too."""

    def __getattr__(cls, name: str) -> NoReturn:
        refuse_attribute(cls.__name__, name, METHODS)
