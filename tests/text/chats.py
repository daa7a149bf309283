"""Conversations, tools and templates written after the constructs that published ones use."""

from __future__ import annotations

from typing import Any

from pace.text.chat import ChatTemplate

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
