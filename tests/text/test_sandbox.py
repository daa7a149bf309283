"""What a hostile template can't do: escape, hang or exhaust memory."""

from __future__ import annotations

import time

import pytest
from text.chats import TEMPLATES, USER, render

from pace.errors import ChatTemplateError
from pace.text.chat import ChatTemplate

DOUBLE = "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
GROW = "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
HOSTILE = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(9999) %}{% for j in range(9999) if j < 0 %}{% endfor %}{% endfor %}",
    "large range": "{% for i in range(1000000000) %}{% endfor %}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop(x) }}{% endfor %}",
    "recursive macro": "{% macro m(s) %}{{ m(s) }}{% endmacro %}{{ m(1) }}",
    "text times": "{{ 'a' * 2000000000 }}",
    "times text": "{{ 2000000000 * 'a' }}",
    "list times": "{{ [1] * 2000000000 }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "squares": "{% set ns = namespace(n=3) %}{% for i in range(9) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "grow by plus": GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "grow by tilde": GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "grow by block": GROW
    + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}{{ ns.s }}",
    "grow by percent": GROW + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}{{ ns.s }}",
    "grow by join": GROW + "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}{{ ns.s }}",
    "grow by join method": GROW + "{% set ns.s = ''.join([ns.s, ns.s]) %}{% endfor %}{{ ns.s }}",
    "grow by replace": GROW + "{% set ns.s = ns.s | replace('a', 'aa') %}{% endfor %}{{ ns.s }}",
    "grow by replace method": GROW + "{% set ns.s = ns.s.replace('a', 'aa') %}{% endfor %}{{ ns.s }}",
    "grow by macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}{{ "
    + "m(" * 40
    + "'aa'"
    + ")" * 40
    + " }}",
    "literal in a loop": "{% for i in range(100000) %}" + "x" * 10_000 + "{% endfor %}",
    "literal in a macro": "{% macro m() %}" + "x" * 10_000 + "{% endmacro %}"
    "{% for i in range(1000) %}{% for j in range(99) %}{% set y = m() %}{% endfor %}{% endfor %}",
    "shared lists printed": DOUBLE + "{{ ns.s }}",
    "shared lists to json": DOUBLE + "{{ ns.s | tojson }}",
    "shared lists compared": DOUBLE + "{{ ns.s == ns.s }}",
    "shared lists tested": DOUBLE + "{{ ns.s is eq ns.s }}",
    "shared lists sorted": DOUBLE + "{{ [ns.s, ns.s] | sort }}",
    "shared lists joined": DOUBLE + "{{ ns.s | join }}",
    "shared lists formatted": DOUBLE + "{{ '%s' % ns.s }}",
    "shared lists concatenated": DOUBLE + "{% set x = 'a' ~ ns.s %}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "star width": "{{ '%*d' % (1000000000, 1) }}",
    "width filter": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "indent": "{{ 'a' | indent(1000000000) }}",
    "json indent": "{{ [1] | tojson(indent=1000000000) }}",
    "round": "{{ 2.5 | round(1000000000, 'ceil') }}",
    "strftime": "{{ strftime_now('%1000000000Y') }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "mro": "{{ [].__class__.__base__.__subclasses__() }}",
    "attr": "{{ '' | attr('__class__') }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "undefined": "{{ x.y.z }}",
    "division": "{{ 1 // 0 }}",
    "syntax": "{% if %}",
    "unclosed": "{% for",
    "parentheses": "{{ " + "(" * 1000 + "1" + ")" * 1000 + " }}",
    "brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ChatTemplateError) as error:
        render(HOSTILE[name])
        raise ChatTemplateError("rendered")
    assert time.perf_counter() - start < 2
    assert str(error.value) != "rendered"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''['__class__'] }}",
        "{{ raise_exception.__globals__ }}",
        "{{ range.__self__ }}{{ cycler.__init__ }}{{ namespace.__class__ }}",
        "{{ [''] | map(attribute='__class__') | join }}",
        "{{ self.__init__ }}{{ self._TemplateReference__context }}",
    ],
)
def test_internals_are_undefined(source: str) -> None:
    assert render(source) == ""


def test_hostile_template_stays_small() -> None:
    tracemalloc = pytest.importorskip("tracemalloc")
    tracemalloc.start()
    try:
        for name in ("text times", "grow by tilde", "grow by block", "grow by macro"):
            tracemalloc.reset_peak()
            with pytest.raises(ChatTemplateError):
                render(HOSTILE[name])
            assert tracemalloc.get_traced_memory()[1] < 100e6, name
    finally:
        tracemalloc.stop()


def test_long_chats_fit_the_budget() -> None:
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200} for i in range(5000)
    ]
    start = time.perf_counter()
    for name in ("chatml", "tools"):
        assert len(render(TEMPLATES[name], messages)) > 4_900_000
    assert time.perf_counter() - start < 4


def test_budgets_are_per_rendering() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}ok")
    assert [template.render(USER) for _ in range(12)] == ["ok"] * 12
