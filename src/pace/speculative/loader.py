"""From `EngineConfig.speculative` to what guesses: the draft's files, weights, KV cache and compiled plan."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from pace import ops
from pace.checkpoint import model_files, resolve
from pace.config import EngineConfig
from pace.engine.build import make_cache, shares_prefixes
from pace.engine.kv_memory import plan_groups
from pace.engine.loader import read_config, with_activations
from pace.engine.memory import packed_bytes, slot_bytes
from pace.engine.packing import PackedSink
from pace.engine.sampler import NO_IDS
from pace.engine.speculation import Speculation, Target
from pace.engine.weight_source import WeightSource, open_weights
from pace.errors import CheckpointError, ConfigError, show
from pace.log import logger
from pace.models.formats import SCHEMES, with_formats
from pace.models.plan import I32Array, Plan
from pace.models.registry import parse_config
from pace.models.spec import DecoderSpec, LayerSpec
from pace.speculative.controller import Controller
from pace.speculative.cost import StepCost
from pace.speculative.draft_model import ModelDrafter
from pace.speculative.drafter import Drafter
from pace.speculative.features import Features, with_features
from pace.speculative.hybrid import HybridDrafter
from pace.speculative.pard import PardDrafter
from pace.speculative.pard2 import Pard2
from pace.speculative.reader import DraftReader
from pace.speculative.speculator import Speculator
from pace.speculative.suffix import SuffixDrafter
from pace.speculative.trim import read_ids, trim, trimmed
from pace.speculative.verifier import Match, SyntheticMatch
from pace.speculative.vocabulary import check_same_tokens
from pace.speculative_config import SpeculativeConfig

__all__ = ["DraftMaker", "Maker", "make_maker"]

MAX_DRAFT_ROWS = 256
"""Drafted tokens that one step verifies at most: logits of 128k columns for so many rows are 134 MB."""

MASK_KEYS = ("pard_token", "ptd_token_id", "mask_token_id")
"""Where a draft's config.json has its mask token, as PARD, P-EAGLE and vLLM write it."""


def make_maker(
    config: EngineConfig, speculative: SpeculativeConfig, random_weights: bool = False, **_: Any
) -> Maker:
    """What makes the drafter of a method.

    Raises:
        CheckpointError, ConfigError: the draft can't be used, whatever the target.
    """
    if speculative.method == "suffix":
        return SuffixMaker(config, speculative)
    maker = HybridMaker if speculative.method == "hybrid" else DraftMaker
    return maker(config, speculative, random_weights=random_weights)


class Maker:
    """A `SpeculationMaker`; what differs between methods is the drafter.

    Args:
        config: of the engine.
        speculative: of it.
    """

    n_bytes = 0
    kv_width = 0

    def __init__(self, config: EngineConfig, speculative: SpeculativeConfig) -> None:
        self.config = config
        self.speculative = speculative
        self.max_tokens = speculative.num_speculative_tokens
        self.max_draft_rows = max(self.max_tokens, min(config.n_places * self.max_tokens, MAX_DRAFT_ROWS))

    def taps(self, spec: DecoderSpec) -> tuple[int, ...]:
        """Depths of the target at which the drafter wants its hidden states: none."""
        return ()

    def drafter(self, target: Target, cost: StepCost | None) -> Drafter:
        """Load what guesses for this target.

        Args:
            cost: of the target's steps, for what decides whether guesses pay; None: nothing does.
        """
        raise ConfigError(f"speculative: method {self.speculative.method} has no drafter")

    def make(self, target: Target) -> Speculation:
        """The drafter with what surrounds it."""
        rates = self.speculative.synthetic_acceptance
        match = Match() if rates is None else SyntheticMatch(rates)
        if match.is_synthetic:
            logger.warning(
                "synthetic acceptance: guesses are accepted by chance, and the output is meaningless"
            )
        cost = StepCost() if self.speculative.adaptive else None
        drafter = self.drafter(target, cost)
        controller = None if cost is None else Controller(self.max_tokens, cost, drafter.passes)
        return Speculator(drafter, target.vocab_size, self.max_draft_rows, match, controller)


class SuffixMaker(Maker):
    """Makes the drafter that needs no model."""

    def drafter(self, target: Target, cost: StepCost | None) -> Drafter:
        """It is empty at first."""
        return _suffix(self.speculative)


def _suffix(speculative: SpeculativeConfig) -> SuffixDrafter:
    return SuffixDrafter(speculative.num_speculative_tokens, past_tokens=speculative.past_output_tokens)


class DraftMaker(Maker):
    """Makes the drafters that have a model.

    Args:
        config: of the engine.
        speculative: of it; it names a model.
        random_weights: invent the draft's weights; for benchmarks.

    Raises:
        CheckpointError, ConfigError: the draft can't be used, whatever the target.
    """

    def __init__(
        self, config: EngineConfig, speculative: SpeculativeConfig, *, random_weights: bool = False
    ) -> None:
        super().__init__(config, speculative)
        self._random_weights = random_weights
        self.directory = resolve(speculative.model or "", speculative.revision)
        self.files = model_files(self.directory)
        self.values = read_config(self.files)
        path = self.files.where("config.json")
        spec, self.weight_map = parse_config(self.values, path)
        if speculative.max_model_len is not None and speculative.max_model_len > spec.max_len:
            raise ConfigError(
                f"speculative: max_model_len is {speculative.max_model_len}, the draft {self.directory} supports "
                f"{spec.max_len} tokens; lower it"
            )
        one_pass = speculative.method == "pard" or (speculative.method == "hybrid" and _has_mask(self.values))
        self.mask_id = _mask_id(self.values, path, spec.vocab_size) if one_pass else None
        self._pard2 = Pard2.read(self.values, self.directory) if one_pass else None
        self._depths: tuple[int, ...] = ()  # of the target's taps
        if speculative.draft_window is not None:
            spec = _windowed(spec, speculative.draft_window)
        self.spec = spec
        self.n_logit_rows = config.n_places if self.mask_id is None else self.max_draft_rows
        self._quantization = self._chosen_quantization()
        with self._open(self._quantization) as source:
            self.spec = source.spec
            plan = source.lower(1)
        if config.activation_dtype != "bf16":
            plan = with_formats(plan, {}, "int8")
        self.n_bytes = packed_bytes(plan) + slot_bytes(plan, config.max_num_batched_tokens, self.n_logit_rows)
        self.kv_width = plan.kv_width

    def _open(self, quantization: str | None) -> AbstractContextManager[WeightSource]:
        return open_weights(
            self.config,
            self.files,
            self.values,
            self.spec,
            self.weight_map,
            quantization=quantization,
            random_weights=self._random_weights,
        )

    def _chosen_quantization(self) -> str | None:
        """What is made of the draft's matrices: what is asked for, else what the target gets, but nothing where its file
        is quantised.
        """
        asked = self.speculative.quantization
        with self._open(None) as source:
            is_plain = not source.formats
        if is_plain:
            return None if asked == "bf16" else asked or self.config.quantization
        if asked is not None and (asked == "bf16" or SCHEMES[asked].matrices is not None):
            raise ConfigError(
                f"speculative: quantization is {asked}, but the draft {self.directory} is quantised already; "
                "leave the option out"
            )
        return asked

    def taps(self, spec: DecoderSpec) -> tuple[int, ...]:
        """Depths of the target at which the draft wants its hidden states."""
        if self._pard2 is not None:
            self._depths = self._pard2.depths(spec)
        return self._depths

    def drafter(self, target: Target, cost: StepCost | None) -> Drafter:
        """Load the draft."""
        reader = self.reader(target)
        if self.mask_id is not None:
            return PardDrafter(reader, self.mask_id, self.max_tokens)
        return ModelDrafter(reader, self.max_tokens)

    def reader(self, target: Target) -> DraftReader:
        """The draft, ready to run beside the target.

        Raises:
            CheckpointError, ConfigError: it does not fit the target.
        """
        config, memory = self.config, target.memory
        check_same_tokens(
            target.tokenizer,
            self.files,
            min(self.spec.vocab_size, target.vocab_size),
            trusted=config.trust_tokenizer,
        )
        max_len = min(
            self.speculative.max_model_len or self.spec.max_len,
            memory.max_model_len + self.max_tokens,  # masks lie behind the last token
        )
        never = self._never(target)
        ids = None
        if self.speculative.draft_vocab is not None:
            ids = read_ids(self.speculative.draft_vocab, self.spec.vocab_size, never)
        plan, sink = self._load(target, max_len, ids)
        kv = plan_groups(
            plan,
            max_len,
            config.max_num_batched_tokens,
            config.kv_cache_type,
            config.kv_cache_dtype,
            config.block_size,
            int(ops.cpu_info()["l2_bytes"]),
        )
        n_seqs = memory.kv_bytes / memory.kv.bytes_for(memory.max_model_len)  # of full length
        kv = kv.divided(int(n_seqs * kv.bytes_for(max_len)), max_len, config.n_full_seqs)
        pools, tables = make_cache(config, kv, max_len)
        executor = ops.Plan(
            target.team,
            plan,
            sink.weights,
            pools,
            config.max_num_batched_tokens,
            config.n_places,
            self.n_logit_rows,
            config.kernels,
        )
        logger.info(
            "draft %s: %d MiB of weights, up to %d tokens", self.directory, sink.n_bytes >> 20, max_len
        )
        return DraftReader(
            executor,
            tables,
            ops.SAMPLE_DTYPE,
            vocab_size=plan.vocab_size,
            max_tokens=config.max_num_batched_tokens,
            max_seqs=config.n_places,
            max_logit_rows=self.n_logit_rows,
            max_len=max_len,
            features=Features(self._depths) if self._depths else None,
            ids=ids,
            never=never if ids is None else NO_IDS,
            prefix_caching=shares_prefixes(config),
        )

    def _load(self, target: Target, max_len: int, ids: I32Array | None) -> tuple[Plan, PackedSink]:
        """The draft's plan, with logits for `ids` only where they are given, and its weights."""
        with self._open(self._quantization) as source:
            plan = source.lower(max_len)
            sink = PackedSink(target.team)
            source.fill(plan, sink, target.show_progress)
            plan = with_activations(self.config, plan, sink, target.tokenizer, source)
        if ids is not None:
            trim(sink, plan, ids)
        if self._pard2 is not None and self._depths:
            self._pard2.load(sink, self.spec.dim)
            plan = with_features(plan, self._pard2.width, self._pard2.scale, self._pard2.bias)
        return (plan if ids is None else trimmed(plan, len(ids))), sink

    def _never(self, target: Target) -> I32Array:
        """Tokens that are never guessed, i32 [n]: the mask, and ids that the target has no token for."""
        never = set() if self.mask_id is None else {self.mask_id}
        if target.tokenizer is not None:
            never |= {token for token in target.tokenizer.unused_ids.tolist() if token < self.spec.vocab_size}
        return np.array(sorted(never), np.int32)


class HybridMaker(DraftMaker):
    """Makes the drafter of both: its model guesses in one pass where it was trained to, else token by token."""

    def drafter(self, target: Target, cost: StepCost | None) -> Drafter:
        """Load the draft."""
        model = super().drafter(target, cost)
        gate = None if cost is None else Controller(self.max_tokens, cost, model.passes)
        return HybridDrafter(model, _suffix(self.speculative), gate)


def _has_mask(values: dict[str, Any]) -> bool:
    nested = values.get("dflash_config")
    nested_id = nested.get("mask_token_id") if isinstance(nested, dict) else None
    return nested_id is not None or any(values.get(key) is not None for key in MASK_KEYS)


def _mask_id(values: dict[str, Any], path: str, vocab_size: int) -> int:
    """The mask token that a PARD draft was trained with.

    Raises:
        CheckpointError: its config names none, or one that its embedding has no row for.
    """
    nested = values.get("dflash_config")
    found = {key: values[key] for key in MASK_KEYS if values.get(key) is not None}
    if isinstance(nested, dict) and nested.get("mask_token_id") is not None:
        found["dflash_config.mask_token_id"] = nested["mask_token_id"]
    if not found:
        raise CheckpointError(
            f"{path}: no pard_token, so this model was not trained to guess many tokens at once; use method "
            "draft_model, or a PARD draft"
        )
    key, mask_id = next(iter(found.items()))
    if not isinstance(mask_id, int) or isinstance(mask_id, bool) or not 0 <= mask_id < vocab_size:
        raise CheckpointError(f"{path}: {key} is {show(mask_id)}, expected a token id below {vocab_size}")
    return mask_id


def _windowed(spec: DecoderSpec, window: int) -> DecoderSpec:
    """The same decoder whose queries see at most `window` tokens; positions stay what they are."""

    def narrow(layer: LayerSpec) -> LayerSpec:
        mixer = layer.mixer
        return replace(layer, mixer=replace(mixer, window=min(window, mixer.window or window)))

    return replace(spec, layers=tuple(narrow(layer) for layer in spec.layers))
