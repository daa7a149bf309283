"""Where the weights of a plan stand in a checkpoint: which tensors make each up, in every layout that files have."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor within a plan weight.

    Args:
        name: checkpoint name; {i} stands for the layer, {h} for each head in turn where every head has a tensor, {e} for
            each expert where every expert has one.
        rows: which rows of a fused weight it holds, in its own order: "q", "q|k|v", "gate|up" ...
        spare: the file may have it for layers that do without.
        stacked: it holds all experts, along its first axis.
        transposed: of each matrix, columns come first; where its shape says otherwise, the shape counts.
        interleaved: of "gate|up", the rows take turns.
        scales: the tensor with the scales of its MXFP4 blocks.
    """

    name: str
    rows: str = "all"
    spare: bool = False
    stacked: bool = False
    transposed: bool = False
    interleaved: bool = False
    scales: str | None = None

    def names(self) -> Iterator[str]:
        """Of the tensors that it is."""
        yield self.name
        if self.scales is not None:
            yield self.scales

    def put(self, **values: int) -> Part:
        """With a number for {i}, {h} or {e}."""
        pairs = [(f"{{{key}}}", str(value)) for key, value in values.items()]
        name, scales = self.name, self.scales
        for key, value in pairs:
            name = name.replace(key, value)
            scales = scales and scales.replace(key, value)
        return replace(self, name=name, scales=scales)


Parts = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class OneOf:
    """Layouts of one weight: a file has one of them, each layer its own."""

    layouts: tuple[Parts, ...]


WeightMap = Mapping[str, Parts | OneOf]
"""Plan weight name -> its parts; {i} stands for the layer in both."""

_EXPERT: Final = re.compile(r"(?<=\.experts\.)\d+(?=\.)", re.ASCII)


def any_expert(name: str) -> str:
    """A tensor's name with {e} in place of its expert."""
    return _EXPERT.sub("{e}", name)


class TensorNames(Container[str]):
    """The names that a map has in any layout, whatever the expert."""

    def __init__(self, table: Mapping[str, OneOf]) -> None:
        self._names = {
            name
            for layouts in table.values()
            for parts in layouts.layouts
            for part in parts
            for name in part.names()
        }

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any_expert(name) in self._names


def expand(weight_map: WeightMap, n_layers: int) -> dict[str, OneOf]:
    """The map with {i} replaced by every layer."""
    table: dict[str, OneOf] = {}
    for name, parts in weight_map.items():
        layouts = parts.layouts if isinstance(parts, OneOf) else (parts,)
        for i in range(n_layers) if "{i}" in name else (0,):
            own = tuple(tuple(part.put(i=i) for part in layout) for layout in layouts)
            table[name.replace("{i}", str(i))] = OneOf(own)
    return table


def choose(layouts: OneOf, present: Collection[str]) -> Parts:
    """The layout of which most tensors are there, the first of several; what is there of others is then unexpected.

    Args:
        present: names, those of experts with {e}.
    """
    return max(
        layouts.layouts, key=lambda parts: sum(name in present for part in parts for name in part.names())
    )


def expert_weights(
    *at: str,
    own: str = "{e}.gate_proj",
    fused: tuple[str, str] | None = None,
    transposed: bool = False,
    interleaved: bool = False,
    bias: bool = False,
) -> WeightMap:
    """The experts of each layer in every layout: a tensor for each, all in one, and MXFP4.

    Args:
        at: what stands before `.0.gate_proj.weight` or `.gate_up_proj`.
        own: the layout that the family's files have, of those below.
        fused: names of the two tensors of all experts, where they are others.
        transposed, interleaved: of tensors of all experts, see `Part`.
        bias: whether they have biases.
    """
    layouts: dict[str, list[tuple[Parts, Parts]]] = {}
    for place in at:
        each = f"{place}.{{e}}"
        for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
            layouts.setdefault(f"{{e}}.{gate}", []).append(
                (
                    (Part(f"{each}.{gate}.weight", "gate"), Part(f"{each}.{up}.weight", "up")),
                    (Part(f"{each}.{down}.weight"),),
                )
            )
        pairs = [(f"{place}.gate_up_proj{end}", f"{place}.down_proj{end}") for end in ("", ".weight")]
        for up, down in pairs if fused is None else [fused, *pairs]:
            layouts.setdefault("gate_up_proj", []).append(
                (
                    (Part(up, "gate|up", stacked=True, transposed=transposed, interleaved=interleaved),),
                    (Part(down, stacked=True, transposed=transposed),),
                )
            )
        layouts.setdefault("gate_up_proj_blocks", []).append(
            (
                (_blocks(f"{place}.gate_up_proj", "gate|up", interleaved=interleaved),),
                (_blocks(f"{place}.down_proj", "all"),),
            )
        )
        layouts.setdefault("{e}.gate_proj_blocks", []).append(  # of GGUF files
            (
                tuple(_blocks(f"{each}.{of}_proj", of, stacked=False) for of in ("gate", "up")),
                (_blocks(f"{each}.down_proj", "all", stacked=False),),
            )
        )
    first = layouts.pop(own)
    ordered = first + [pair for pairs in layouts.values() for pair in pairs]
    name = "layers.{i}.experts"
    weights = {
        f"{name}.gate_up": OneOf(tuple(up for up, _ in ordered)),
        f"{name}.down": OneOf(tuple(down for _, down in ordered)),
    }
    if bias:
        both = Part(f"{at[0]}.gate_up_proj_bias", "gate|up", stacked=True, interleaved=interleaved)
        halves = (Part(f"{at[0]}.{{e}}.gate_proj.bias", "gate"), Part(f"{at[0]}.{{e}}.up_proj.bias", "up"))
        weights[f"{name}.gate_up.bias"] = OneOf(((both,), halves))
        weights[f"{name}.down.bias"] = OneOf(
            ((Part(f"{at[0]}.down_proj_bias", stacked=True),), (Part(f"{at[0]}.{{e}}.down_proj.bias"),))
        )
    return weights


def _blocks(name: str, rows: str, stacked: bool = True, interleaved: bool = False) -> Part:
    """MXFP4: rows are outputs."""
    return Part(f"{name}_blocks", rows, stacked=stacked, interleaved=interleaved, scales=f"{name}_scales")
