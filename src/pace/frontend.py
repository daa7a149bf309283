"""What `LLM` and `AsyncLLM` are built from: the options, the loaded model, its requests and its thread."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pace.config import EngineConfig, parse_cpus
from pace.driver import Driver
from pace.engine.loader import Loaded
from pace.inputs import Inputs
from pace.params import SamplingParams
from pace.speculative import load
from pace.speculative_config import SpeculativeConfig
from pace.text.tokenizer import Tokenizer
from pace.vllm_names import ENGINE_OPTIONS, METHODS, AnswersByName, refuse_attribute, takes_class

__all__ = ["Frontend"]

F = TypeVar("F", bound="Frontend")


@takes_class(ENGINE_OPTIONS)
class Frontend(metaclass=AnswersByName):
    """A model, ready to generate: the base of `LLM` and `AsyncLLM`."""

    _on_demand = False
    """Whether the engine runs only while somebody waits for it; see `Driver`."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        trust_tokenizer: bool = False,
        chat_template: str | os.PathLike[str] | None = None,
        skip_tokenizer_init: bool = False,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int = 2048,
        max_num_waiting: int = 65536,
        kv_cache_type: str = "slab",
        block_size: int | None = None,
        kv_cache_memory: int | str | None = None,
        kv_cache_dtype: str = "bf16",
        quantization: str | None = None,
        pack_cache: str | os.PathLike[str] | None = None,
        activation_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        generation_config: str | os.PathLike[str] = "auto",
        max_logprobs: int = 20,
        admission: str = "preempt",
        threads: int | None = None,
        cpus: Seq[int] | str | None = None,
        kernels: Mapping[str, str] | None = None,
        seed: int = 0,
        speculative: SpeculativeConfig | Mapping[str, Any] | None = None,
        show_progress: bool | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: a checkpoint folder, a hub id `org/name`, or "demo" for the embedded model.
            revision: branch, tag or commit of a hub id.
            tokenizer: folder or hub id to take the tokenizer from; None: the model's own.
            trust_tokenizer: skip the probe of a tokenizer with unusual patterns or components.
            chat_template: file of a Jinja template that takes the place of the checkpoint's.
            skip_tokenizer_init: load no tokenizer: prompts are token ids, outputs have no text.
            max_model_len: longest prompt and output together, in tokens; None: what the checkpoint supports, or
                less where the memory does not hold one such sequence.
            max_num_seqs: sequences that run in one step, and for which there is memory at full length; None: 64 run, or as
                many as a step has rows, and there is memory for 32 of full length.
            max_num_batched_tokens: tokens of one step; a longer prompt is read in several.
            max_num_waiting: sequences that may wait to run; more raise QueueFullError, but for those of `LLM.generate` and
                `LLM.chat`, which wait in memory anyway.
            kv_cache_type: "slab" (large blocks), "paged" (blocks of 16 tokens) or "contiguous" (one extent per
                sequence).
            block_size: tokens of a KV block, a power of two from 16 on; None: what suits the type.
            kv_cache_memory: bytes of the KV cache, also as "4GiB"; "auto": all that is left beside the weights;
                None: what max_num_seqs (or 32) sequences of max_model_len need, at most 40 % of the available memory.
            kv_cache_dtype: "bf16", or "int8" with a scale per token and head.
            quantization: round a bf16 checkpoint's matrices while it is loaded: "int8", "int4" or "fp8", or by bits and
                group "w8", "w8g128", "w4g64" and the like; "int8-head": the LM head alone, also of a quantised
                checkpoint that leaves it in 16 bits; see docs/quantisation.md.
            pack_cache: a folder that keeps the packed weights: written on first use, mapped from then on, which takes no
                time and shares memory between processes; see docs/packing.md. None: they are packed each time.
            activation_dtype: whether rows are rounded to int8 where they meet integer matrices: "int8", "bf16" (they are
                not), or "auto": where a matrix' outputs on a built-in text hardly change by it.
            enable_prefix_caching: keep computed prompts for later requests with the same beginning.
            generation_config: where sampling defaults come from, which apply field by field to what a request leaves
                unset: "auto": the checkpoint's generation_config.json; "vllm": nowhere, those of `SamplingParams` hold;
                else a folder with a generation_config.json.
            max_logprobs: most log probabilities that a request may ask for at each position; -1: the whole vocabulary.
            admission: "preempt": a request starts as soon as its prompt fits, and may be interrupted and
                recomputed; "reserve": it starts when its longest possible output fits.
            threads: of the engine; None: PACE_THREADS, else min(affinity, cgroup quota, physical cores).
            cpus: CPUs to pin them to, as numbers or "0-3,8"; None: PACE_CPUS, else not pinned.
            kernels: {operator: tier or "reference"} to force, for bisecting.
            seed: seeds the requests that give none.
            speculative: guess tokens and verify many in one step, such as {"method": "pard", "model": "demo-draft",
                "num_speculative_tokens": 8}; see `SpeculativeConfig`. It changes how fast outputs come, never the outputs.
            show_progress: a progress bar on stderr while loading; None: where that is a terminal.

        Raises:
            ConfigError, CheckpointError, CapacityError: the model can't be loaded as asked; nothing stays behind.
        """
        config = EngineConfig(
            model=os.fspath(model),
            revision=revision,
            tokenizer=None if tokenizer is None else os.fspath(tokenizer),
            trust_tokenizer=trust_tokenizer,
            chat_template=None if chat_template is None else os.fspath(chat_template),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_waiting=max_num_waiting,
            kv_cache_type=kv_cache_type,
            block_size=block_size,
            kv_cache_memory=kv_cache_memory,
            kv_cache_dtype=kv_cache_dtype,
            quantization=quantization,
            pack_cache=None if pack_cache is None else os.fspath(pack_cache),
            activation_dtype=activation_dtype,
            enable_prefix_caching=enable_prefix_caching,
            generation_config=(
                os.fspath(generation_config)
                if isinstance(generation_config, os.PathLike)
                else generation_config
            ),
            max_logprobs=max_logprobs,
            admission=admission,
            n_threads=threads,
            cpus=parse_cpus(cpus) if isinstance(cpus, str) else cpus,  # type: ignore[arg-type]  # the config checks
            kernels={} if kernels is None else kernels,
            seed=seed,
            speculative=SpeculativeConfig.read(speculative),
        )
        self._start(config, load(config, show_progress=show_progress, skip_tokenizer=skip_tokenizer_init))

    @classmethod
    def from_loaded(cls: type[F], config: EngineConfig, loaded: Loaded) -> F:
        """Wrap an engine that `engine.loader.load` has made."""
        self = cls.__new__(cls)
        self._start(config, loaded)
        return self

    def _start(self, config: EngineConfig, loaded: Loaded) -> None:
        self.config = config
        self.loaded = loaded
        self.engine = loaded.engine
        self._inputs = Inputs(loaded)
        self._ids = itertools.count()  # its next() is atomic
        try:
            self._driver = Driver(loaded.engine, loaded.close, on_demand=self._on_demand)
        except BaseException:
            loaded.close()
            raise
        # Also for those who forget to close: when the last reference goes, and before the interpreter ends.
        weakref.finalize(self, self._driver.close)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            RequestError: it was loaded without one.
        """
        return self._inputs.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without parameters runs with: the checkpoint's sampling defaults, and ours beside them."""
        return self._inputs.default_params

    def stats(self) -> dict[str, Any]:
        """Counters and gauges since the model was loaded; see `Engine.stats`."""
        return self.engine.stats()

    def close(self) -> None:
        """End the engine's threads and give back its memory, weights and KV cache; requests in flight end with an error.

        Calling it again does nothing.
        """
        self._driver.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"this {type(self).__name__} can't be pickled or copied: its threads and memory belong to this process; build "
            "one where it is needed"
        )

    if not TYPE_CHECKING:  # for a type checker every attribute would exist

        def __getattr__(self, name: str) -> NoReturn:
            refuse_attribute(type(self).__name__, name, METHODS)
