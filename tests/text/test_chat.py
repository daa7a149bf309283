"""Chat templates render as in transformers."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from text.chats import CHAT, TEMPLATES, TOKENS, TOOL_CHAT, TOOLS, USER, render

from pace.errors import ChatTemplateError, PaceError, RequestError
from pace.text.chat import ChatTemplate, ChatTemplates


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


def test_a_refusal_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="'roles must alternate'"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_callers_class_brings_no_methods() -> None:
    class Sneaky(dict[str, Any]):
        def secret(self) -> str:
            return "leaked"

    messages = [Sneaky(role="user", content="x")]
    with pytest.raises(PaceError):
        render("{{ messages[0].secret() }}", messages)
    assert render("{% set x = messages[0].pop %}ok", messages) == "ok"
    assert messages == [{"role": "user", "content": "x"}]


# ---- what the template decides


@pytest.mark.parametrize("role", ["ipython", "developer", "function", "latest_reminder", "Usuário"])
def test_templates_decide_which_roles_there_are(role: str) -> None:
    assert render("{{ messages[0].role }}", [{"role": role, "content": "x"}]) == role
    picky = "{% if messages[0].role != 'user' %}{{ raise_exception('only user') }}{% endif %}"
    with pytest.raises(RequestError, match="only user"):
        render(picky, [{"role": role, "content": "x"}])


def test_what_is_absent_stays_absent() -> None:
    source = "{% for m in messages %}{{ m.content is defined }},{{ m.content is none }},{{ m | length }};{% endfor %}"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert render(source, [call, {**call, "content": None}, {"role": "user", "content": ""}]) == (
        "False,False,2;True,True,3;True,False,2;"
    )


def test_a_message_without_content_is_empty_for_templates_that_know_no_null() -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    absent = {key: value for key, value in call.items() if key != "content"}
    adding = "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}"
    assert render(adding, [call, absent]) == "<><>"
    assert render("{{ messages[0].content }}", [call]) == ""  # and not None
    knowing = "{% if messages[0].content is none %}{{ 'a call' }}{% endif %}"  # DeepSeek's
    assert render(knowing, [call]) == "a call"
    with pytest.raises(ChatTemplateError):
        render(adding, [{"role": "user", "content": None}])


def test_parts_go_to_templates_that_read_them() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "thinking", "thinking": "b"},
        {"type": "text", "text": "c"},
    ]
    texts = [part for part in parts if part["type"] == "text"]
    for loop in ("m.content", "m['content']", "content", "m.content | selectattr('type', 'equalto', 'text')"):
        source = (
            "{% for m in messages %}{% set content = m['content'] %}{% if content is string %}{{ content }}{% else %}"
            "{% for part in " + loop + " %}<{{ part.type }}>{% endfor %}{% endif %}{% endfor %}"
        )
        expected = "<text><text>" if "select" in loop else "<text><thinking><text>"
        assert render(source, [{"role": "user", "content": parts}]) == expected
    plain = (
        "{% for m in messages %}{{ m.content }}{% for line in m.content.split('x') %}{% endfor %}{% endfor %}"
    )
    assert render(plain, [{"role": "user", "content": texts}]) == "a\nc"


def test_a_list_that_is_no_parts_is_the_templates_business() -> None:
    """Llama 3.1 writes the result of a tool as JSON where it isn't a text."""
    source = "{{ messages[0].content | tojson }}"
    told: dict[Any, str] = {True: "true", None: "null"}
    for content in ([1, {"t": 21}], {"t": 21}, 5, True, None, []):
        rendered = render(source, [{"role": "ipython", "content": content}])
        assert rendered == told.get(content if isinstance(content, bool | None) else "", rendered)
    assert render(source, [{"role": "tool", "content": {"t": 21}}]) == '{"t": 21}'


def test_reasoning_has_every_name_that_templates_read() -> None:
    source = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}|{{ messages[0].content }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert render(source, [{"role": "assistant", name: "why", "content": "so"}]) == "why|why|so"


def test_variables_are_json() -> None:
    source = "{{ enable_thinking }} {{ documents }}"
    assert render(source, variables={"enable_thinking": False}) == "False None"
    assert render("{{ documents[0].text }}", variables={"documents": [{"text": "d"}]}) == "d"
    bads: list[Any] = [
        {"messages": 1}, {"bos_token": "x"}, {"_x": 1}, {"a b": 1}, {"x": [object()]}, {"range": 1}, {1: 1},
        {"tools": []}, {"x": float("nan")}, {"add_generation_prompt": True}, [1], "x",
    ]  # fmt: skip
    for bad in bads:
        with pytest.raises(RequestError):
            render(source, variables=bad)


def test_the_clock_can_be_set() -> None:
    clock = lambda: datetime(2024, 7, 26, 12)  # noqa: E731  # a line, and used once
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", clock=clock).render(USER) == "26 Jul 2024"
    macro = "{% macro today() %}{{ strftime_now('%H') }}{% endmacro %}{{ today() }}"
    assert ChatTemplates({"default": macro}, clock=clock).choose().render(USER) == "12"


# ---- continuing the last message

OPEN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure, "}]


def test_the_last_message_is_left_open() -> None:
    assert render(TEMPLATES["chatml"], OPEN, continue_final_message=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nSure, "
    )
    trimming = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}"
    assert render(trimming, OPEN, continue_final_message=True) == "[user]hi[/][assistant]Sure,"
    parts = [
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]}
    ]
    assert render(TEMPLATES["chatml"], parts, continue_final_message=True).endswith("assistant\na\nb ")
    reading = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert render(reading, parts, continue_final_message=True) == "<a><b "
    assert parts[0]["content"][1] == {"type": "text", "text": "b "}


def test_what_cannot_be_continued_is_refused() -> None:
    with pytest.raises(RequestError, match="choose one"):
        render(TEMPLATES["chatml"], OPEN, continue_final_message=True, add_generation_prompt=True)
    for final in (
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": []},
    ):
        with pytest.raises(RequestError, match="continue_final_message"):
            render("{% for p in messages[0].content %}{% endfor %}", [final], continue_final_message=True)
    with pytest.raises(RequestError, match="can't be continued"):
        render("{{ messages[0].content }}", OPEN, continue_final_message=True)


@pytest.mark.live
@pytest.mark.parametrize("content", ["Sure", " Sure  ", "", "a\n\n", "你好 👋"])
@pytest.mark.parametrize("name", ["chatml", "headers", "inst"])
def test_continuing_as_transformers(name: str, content: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [*CHAT, {"role": "assistant", "content": content}]
    (expected,), _ = utils.render_jinja_template(
        [messages], chat_template=TEMPLATES[name], continue_final_message=True, **TOKENS
    )
    assert render(TEMPLATES[name], messages, continue_final_message=True) == expected


# ---- which template


def templates(folder: Path, **config: Any) -> ChatTemplates:
    tokenizer: Any = SimpleNamespace(directory=folder, config=config, special_tokens=TOKENS)
    return ChatTemplates.load(folder, tokenizer)


def test_tools_choose_their_template(tmp_path: Path) -> None:
    named = templates(tmp_path, chat_template={"default": "D", "tool_use": "T", "rag": "R{{ bos_token }}"})
    assert named.choose().render(USER) == named.choose(tools=[]).render(USER) == "D"
    assert named.choose(tools=TOOLS).render(USER, tools=TOOLS) == "T"
    assert named.choose("rag", tools=TOOLS).render(USER) == "R<s>"
    assert named.choose("{{ messages[0].content }}").render(USER) == "hi"
    assert templates(tmp_path, chat_template="D").choose(tools=TOOLS).render(USER) == "D"


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    named = templates(tmp_path, chat_template={"rag": "R", "tool_use": "T"})
    for name, words in (
        ("tool-use", "no chat template is called 'tool-use'.*rag, tool_use"),
        (None, "but no default"),
    ):
        with pytest.raises(ChatTemplateError, match=words):
            named.choose(name)
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        templates(tmp_path).choose()
    assert templates(tmp_path).choose("{{ 1 }}").render(USER) == "1"
    with pytest.raises(RequestError, match="expected a name"):
        named.choose(5)


def test_a_template_is_compiled_once(tmp_path: Path) -> None:
    named = templates(tmp_path)
    assert named.choose("{{ 1 }}") is named.choose("{{ 1 }}")
