"""The sandbox in which chat templates run: Jinja's immutable sandbox, with a budget on everything that can
grow.

A template is a program from the model's repository. Jinja's own sandbox keeps it from Python's internals, but
runs `'a' * 2_000_000_000` and two nested loops of 10^5. Here every loop iteration, call, filter and operator
that can make a text or a list larger first asks a `Budget`, so that each single operation is small; the
deadline is the second net. Imported by `chat` when the first template is compiled: jinja2 costs 50 ms, and
most programs need no template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from pace.errors import ChatTemplateError, RequestError, show
from pace.text.budget import (
    BUDGET,
    Budget,
    OverBudget,
    charge_replace,
    charge_result,
    check_binop,
    check_method,
    check_percent,
    take,
    text_len,
    weigh,
)

__all__ = ["Compiled", "compile_template", "render"]

MAX_FILTER_INT = 1000  # widths, counts and precisions given to filters

_CLOCK: ContextVar[Callable[[], datetime]] = ContextVar("pace_chat_clock")


@dataclass(frozen=True)
class Compiled:
    """A template ready to render.

    Attributes:
        template: Jinja's.
        reads_parts: it loops over a message's content, so it understands lists of parts.
        asks_for_none: it asks whether something is null, perhaps a message's content.
        reads_tools: it mentions them.
    """

    template: jinja2.Template
    reads_parts: bool
    asks_for_none: bool
    reads_tools: bool


def compile_template(source: str) -> Compiled:
    """Compile a chat template for `render`.

    Raises:
        ChatTemplateError: a syntax error, an unknown filter or test, or a construct that is not offered.
    """
    environment = _Environment()
    token = BUDGET.set(Budget())  # the compiler folds constants, with the same filters
    try:
        tree = environment.parse(source)
        reads_parts = any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))
        asks_for_none = any(test.name == "none" for test in tree.find_all(nodes.Test)) or any(
            constant.value is None for constant in tree.find_all(nodes.Const)
        )
        reads_tools = any(name.name == "tools" for name in tree.find_all(nodes.Name))
        tree = _Guards().visit(tree)
        tree.set_environment(environment)
        code = environment.compile(tree)
        return Compiled(
            jinja2.Template.from_code(environment, code, environment.make_globals(None)),
            reads_parts,
            asks_for_none,
            reads_tools,
        )
    except ChatTemplateError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"the chat template is malformed: line {error.lineno}: {error.message}"
        ) from None
    except RecursionError:
        raise ChatTemplateError("the chat template is nested too deeply") from None
    except Exception as error:
        raise ChatTemplateError(f"the chat template is malformed: {type(error).__name__}: {error}") from None
    finally:
        BUDGET.reset(token)


def render(
    template: jinja2.Template,
    variables: Mapping[str, Any],
    budget: Budget,
    clock: Callable[[], datetime] = datetime.now,
) -> str:
    """Render a compiled template within `budget`; `strftime_now` asks `clock`.

    Raises:
        RequestError: the template called raise_exception: it does not take these messages.
        ChatTemplateError: it failed, or exceeded the budget.
    """
    token, clock_token = BUDGET.set(budget), _CLOCK.set(clock)
    try:
        return template.render(variables)
    except RequestError:
        raise
    except OverBudget as error:
        raise ChatTemplateError(f"the chat template was stopped: {error}") from None
    except RecursionError:
        raise ChatTemplateError("the chat template was stopped: it recurses too deeply") from None
    except MemoryError:
        raise ChatTemplateError("the chat template was stopped: out of memory") from None
    except Exception as error:
        raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from None
    finally:
        BUDGET.reset(token)
        _CLOCK.reset(clock_token)


def _is_content(node: nodes.Node) -> bool:
    """Whether an expression is a message's content itself, perhaps filtered or sliced; a call makes something else."""
    while isinstance(node, (nodes.Filter, nodes.Getitem)) and node.node is not None:
        if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        node = node.node
    return (isinstance(node, nodes.Getattr) and node.attr == "content") or (
        isinstance(node, nodes.Name) and node.name == "content"
    )


class _Counted:
    """An iterable that spends a step, and the loop body's literal text, for each element; keeps `len` where
    it has one."""

    def __init__(self, items: Iterable[Any], n_chars: int) -> None:
        self._items = items
        self._n_chars = n_chars

    def __iter__(self) -> Iterator[Any]:
        budget = BUDGET.get()
        for item in self._items:
            budget.spend(1, self._n_chars)
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # a TypeError is what Jinja expects of a generator


class _Guards(NodeTransformer):
    """Rewrites a template's syntax tree so that loops, macro bodies, `~` and comparisons pass through the
    budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise ChatTemplateError(
                f"the chat template has a recursive loop in line {node.lineno}; it is not offered"
            )
        self.generic_visit(node)
        node.iter = _filter(node.iter, "pace_loop", nodes.Const(_literal_chars(node)))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._charge_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._charge_body(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "pace_concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        holders: list[Any] = [node, *node.ops]
        for holder in holders:
            if not isinstance(holder.expr, nodes.Const):
                holder.expr = _filter(holder.expr, "pace_weigh")
        return node

    def _charge_body(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        charge = _filter(
            nodes.Const(None, lineno=node.lineno), "pace_charge", nodes.Const(_literal_chars(node))
        )
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        return node  # type: ignore[no-any-return]  # Jinja's visitor passes nodes as Any


def _filter(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _literal_chars(node: nodes.Node) -> int:
    return sum(len(data.data) for data in node.find_all(nodes.TemplateData))


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; for rendering it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as `transformers` sets it up for chat templates, less what can't be bounded."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_finalize
        )
        self.filters = {
            name: _guard_filter(name, self.filters[name]) for name in (*_CHEAP_FILTERS, *_DEEP_FILTERS)
        }
        self.filters["tojson"] = _to_json
        self.filters.update(
            pace_loop=_loop, pace_concat=_concat, pace_charge=_charge, pace_weigh=_weigh_operand
        )
        for name in _DEEP_TESTS:
            test: Any = self.tests[name]
            self.tests[name] = _guard_test(test)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _UNBOUNDED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is not None:
            raise jinja2.exceptions.SecurityError("str.format is not offered; its widths can't be bounded")
        return None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Named as in Jinja: a template's keyword arguments may be called self or context.
        budget = BUDGET.get()
        budget.spend(1)
        if not isinstance(__obj, Macro):
            for value in (*args, *kwargs.values()):
                weigh(value)
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str):
                args = check_method(owner, getattr(__obj, "__name__", ""), args)
        result = super().call(__context, __obj, *args, **kwargs)
        charge_result(result)
        return result


_UNBOUNDED_METHODS = frozenset({
    "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans", "encode", "format",
    "format_map",
})  # fmt: skip
_CHEAP_FILTERS = (
    "abs", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr",
    "reverse", "round", "safe", "select", "selectattr",
)  # fmt: skip
# These look at all of a value, so a nest of lists that share their parts is measured first.
_DEEP_FILTERS = (
    "capitalize", "dictsort", "e", "escape", "float", "format", "groupby", "indent", "int", "join", "lower",
    "max", "min", "replace", "sort", "string", "sum", "title", "trim", "truncate", "unique", "upper",
    "urlencode", "wordcount",
)  # fmt: skip
_DEEP_TESTS = ("==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ne", "lt", "le", "gt", "ge", "lessthan",
               "greaterthan", "in")  # fmt: skip


def _guard_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap one of Jinja's filters: small integers, measured input, charged output."""
    at = (
        1 if hasattr(function, "jinja_pass_arg") else 0
    )  # where the value stands, after context or environment

    @wraps(function)  # copies jinja_pass_arg too
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        budget.spend(1)
        value, options = args[at], [*args[at + 1 :], *kwargs.values()]
        for option in options:
            if isinstance(option, int) and abs(option) > MAX_FILTER_INT and name not in ("d", "default"):
                raise OverBudget(
                    f"the filter {name} was given {show(option)}, expected at most {MAX_FILTER_INT}"
                )
            if name in _DEEP_FILTERS:
                weigh(option)
        if isinstance(value, Iterator):  # of a map or select before this one
            value = take(value)
        if name in _DEEP_FILTERS:
            n_chars = text_len(value)
            if name == "replace" and len(options) >= 2:
                charge_replace(value, options[0], options[1])
            elif name == "join" and isinstance(value, Sized):
                n_chars += len(value) * sum(text_len(option) for option in options)
            elif name == "indent":
                lines = value.count("\n") + 1 if isinstance(value, str) else 1
                n_chars += lines * sum(text_len(option) + MAX_FILTER_INT // 10 for option in options)
            elif name == "format":
                check_percent(value if isinstance(value, str) else "", options)
            budget.spend(0, n_chars)
        elif isinstance(value, Sized) and name in ("list", "reverse"):
            budget.spend(len(value))
        result = function(*args[:at], value, *args[at + 1 :], **kwargs)
        charge_result(result)
        return result

    return guarded


def _guard_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def guarded(*args: Any) -> Any:
        for value in args:
            weigh(value)
        return function(*args)

    return guarded


# The filters and the finaliser below take the context only so that Jinja can't fold them into constants.


@jinja2.pass_context
def _loop(context: Context, items: Any, n_chars: int) -> Any:
    return _Counted(items, n_chars)


@jinja2.pass_context
def _charge(context: Context, value: None, n_chars: int) -> None:
    BUDGET.get().spend(1, n_chars)


@jinja2.pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    BUDGET.get().spend(1, sum(text_len(part) for part in parts))
    return "".join(map(str, parts))


@jinja2.pass_context
def _weigh_operand(context: Context, value: Any) -> Any:
    weigh(value)
    return value


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> str:
    BUDGET.get().spend(1, text_len(value))
    return str(value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As `transformers` defines it: no HTML escapes, other scripts as they are."""
    if indent is not None and (not isinstance(indent, int) or not 0 <= indent <= 16):
        raise OverBudget(f"tojson was given indent {show(indent)}, expected 0 to 16")
    n_nodes, n_chars, depth = weigh(value)
    BUDGET.get().spend(0, n_chars + n_nodes * (8 + (indent or 0) * depth))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object = "") -> NoReturn:
    raise RequestError(f"the chat template refuses these messages: {show(message, 300)}")


def _strftime_now(pattern: str) -> str:
    if not isinstance(pattern, str) or len(pattern) > 100 or re.search(r"%[^a-zA-Z%]*\d", pattern):
        raise OverBudget(f"strftime_now was given {show(pattern)}, expected a short format without widths")
    return _CLOCK.get()().strftime(pattern)
