"""The files of a PARD-2 draft: how it takes in the target's hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pace.checkpoint import Checkpoint
from pace.engine.packing import PackedSink
from pace.errors import CheckpointError, show
from pace.log import logger
from pace.models.plan import WeightShape
from pace.models.spec import DecoderSpec
from pace.models.weights import SourcePart
from pace.speculative.features import PROJECTION

__all__ = ["Pard2"]

FOLDER = "target_proj"
"""In the draft's folder: model.safetensors with the tensor target_proj.weight, and target_proj.bias where there is one."""


@dataclass(frozen=True)
class Pard2:
    """What config.json says.

    Attributes:
        directory: the draft's folder.
        layers: of transformers' `hidden_states` of the target, in the order of the projection's columns.
        width: columns of the projection: all these states side by side.
        scale: of the projection.
        bias: whether it has one.
    """

    directory: Path
    layers: tuple[int, ...]
    width: int
    scale: float
    bias: bool

    @classmethod
    def read(cls, values: dict[str, Any], directory: Path) -> Pard2 | None:
        """From a draft's config.json; None where it is no PARD-2 draft.

        Raises:
            CheckpointError: a value is none, or the projection is missing.
        """
        if values.get("pard2") is not True and values.get("spd_type") != "pard2":
            return None
        where = directory / "config.json"
        layers = values.get("pard2_target_layers", [-1, -8, -16, -24])
        width, scale = values.get("pard2_target_dim"), values.get("pard2_scale", 0.02)
        if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
            raise CheckpointError(
                f"{where}: pard2_target_layers is {show(layers)}, expected a list of integers"
            )
        if type(width) is not int or width < 1 or width % len(layers):
            raise CheckpointError(
                f"{where}: pard2_target_dim is {show(width)}, expected a multiple of the {len(layers)} layers"
            )
        if type(scale) not in (int, float) or not 0 <= scale < 1e6:
            raise CheckpointError(f"{where}: pard2_scale is {show(scale)}, expected a number from 0 on")
        if not (directory / FOLDER).is_dir():
            pickled = (directory / "warp_model.bin").exists()
            reason = (
                "warp_model.bin is a pickle, which may run anything and is never read"
                if pickled
                else "it is missing"
            )
            raise CheckpointError(
                f"{directory}: a PARD-2 draft needs its projection as {FOLDER}/model.safetensors, but {reason}; "
                "docs/speculative.md says how to make it"
            )
        return cls(
            directory, tuple(layers), width, float(scale), values.get("pard2_proj_bias", False) is True
        )

    def depths(self, spec: DecoderSpec) -> tuple[int, ...]:
        """The taps of a target, as `models.decoder.lower` takes them; none where the draft was not trained with it.

        Without the states the draft works for any target of its tokens, only worse.
        """
        n = len(spec.layers)
        depths = tuple(layer if layer >= 0 else layer + n + 1 for layer in self.layers)
        fits = len(set(depths)) == len(depths) and all(0 <= depth <= n for depth in depths)
        if not fits or self.width != len(depths) * spec.dim:
            logger.info(
                "the draft %s was trained with %d columns of hidden states, this target has %d times %d: it drafts without",
                self.directory,
                self.width,
                len(depths),
                spec.dim,
            )
            return ()
        return depths

    def load(self, sink: PackedSink, dim: int) -> None:
        """Pack the projection [dim, width].

        Raises:
            CheckpointError: it is malformed, or has another shape.
        """
        with Checkpoint(self.directory / FOLDER) as checkpoint:
            names = set(checkpoint.names())
            expected = {f"{PROJECTION}.weight"} | ({f"{PROJECTION}.bias"} if self.bias else set())
            if names != expected:
                raise CheckpointError(
                    f"{self.directory / FOLDER}: tensors {show(sorted(names))}, expected {', '.join(sorted(expected))}"
                )
            for name in sorted(expected):
                shape, want = (
                    checkpoint.info(name).shape,
                    (dim, self.width)[: 2 if name.endswith("weight") else 1],
                )
                if tuple(shape) != want:
                    raise CheckpointError(
                        f"{self.directory / FOLDER}: {name} is {list(shape)}, expected {list(want)}"
                    )
            weight = checkpoint.tensor(f"{PROJECTION}.weight")
            dtype: Any = checkpoint.info(f"{PROJECTION}.weight").dtype.lower()
            sink.matrix(
                PROJECTION, WeightShape(dim, self.width), iter([SourcePart(weight, dtype, 0, "rows")])
            )
            if self.bias:
                values = checkpoint.tensor(f"{PROJECTION}.bias")
                if values.dtype == np.uint16:
                    values = (values.astype(np.uint32) << 16).view(np.float32)
                sink.vector(f"{PROJECTION}.bias", values.astype(np.float32))
