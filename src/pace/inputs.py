"""From prompts and conversations to requests of the engine; what `LLM` and `AsyncLLM` do alike."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pace.checkpoint import read_pooling
from pace.engine.loader import Loaded
from pace.engine.request import Request
from pace.errors import PaceError, RequestError, show
from pace.log import logger
from pace.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from pace.params import SamplingParams
from pace.pooling_params import PoolingParams
from pace.text.answer import answer_reader
from pace.text.chat import ChatTemplates
from pace.text.forced_calls import forced_calls
from pace.text.preamble import NO_PREAMBLE, Preamble, find_preamble
from pace.text.readers import Reader
from pace.text.tokenizer import Tokenizer
from pace.text.tools import PARSER_ALIASES, ToolChoice, find_parser, functions_of

__all__ = [
    "ChatOptions",
    "Encoded",
    "Inputs",
    "Messages",
    "Prompt",
    "deadline",
    "embedding_of",
    "n_chars",
    "prompt_list",
]

Prompt = str | Seq[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": [...]} (optionally with the text it came from).

Both mappings may have a "cache_salt": requests share cached prompts only with those of the same salt.
"""

Messages = Seq[Mapping[str, Any]]
"""One conversation: [{"role": "user", "content": "..."}, ...]."""

PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
VLLM_PROMPT_KEYS = (
    "multi_modal_data",
    "multi_modal_uuids",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "prompt_embeds",
    "token_type_ids",
    "prompt_token_offsets",
)


ENCODED_TOGETHER = 256
"""Texts that are encoded at a time: the tokenizer's threads have enough to do, and 20 000 prompts of 450 tokens are never
lists of Python integers all at once (1.3 GiB; as int32 they take 34 MB)."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How conversations become prompts, and answers are read; one for each field of the same name of `LLM.chat`."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    tools: Seq[Mapping[str, Any]] | None = None
    include_reasoning: bool = False
    tool_choice: str | Mapping[str, Any] | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    """Of `REASONING_PARSERS`; an option of the server, not of `LLM.chat`: templates nearly always show the form."""


@dataclass(slots=True)
class Encoded:
    """A prompt as `Engine.prepare` takes it and checks it."""

    ids: Any
    text: str | None = None
    cache_salt: Any = None
    reader: Callable[[], Reader] | None = None
    preamble: Preamble = NO_PREAMBLE
    forced: str | None = None


class Inputs:
    """Makes requests for one loaded model; safe to use from many threads."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._chat_templates: ChatTemplates | None = None
        self._has_warned = False  # that tools don't reach the model

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            RequestError: it was loaded without one.
        """
        if self._loaded.tokenizer is None:
            raise RequestError("this model was loaded without a tokenizer; give prompt_token_ids")
        return self._loaded.tokenizer

    @property
    def default_params(self) -> SamplingParams:
        """What a request without parameters runs with."""
        return SamplingParams().merged_with(self._loaded.defaults.sampling)

    def encode(self, prompts: Seq[object]) -> list[Encoded]:
        """Token ids and text of every prompt; texts are encoded together.

        Raises:
            RequestError: a prompt has a wrong form, or can't be encoded; the message names its index.
        """
        encoded = [_parse_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        self._encode_texts(encoded, "prompt", Tokenizer.encode_batch)
        return encoded

    def encode_chats(self, conversations: Seq[Messages], options: ChatOptions) -> list[Encoded]:
        """Token ids and text of every conversation, through a chat template.

        Raises:
            ChatTemplateError: there is no template, or it is malformed or failed.
            RequestError: a conversation or an option has a wrong form, the template refuses it, or it can't be encoded.
        """
        if self._chat_templates is None:
            self._chat_templates = ChatTemplates.load(
                self._loaded.tokenizer_directory, self.tokenizer, self._loaded.chat_template
            )
        choice = ToolChoice.parse(options.tool_choice, options.tools)
        tools = options.tools if choice.offers_tools else None
        template = self._chat_templates.choose(options.chat_template, tools=tools)
        if tools and not template.reads_tools and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the chat template does not mention tools: the model does not hear of those that requests bring"
            )
        forced = None
        if choice.kind == "required":
            named = options.tool_parser
            form = find_parser(template.source) if named is None else PARSER_ALIASES.get(named, named)
            functions = functions_of(tools or ())
            forced = forced_calls(form, template.source, functions, choice.name, self.tokenizer)
        encoded = []
        for i, messages in enumerate(conversations):
            with _naming(f"conversation {i}"):
                text = template.render(
                    messages,
                    add_generation_prompt=options.add_generation_prompt,
                    continue_final_message=options.continue_final_message,
                    tools=tools,
                    variables=options.chat_template_kwargs,
                )
            continued = _continued(messages, options)
            encoded.append(
                Encoded(
                    None,
                    text,
                    reader=_reader(template.source, text, continued, tools, options),
                    preamble=find_preamble(
                        template.source,
                        text,
                        continued,
                        self.tokenizer,
                        is_call=forced is not None,
                        thoughts=options.reasoning_parser,
                    ),
                    forced=forced,
                )
            )
        self._encode_texts(encoded, "conversation", Tokenizer.encode_chats)
        return encoded

    def _encode_texts(
        self, prompts: Seq[Encoded], noun: str, encode: Callable[[Tokenizer, Seq[str]], list[list[int]]]
    ) -> None:
        """Fill in the ids of the prompts that have none."""
        texts = {
            i: prompt.text
            for i, prompt in enumerate(prompts)
            if prompt.ids is None and prompt.text is not None
        }
        if not texts:
            return
        tokenizer = self.tokenizer
        waiting = iter(texts.items())
        while chunk := dict(itertools.islice(waiting, ENCODED_TOGETHER)):
            try:
                batch = encode(tokenizer, list(chunk.values()))
            except RequestError:
                for i, text in chunk.items():  # once more, one by one, to learn which it was
                    with _naming(f"{noun} {i}"):
                        encode(tokenizer, [text])
                raise
            for i, ids in zip(chunk, batch, strict=True):
                prompts[i].ids = np.array(ids, dtype=np.int32)

    def requests(
        self,
        prompts: Seq[Encoded],
        sampling_params: object,
        request_ids: Iterator[str],
        *,
        stream: bool,
        priority: object = 0,
        deadline_s: float | None = None,
    ) -> list[Request]:
        """Check every request; nothing is accepted yet.

        Args:
            sampling_params: for all prompts, or a list with one for each; fields not set take the
                checkpoint's defaults.
            request_ids: where the ids come from.
            stream: outputs as params.output_kind says; otherwise only the last one.
            priority: for all prompts, or a list with one for each; lower runs first.
            deadline_s: when the requests end at the latest; see `deadline`.

        Raises:
            RequestError, CapacityError: a prompt or parameter is invalid; the message names its index.
        """
        all_params = _one_each("sampling_params", sampling_params, len(prompts))
        priorities = _one_each("priority", priority, len(prompts))
        merged: dict[int, SamplingParams] = {}  # thousands of prompts usually share one
        requests = []
        for i, (prompt, params, rank) in enumerate(zip(prompts, all_params, priorities, strict=True)):
            if params is not None and not isinstance(params, SamplingParams):
                raise RequestError(f"sampling_params {i} is {show(params)}, expected SamplingParams")
            with _naming(f"prompt {i}"):
                complete = merged.get(id(params))
                if complete is None:
                    chosen = SamplingParams() if params is None else params
                    complete = merged[id(params)] = chosen.merged_with(self._loaded.defaults.sampling)
                request = self._loaded.engine.prepare(
                    next(request_ids),
                    prompt.ids,
                    complete,
                    prompt=prompt.text,
                    stream=stream,
                    priority=0 if rank is None else rank,
                    deadline_s=deadline_s,
                    cache_salt=prompt.cache_salt,
                    reader=prompt.reader,
                    preamble=prompt.preamble,
                    forced=prompt.forced,
                )
            requests.append(request)
        return requests

    def embedding_requests(
        self,
        prompts: Seq[Encoded],
        params: PoolingParams | None,
        request_ids: Iterator[str],
        *,
        priority: object = 0,
        deadline_s: float | None = None,
    ) -> list[Request]:
        """Check every request for an embedding; nothing is accepted yet.

        Args:
            params: of all of them; a pooling that it leaves open is the checkpoint's.
            The others: as `requests`.

        Raises:
            RequestError, CapacityError: a prompt or parameter is invalid; the message names its index.
            CheckpointError: the checkpoint's own pooling is none of pace's.
        """
        if params is not None and not isinstance(params, PoolingParams):
            raise RequestError(f"pooling_params is {show(params)}, expected PoolingParams")
        complete = PoolingParams() if params is None else params
        if complete.pooling is None:
            complete = replace(complete, pooling=read_pooling(self._loaded.directory))
        requests = []
        for i, (prompt, rank) in enumerate(
            zip(prompts, _one_each("priority", priority, len(prompts)), strict=True)
        ):
            with _naming(f"prompt {i}"):
                request = self._loaded.engine.prepare_embedding(
                    next(request_ids),
                    prompt.ids,
                    complete,
                    prompt=prompt.text,
                    priority=0 if rank is None else rank,
                    deadline_s=deadline_s,
                    cache_salt=prompt.cache_salt,
                )
            requests.append(request)
        return requests


def embedding_of(output: RequestOutput) -> EmbeddingRequestOutput:
    """The embedding that a request has led to.

    Raises:
        PaceError: it has led to none.
    """
    if output.embedding is None:
        (end,) = output.outputs
        raise PaceError(f"no embedding: {end.stop_reason or end.finish_reason}")
    return EmbeddingRequestOutput(
        output.request_id,
        EmbeddingOutput(output.embedding),
        output.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
    )


def _reader(
    template: str,
    prompt: str,
    continued: str | None,
    tools: Seq[Mapping[str, Any]] | None,
    options: ChatOptions,
) -> Callable[[], Reader] | None:
    """What divides the answers to a rendered conversation into reasoning, calls and final text; None: nothing."""
    if options.include_reasoning:
        return None
    functions = functions_of(tools or ())
    return answer_reader(
        template, prompt, continued, functions, options.tool_parser, options.reasoning_parser
    )


def _continued(messages: Messages, options: ChatOptions) -> str | None:
    """The beginning of the answer, where the last message is one."""
    if not options.continue_final_message:
        return None
    content = messages[-1].get("content")
    return content if isinstance(content, str) else ""


def n_chars(value: object, depth: int = 4) -> int:
    """About how much there is to encode: characters of all texts in a prompt or conversation, or ids.

    Args:
        depth: of nested lists and mappings that are looked at; a text part of a message is 4 deep.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return 0
    if depth == 0 or (value and isinstance(value[0], int)):
        return len(value)
    return sum(n_chars(part, depth - 1) for part in value)


def prompt_list(prompts: object) -> Seq[object]:
    """The prompts of a call that takes one or a list of them; an array or a tensor counts as its lists.

    Raises:
        RequestError: neither.
    """
    prompts = _plain(prompts)
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise RequestError(
            f"prompts is {show(prompts)}, expected a string, token ids, a dict, or a list of them"
        )
    return [prompts] if prompts and isinstance(_plain(prompts[0]), int) else prompts


def _plain(value: object) -> object:
    """Lists and numbers in place of an array or a tensor."""
    to_list = None if isinstance(value, type) else getattr(value, "tolist", None)
    return to_list() if callable(to_list) else value


def _parse_prompt(prompt: object, where: str) -> Encoded:
    if isinstance(prompt, str):
        return Encoded(None, prompt)
    prompt = _plain(prompt)
    if isinstance(prompt, (list, tuple)):
        return Encoded(prompt)
    if not isinstance(prompt, Mapping):
        raise RequestError(
            f'{where} is {show(prompt)}, expected text, token ids, {{"prompt": text}} or {{"prompt_token_ids": [...]}}'
        )
    prompt = {key: value for key, value in prompt.items() if value is not None or key not in VLLM_PROMPT_KEYS}
    unknown = [key for key in prompt if key not in PROMPT_KEYS]
    if unknown and unknown[0] in VLLM_PROMPT_KEYS:
        raise RequestError(
            f"{where} has the key {show(unknown[0])}, which pace does not have: it reads text only"
        )
    if unknown:
        raise RequestError(f"{where} has the key {show(unknown[0])}, expected {', '.join(PROMPT_KEYS)}")
    text, ids, salt = (prompt.get(key) for key in PROMPT_KEYS)
    if text is not None and not isinstance(text, str):
        raise RequestError(f"{where}: prompt is {show(text)}, expected a string")
    if text is None and ids is None:
        raise RequestError(f"{where} has neither prompt nor prompt_token_ids")
    return Encoded(ids, text, salt)


def _one_each(name: str, value: object, n: int) -> Seq[Any]:
    """A list with one value for each of n prompts, or one value for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * n
    if len(value) != n:
        raise RequestError(
            f"{name} has {len(value)} entries for {n} prompts; expected one for each, or a single one for all"
        )
    return value


def deadline(timeout_s: object) -> float | None:
    """When a request that is given `timeout_s` seconds from now on ends, in `time.monotonic()`.

    Raises:
        RequestError: not a number of seconds above 0.
    """
    if timeout_s is None:
        return None
    try:
        if isinstance(timeout_s, (bool, str, bytes)):
            raise TypeError
        seconds = float(timeout_s)  # type: ignore[arg-type]  # numpy scalars too; the except clause takes the rest
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(f"timeout_s is {show(timeout_s)}, expected seconds above 0, or None")
    return time.monotonic() + seconds


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """An error of one request says whose it is."""
    try:
        yield
    except PaceError as error:
        raise type(error)(f"{where}: {error}") from None
