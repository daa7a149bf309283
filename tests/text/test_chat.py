"""Chat templates render as in transformers, and can't escape, hang or exhaust memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pace.errors import ChatTemplateError, PaceError, RequestError
from pace.text.chat import ChatTemplate, check_messages

USER = [{"role": "user", "content": "hi"}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is ‘2+2’? <b>&amp;</b> "},
    {"role": "assistant", "content": "4\n"},
    {"role": "user", "content": "你好 👋"},
]
TOOL_CHAT = [
    {"role": "user", "content": "Weather in Zürich?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
        ],
    },
    {"role": "tool", "content": '{"t": 21}', "name": "weather"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Look out of the window",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

# Written for these tests after the constructs that published templates use.
TEMPLATES = {
    "chatml": """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "headers": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|header|>system<|end|>\\n\\n" ~ system ~ "<|eot|>" }}
{%- for message in messages %}
    {%- if not loop.first %}{{ "\\n" }}{% endif %}
    {{- '<|header|>' ~ message.role ~ '<|end|>\\n\\n' ~ (message.content or '')|trim ~ '<|eot|>' }}
    {%- if loop.last and add_generation_prompt %}{{ '<|header|>assistant<|end|>' }}{% endif %}
{%- endfor %}""",
    "inst": """{{ bos_token }}{% for message in messages if message.role != 'system' %}
{% if message['role'] == 'user' %}[INST] {{ message.content }} [/INST]{% elif message.role == 'assistant' %}
 {{ message['content'] or '' }}{{ eos_token }}{% endif %}{% endfor %}""",
    "tools": """{%- macro show(tool, level) %}{{ '  ' * level }}{{ tool | tojson }}{% endmacro %}
{%- set ns = namespace(last=-1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and message.content is string %}
        {%- set ns.last = index %}{%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- "# Tools" }}
    {%- for tool in tools %}{{- "\\n" }}{{ show(tool, 1) }}{%- endfor %}
    {{- "\\n" ~ (tools | tojson(indent=2)) }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is none %}{{ message.role }} calls
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {%- for key, value in call.arguments.items() %} {{ key }}={{ value }}{% endfor %}
        {%- endfor %}
    {%- else %}{{ loop.index }}/{{ loop.length }} {{ message.role }}{{ "!" if loop.index0 == ns.last }}: {{
        message.content.strip().split('\\n')[-1].replace('&', 'and') }}
    {%- endif %}
    {% if message.name is defined %}name={{ message['name'] | upper }}{% endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>' }}{%- endif %}""",
    "generation": """{% for message in messages %}{% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}{{ message.role ~ ': ' ~ message.content }}
{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}
{{ unknown_variable }}{{ [3, 1, 2] | sort | join(', ') }} {{ messages | map(attribute='role') | list }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ 7 // 2 }} {{ 2 ** 5 }}
{{ '%05.1f' % 3.14 }}
{{ {'b': 'é<', 'a': [1, none, true]} }} {{ 'x' in messages[0].content }} {{ messages[0] is mapping }}""",
}


def render(source: str, messages: Any = USER, **options: Any) -> str:
    return ChatTemplate(source, special_tokens=TOKENS).render(messages, **options)


@pytest.mark.live
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "tools"), [(USER, None), (CHAT, None), (TOOL_CHAT, TOOLS)], ids=["one", "chat", "tools"]
)
def test_as_transformers(name: str, messages: Any, tools: Any, prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (expected,), _ = utils.render_jinja_template(
        [messages], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **TOKENS
    )
    assert render(TEMPLATES[name], messages, tools=tools, add_generation_prompt=prompt) == expected


def test_known_renderings() -> None:
    assert render(TEMPLATES["chatml"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(TEMPLATES["chatml"], add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert render(TEMPLATES["inst"], CHAT[:3]) == ("<s>[INST]   What is ‘2+2’? <b>&amp;</b>  [/INST] 4\n</s>")
    assert render("{{ tools is none }} {{ documents is none }}") == "True True"
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{{ {'é': '<&>'} | tojson }}") == '{"é": "<&>"}'


def test_variables() -> None:
    source = "{{ enable_thinking }}"
    assert render(source, variables={"enable_thinking": False}) == "False"
    for bad in ({"messages": 1}, {"bos_token": "x"}, {"_x": 1}, {"a b": 1}, {"x": [1]}, {"range": 1}, {1: 1}):
        with pytest.raises(RequestError):
            render(source, variables=bad)


# ---- messages


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "empty"),
        ("hi", "messages"),
        (None, "messages"),
        ([1], r"messages\[0\]"),
        ([{"content": "x"}], "role"),
        ([{"role": "wizard", "content": "x"}], "wizard"),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "assistant", "content": None}], "content"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}],
            "image_url",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "text"),
        ([{"role": "user", "content": ["x"]}], "content"),
        ([{"role": "user", "content": "x", "extra": object()}], "JSON"),
        ([{"role": "user", "content": "x", "extra": float("nan")}], "JSON"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], "key"),
        ([{"role": "user", "content": "x"}] * 10_001, "10001"),
    ],
)
def test_bad_messages(messages: Any, word: str) -> None:
    with pytest.raises(RequestError, match=word) as error:
        render("{{ messages }}", messages)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_deep_nesting_is_refused() -> None:
    value: Any = "x"
    for _ in range(100):
        value = [value]
    with pytest.raises(RequestError, match="nested"):
        render("", [{"role": "user", "content": "x", "extra": value}])


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a\nb"}]


def test_the_callers_messages_are_not_touched() -> None:
    class Sneaky(dict[str, Any]):
        def secret(self) -> str:
            return "leaked"

    messages = [Sneaky(role="user", content="x")]
    with pytest.raises(PaceError):
        render("{{ messages[0].secret() }}", messages)
    assert render("{% set x = messages[0].pop %}ok", messages) == "ok"
    assert messages == [{"role": "user", "content": "x"}]


# ---- what a hostile template can't do

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


def test_a_refusal_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="'roles must alternate'"):
        render("{{ raise_exception('roles must alternate') }}")


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


# ---- where the template comes from


def tokenizer(folder: Path, **config: Any) -> Any:
    return SimpleNamespace(directory=folder, config=config, special_tokens=TOKENS)


def test_load(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert (
        ChatTemplate.load(tmp_path, tokenizer(tmp_path, chat_template="{{ bos_token }}")).render(USER)
        == "<s>"
    )
    template = ChatTemplate.load(tmp_path, tokenizer(tmp_path, chat_template=named))
    assert template.render(USER) == "D" and template.render(USER, tools=TOOLS) == "T"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.load(tmp_path, tokenizer(tmp_path, chat_template="x")).render(USER) == "file"


@pytest.mark.parametrize(
    "value", [None, 5, {}, [1], [{"name": "x"}], [{"name": "x", "template": "y"}], "x" * ((1 << 20) + 1),
              [{"name": "default", "template": "y"}] * 2],
)  # fmt: skip
def test_load_refuses(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ChatTemplateError) as error:
        ChatTemplate.load(tmp_path, tokenizer(tmp_path, chat_template=value))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1001


def test_load_refuses_bad_files(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ChatTemplateError, match="UTF-8"):
        ChatTemplate.load(tmp_path, tokenizer(tmp_path))


def test_templates_are_json_in_the_config() -> None:
    assert render(json.loads(json.dumps(TEMPLATES["chatml"]))) == render(TEMPLATES["chatml"])
