"""Chat messages to the text that the model was trained on, through the checkpoint's own template."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pace.errors import ChatTemplateError, RequestError, show
from pace.text.budget import Budget
from pace.text.messages import check_messages, check_tools, check_variables, n_nodes_and_chars
from pace.text.template_files import DEFAULT, MAX_TEMPLATE_BYTES, find_templates

if TYPE_CHECKING:
    from pace.text.sandbox import Compiled
    from pace.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "ChatTemplates"]

TOOL_USE = "tool_use"

# Put behind the message that is to be continued; where the template trims, the space goes with it.
_END_OF_FINAL = "\ue000end of the final message\ue000"

_NAME = re.compile(r"[\w.-]{1,64}")


_ABSENT = object()


def _with_contents(messages: list[dict[str, Any]], empty: set[object]) -> list[dict[str, Any]]:
    """The messages with "" as content of the assistant's that have one of `empty`."""
    return [
        {**message, "content": ""}
        if message["role"] == "assistant" and any(message.get("content", _ABSENT) is one for one in empty)
        else message
        for message in messages
    ]


class ChatTemplate:
    """One chat template; compiled at its first use."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Keep a template's text.

        Args:
            source: the Jinja template.
            special_tokens: variables such as {"bos_token": "<s>"}.
            clock: what `strftime_now` asks for the time.

        Raises:
            ChatTemplateError: it is longer than 1 MiB.
        """
        if len(source) > MAX_TEMPLATE_BYTES:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, expected at most {MAX_TEMPLATE_BYTES}"
            )
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._clock = clock

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages into a prompt; encode it with `add_special_tokens=False`.

        Args:
            messages: each with a `role`, and with what else the template reads.
            add_generation_prompt: end with the start of the assistant's answer; None: unless the final message is
                continued.
            continue_final_message: end inside the last message, so that the answer continues it.
            tools: JSON schemas of functions that the model may call.
            variables: further variables of the template, such as {"enable_thinking": False}; JSON values.

        Raises:
            RequestError: an argument is invalid, or the template refuses the messages.
            ChatTemplateError: the template is malformed, failed, or exceeded its budget.
        """
        plain = check_messages(messages, keep_parts=self._compiled.reads_parts)
        plain_tools = None if tools is None else check_tools(tools)
        plain_variables = check_variables(variables or {})
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt starts a new message and continue_final_message stays in the last one; choose one"
            )
        if continue_final_message:
            _mark_end(plain)
        if not self._compiled.asks_for_none:
            plain = _with_contents(plain, {None})
        variables = {
            **self._special_tokens,
            "documents": None,
            **plain_variables,
            "tools": plain_tools,
            "add_generation_prompt": not continue_final_message
            if add_generation_prompt is None
            else bool(add_generation_prompt),
        }
        try:
            text = self._render(plain, variables)
        except ChatTemplateError:
            # A call alone is a message without content, which older templates can't take.
            filled = _with_contents(plain, {None, _ABSENT})
            if filled == plain:
                raise
            text = self._render(filled, variables)
        return _cut_at_end(text) if continue_final_message else text

    @property
    def reads_tools(self) -> bool:
        """Whether the model hears of the tools that are given."""
        return self._compiled.reads_tools

    def _render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        # Not at the top: it imports jinja2, 50 ms.
        from pace.text.sandbox import render

        n_nodes, n_chars = n_nodes_and_chars(messages, variables)
        # Templates look at every message a few times; a budget in proportion admits long chats and stops
        # bombs.
        budget = Budget(steps=250_000 + 100 * n_nodes, chars=16_000_000 + 16 * n_chars)
        return render(self._compiled.template, {**variables, "messages": messages}, budget, self._clock)

    @cached_property
    def _compiled(self) -> Compiled:
        from pace.text.sandbox import compile_template

        return compile_template(self.source)


class ChatTemplates:
    """A checkpoint's chat templates by name, and others that callers bring."""

    def __init__(
        self,
        named: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str] | None = None,
        where: str = "the checkpoint",
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Keep templates.

        Args:
            named: their texts; "default" and "tool_use" are chosen where nobody names one.
            special_tokens, clock: as `ChatTemplate`.
            where: whose they are, for error messages.
        """
        self.named = dict(named)
        self._where = where
        # Callers give the same template again and again; compiling takes 5 to 50 ms.
        self._make = lru_cache(maxsize=16)(
            lambda source: ChatTemplate(source, special_tokens=special_tokens, clock=clock)
        )

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer, own: str | None = None) -> ChatTemplates:
        """Take the templates from a checkpoint's folder; see `find_templates` for their forms.

        Args:
            directory: the folder to look in; usually `tokenizer.directory`.
            tokenizer: gives tokenizer_config.json and the special tokens.
            own: a template that takes the place of all in the folder.

        Raises:
            ChatTemplateError: a template has a wrong type or encoding.
            CheckpointError: a file can't be read.
        """
        named = find_templates(directory, tokenizer.config) if own is None else {DEFAULT: own}
        return cls(named, special_tokens=tokenizer.special_tokens, where=str(directory))

    def choose(self, chat_template: object = None, *, tools: object = None) -> ChatTemplate:
        """The template for a request.

        Args:
            chat_template: the name of one of the checkpoint's, or a Jinja template; None: "tool_use" where there are
                tools and such a template, else "default".
            tools: the request's.

        Raises:
            ChatTemplateError: there is no such template, or none at all.
            RequestError: not a string.
        """
        if chat_template is None:
            name = TOOL_USE if tools and TOOL_USE in self.named else DEFAULT
            if not self.named:
                raise ChatTemplateError(
                    f"{self._where}: the checkpoint has no chat template (no chat_template.jinja, and none in "
                    "tokenizer_config.json); use generate with a prompt, or pass a template"
                )
            if name not in self.named:
                raise ChatTemplateError(
                    f"{self._where}: chat_template names {', '.join(sorted(self.named))}, but no default; name one of them"
                )
            return self._make(self.named[name])
        if not isinstance(chat_template, str):
            raise RequestError(f"chat_template is {show(chat_template)}, expected a name or a Jinja template")
        if chat_template not in self.named and _NAME.fullmatch(chat_template):
            raise ChatTemplateError(
                f"{self._where}: no chat template is called {show(chat_template)}; there are "
                f"{', '.join(sorted(self.named)) or 'none'}"
            )
        return self._make(self.named.get(chat_template, chat_template))


def _mark_end(messages: list[dict[str, Any]]) -> None:
    """Mark where the content of the last message ends."""
    final = messages[-1]
    holder, key = final, "content"
    if isinstance(final.get("content"), list):
        texts = [part for part in final["content"] if isinstance(part, dict) and "text" in part]
        if texts:
            holder, key = texts[-1], "text"
    if not isinstance(holder.get(key), str):
        raise RequestError("continue_final_message needs a last message whose content is a text")
    holder[key] += _END_OF_FINAL + " "


def _cut_at_end(text: str) -> str:
    at = text.rfind(_END_OF_FINAL)
    if at < 0:
        raise RequestError(
            "the chat template does not write the end of the last message, so it can't be continued; put the beginning of "
            "the answer into a prompt for generate"
        )
    trimmed = text[at + len(_END_OF_FINAL) :][:1] != " "
    return text[:at].rstrip() if trimmed else text[:at]
