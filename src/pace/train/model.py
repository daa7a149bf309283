"""The torch side of a pass: models, padded batches of rows, and who sees whom."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pace.checkpoint import resolve
from pace.errors import ConfigError, show
from pace.train.cod import Packed, Rows

__all__ = ["Batch", "batch_of", "hidden_states", "load_model", "mask_token_of", "visible"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose logits are the head's product with the last hidden state, without scale or cap."""


@dataclass(frozen=True)
class Batch:
    """Sequences padded to one length; i64[B, T] each, on the model's device. See `Rows`; padding has document -1."""

    ids: Tensor
    positions: Tensor
    documents: Tensor
    depths: Tensor
    anchors: Tensor
    labels: Tensor

    def places(self) -> tuple[Tensor, Tensor]:
        """Sequence and row i64[R] of every guess, those after the same token of a sequence together."""
        at = torch.nonzero(self.labels >= 0)
        sources = self.anchors[at[:, 0], at[:, 1]] + self.depths[at[:, 0], at[:, 1]]
        order = torch.argsort(at[:, 0] * self.ids.shape[1] + sources, stable=True)
        return at[order, 0], at[order, 1]


def batch_of(sequences: Sequence[Rows], device: torch.device) -> Batch:
    """Pad and move; a padded row sees padded rows only, since one that sees nothing is NaN."""
    size = max(len(rows.ids) for rows in sequences)
    fill = {"ids": 0, "positions": 0, "documents": -1, "depths": 0, "labels": -1}
    arrays = {name: np.full((len(sequences), size), value) for name, value in fill.items()}
    arrays["anchors"] = np.tile(np.arange(size), (len(sequences), 1))
    for i, rows in enumerate(sequences):
        for name, array in arrays.items():
            array[i, : len(rows.ids)] = getattr(rows, name)
    return Batch(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def tokens_of(sequences: Sequence[Packed]) -> list[Rows]:
    """Sequences without a mask or a guess: what the target reads."""
    nothing = [np.full_like(packed.ids, -1) for packed in sequences]
    return [
        Rows(p.ids, p.positions, p.documents, np.zeros_like(p.ids), np.arange(len(p.ids)), none, len(p.ids))
        for p, none in zip(sequences, nothing, strict=True)
    ]


def visible(batch: Batch) -> Tensor:
    """bool[B, 1, T, T]: row q sees tokens of its document up to its anchor, and its anchor's masks up to its own depth.

    A row has L + K keys at most, of T = 3.4 L rows. Gathering them, with the gradient by hand, took 0.40 + 0.37 s where
    torch's fused attention over T x T takes 0.22 + 0.37 (one core, 4 x 512 tokens, width 256, 2 layers): it reads
    the scores once, and the products saved are not what costs.
    """
    at = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    anchors, depths, documents = (
        batch.anchors[:, :, None],
        batch.depths[:, :, None],
        batch.documents[:, :, None],
    )
    key_depths = batch.depths[:, None, :]
    tokens = (key_depths == 0) & (at <= anchors)
    chain = (key_depths > 0) & (key_depths <= depths) & (batch.anchors[:, None, :] == anchors)
    return ((documents == batch.documents[:, None, :]) & (tokens | chain))[:, None]


def arithmetic(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Products in bf16 over f32 weights, or all in f32."""
    context: AbstractContextManager[Any] = torch.autocast(
        device.type, torch.bfloat16, enabled=dtype == "bf16"
    )
    return context


def hidden_states(model: Any, batch: Batch, dtype: str) -> Tensor:
    """The states f32[B, T, dim] that the head reads."""
    with arithmetic(batch.ids.device, dtype):
        states: Tensor = model.base_model(
            input_ids=batch.ids,
            attention_mask=visible(batch),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
    return states.float()


def load_model(
    name: str, layers: Sequence[int] | None = None, intermediate_size: int | None = None
) -> tuple[Any, Path]:
    """A causal model in f32 on the CPU, and its folder.

    Args:
        name: a folder, a hub id, or "demo".
        layers: take these of its layers, in this order; None: all.
        intermediate_size: keep so many channels of each MLP; None: all.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: its family can't be adapted, it has no such layer, or fewer channels.
    """
    directory = resolve(name)
    config = AutoConfig.from_pretrained(directory)
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{directory}: model_type is {show(config.model_type)}, expected one of {', '.join(FAMILIES)}"
        )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    if layers is not None or intermediate_size is not None:
        chosen = range(config.num_hidden_layers) if layers is None else layers
        model = _pruned(model, chosen, intermediate_size or config.intermediate_size, directory)
    return model, directory


def _pruned(model: Any, layers: Sequence[int], intermediate_size: int, directory: Path) -> Any:
    """A copy of `model` that has these layers, and so many channels of each MLP."""
    values = model.config.to_dict()
    n_layers, n_channels = values["num_hidden_layers"], values["intermediate_size"]
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ConfigError(
                f"models.layers has {layer}, but {directory} has the layers 0 to {n_layers - 1}"
            )
    if not layers:
        raise ConfigError("models.layers is empty, expected layer numbers")
    if not 1 <= intermediate_size <= n_channels:
        raise ConfigError(
            f"models.intermediate_size is {intermediate_size}, but the MLPs of {directory} have {n_channels} channels"
        )
    values |= {"num_hidden_layers": len(layers), "intermediate_size": intermediate_size}
    if values.get("layer_types") is not None:
        values["layer_types"] = [values["layer_types"][layer] for layer in layers]
    config = type(model.config).from_dict(values)
    smaller = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    whole = model.state_dict()
    state = {name: tensor for name, tensor in whole.items() if ".layers." not in name}
    for new, old in enumerate(layers):
        prefix = f"model.layers.{old}."
        mlp = {part: whole[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")}
        sizes = mlp["gate"].norm(dim=1) * mlp["up"].norm(dim=1) * mlp["down"].norm(dim=0)
        kept = sizes.topk(intermediate_size).indices.sort().values
        for name in (name for name in whole if name.startswith(prefix)):
            tensor = whole[name]
            if ".mlp." in name:
                tensor = tensor.index_select(1 if "down_proj" in name else 0, kept)
            state[f"model.layers.{new}.{name.removeprefix(prefix)}"] = tensor.clone()
    smaller.load_state_dict(state)
    return smaller


def mask_token_of(directory: Path, given: int | None, vocab_size: int) -> int:
    """The mask token: what the recipe says, else the draft's own `pard_token`.

    Raises:
        ConfigError: neither says one, or it has no row in the embedding.
    """
    own = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("pard_token")
    mask_id = own if given is None else given
    if type(mask_id) is not int:
        raise ConfigError(
            f"{directory}: config.json has no pard_token; name an unused token as models.mask_token_id"
        )
    if not 0 <= mask_id < vocab_size:
        raise ConfigError(
            f"models.mask_token_id is {mask_id}, but the draft's embedding has {vocab_size} rows"
        )
    return mask_id
