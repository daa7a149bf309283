"""What one rendering of a chat template may use, and what its operations cost: weighed and spent before they are done.

Sizes are those of the values that exist; what is made of them is bounded from there, so that nothing large is
ever made to find out that it is too large.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pace.errors import show

__all__ = [
    "BUDGET",
    "Budget",
    "OverBudget",
    "charge_replace",
    "charge_result",
    "check_binop",
    "check_method",
    "check_percent",
    "take",
    "text_len",
    "weigh",
]

MAX_ITEMS = 100_000  # of one list that a template makes; also the sandbox's limit of range()
MAX_INT_BITS = 256
MAX_SECONDS = 5.0


class OverBudget(Exception):
    """Becomes a ChatTemplateError where the rendering was started."""


@dataclass
class Budget:
    """What one rendering may still use.

    Attributes:
        steps: loop iterations, calls, and list elements handled.
        chars: characters of all texts made on the way, the output among them.
        deadline_s: `time.monotonic()` after which it is refused.
    """

    steps: int = 250_000
    chars: int = 16_000_000
    deadline_s: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)

    def spend(self, steps: int = 0, chars: int = 0) -> None:
        """Use some of it, before the work is done."""
        self.steps -= steps
        self.chars -= chars
        if self.steps < 0:
            raise OverBudget("it takes too many steps")
        if self.chars < 0:
            raise OverBudget("it makes too much text")
        if time.monotonic() > self.deadline_s:
            raise OverBudget(f"it takes longer than {MAX_SECONDS:g} s")


BUDGET: ContextVar[Budget] = ContextVar("pace_chat_budget")  # of the rendering that runs


def weigh(value: Any) -> tuple[int, int, int]:
    """Count nodes, characters and depth of a nest of containers, shared parts as often as printing would;
    spends them."""
    if not isinstance(value, (list, tuple, dict, set)):
        return 1, len(value) if isinstance(value, str) else 20, 0
    budget = BUDGET.get()
    n_nodes = n_chars = max_depth = 0
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        n_nodes += 1
        max_depth = max(max_depth, depth)
        if isinstance(item, str):
            n_chars += len(item)
        elif isinstance(item, (list, tuple, set, dict)):
            budget.spend(len(item))
            stack.extend((child, depth + 1) for child in item)
            if isinstance(item, dict):
                stack.extend((child, depth + 1) for child in item.values())
        else:
            n_chars += 20
    return n_nodes, n_chars, max_depth


def text_len(value: Any) -> int:
    """At least roughly how long str(value) is; measured without making it."""
    if isinstance(value, str):
        return len(value)
    n_nodes, n_chars, _ = weigh(value)
    return n_chars + 4 * n_nodes


def charge_result(result: Any) -> None:
    """Spend what a call returned."""
    if isinstance(result, str):
        BUDGET.get().spend(0, len(result))
    elif isinstance(result, (list, tuple, dict)):
        BUDGET.get().spend(len(result))


def check_binop(operator: str, left: Any, right: Any) -> None:
    """Charge what `+`, `*`, `**` or `%` will make."""
    budget = BUDGET.get()
    budget.spend(1)
    if operator == "+":
        if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            _check_items(len(left) + len(right))
        elif isinstance(left, str) and isinstance(right, str):
            budget.spend(0, len(left) + len(right))
    elif operator == "*":
        for items, times in ((left, right), (right, left)):
            if isinstance(items, str) and isinstance(times, int):
                budget.spend(0, len(items) * max(0, times))
            elif isinstance(items, (list, tuple)) and isinstance(times, int):
                _check_items(len(items) * max(0, times))
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
    elif isinstance(left, str):
        check_percent(left, right)


def check_percent(pattern: str, values: Any) -> None:
    """Charge `pattern % values`, whose widths must be small."""
    if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", pattern):
        raise OverBudget(f"the format {show(pattern)} has a width that can't be bounded")
    BUDGET.get().spend(0, len(pattern) * 4 + text_len(values) + 1000 * pattern.count("%"))


def _check_items(n_items: int) -> None:
    if n_items > MAX_ITEMS:
        raise OverBudget(f"it makes a list of {n_items} elements, expected at most {MAX_ITEMS}")
    BUDGET.get().spend(n_items)


def _check_bits(n_bits: int) -> None:
    if n_bits > MAX_INT_BITS:
        raise OverBudget(f"it makes an integer of {n_bits} bits, expected at most {MAX_INT_BITS}")


def check_method(owner: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Charge a string method's result before it is made."""
    if name == "replace" and len(args) >= 2:
        charge_replace(owner, args[0], args[1])
    elif name == "join" and args:
        items = take(args[0])
        BUDGET.get().spend(len(items), sum(text_len(item) + len(owner) for item in items))
        return (items, *args[1:])
    else:
        BUDGET.get().spend(0, len(owner))
    return args


def charge_replace(text: Any, old: Any, new: Any) -> None:
    """Charge a text with every `old` in it replaced."""
    text, old, new = (part if isinstance(part, str) else " " * text_len(part) for part in (text, old, new))
    n_found = text.count(old) if old else len(text) + 1
    BUDGET.get().spend(0, len(text) + n_found * len(new))


def take(items: Iterable[Any]) -> list[Any]:
    """All elements of an iterable, unless they are too many."""
    taken = list(islice(items, MAX_ITEMS + 1))
    _check_items(len(taken))
    return taken
