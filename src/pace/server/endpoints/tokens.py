"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pace.params import MAX_LISTED_IDS
from pace.server.http import json_response
from pace.server.protocol.chat import ChatRequest
from pace.server.protocol.errors import ApiError
from pace.server.protocol.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from pace.server.requests import chat_of
from pace.server.service import Service
from pace.server.wire import Detokenize, Tokenize

__all__ = ["detokenize", "tokenize"]


_OF_CHATS = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "tools",
)


async def tokenize(service: Service, http: HttpRequest) -> Response:
    """The tokens of a prompt or conversation."""
    request = await service.read(http, TokenizeRequest)
    service.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "expected exactly one of prompt and messages", param="prompt")
    other = _OF_CHATS if request.messages is None else ("add_special_tokens",)
    for name in other:
        if getattr(request, name):
            what = "a prompt" if request.messages is None else "messages, whose template adds them"
            raise ApiError(400, f"{name} means nothing to {what}; leave it out", param=name)
    chat = None
    if request.messages is not None:
        as_chat = ChatRequest(
            messages=request.messages,
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            chat_template=request.chat_template,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        chat = chat_of(as_chat, trust_template=service.limits.trust_request_chat_template)
    question = Tokenize(
        service.backend.next_id(),
        request.prompt,
        chat,
        request.add_special_tokens is not False,
        bool(request.return_token_strs),
    )
    ids, texts = await service.backend.ask(question)
    return json_response(Tokenized(len(ids), service.info.max_model_len, ids, texts))


async def detokenize(service: Service, http: HttpRequest) -> Response:
    """The text of tokens."""
    request = await service.read(http, DetokenizeRequest)
    service.check_model(request.model)
    if len(request.tokens) > MAX_LISTED_IDS:
        raise ApiError(
            400,
            f"tokens has {len(request.tokens)} entries, expected at most {MAX_LISTED_IDS}",
            param="tokens",
        )
    text = await service.backend.ask(Detokenize(service.backend.next_id(), request.tokens))
    return json_response(Detokenized(text))
