"""What the front-end and an engine say to each other: over a socket where the engine is a child, directly otherwise.

Every message is a msgpack array with a tag, its length before it (4 bytes, little endian). The fields are plain data: no
message can carry code, and what does not fit its type ends the connection.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

__all__ = [
    "Abort",
    "Accepted",
    "Answer",
    "Beat",
    "Chat",
    "Configure",
    "Delta",
    "Detokenize",
    "Done",
    "Embedded",
    "Event",
    "Failed",
    "Frames",
    "Info",
    "Job",
    "Order",
    "Parsers",
    "Pooling",
    "Refused",
    "Scores",
    "TokenLogprob",
    "Tokenize",
    "ToolCallDelta",
    "frame",
]

MAX_FRAME = 1 << 30  # bytes; 200 000 log probabilities for each of 1000 tokens stay below it


class Message(msgspec.Struct, array_like=True, tag_field="kind"):
    """Base of everything that is sent."""


# ---- front-end -> engine ----------------------------------------------------------------------------------


class Chat(msgspec.Struct, array_like=True):
    """A conversation, and how it becomes a prompt; fields as `LLM.chat`."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool = False
    tool_choice: str | dict[str, Any] | None = None


class Pooling(msgspec.Struct, array_like=True):
    """Fields of `PoolingParams`."""

    pooling: str | None = None
    normalize: bool = True
    dimensions: int | None = None


class Job(Message, tag=1):
    """Complete one prompt, or embed it.

    Attributes:
        id: the front-end's number for it; never used twice.
        request_id: as the engine's log and the client know it.
        prompt: text or token ids; None where there is a chat.
        chat: a conversation in place of a prompt.
        params: fields of `SamplingParams`.
        returns_prompt: send the prompt's text and ids back in `Accepted`.
        pooling: embed the prompt; `params` are empty then.
        one_by_one: every token has a `Delta` of its own, also those that one step accepts together.
    """

    id: int
    request_id: str
    prompt: str | list[int] | None
    chat: Chat | None
    params: dict[str, Any]
    priority: int = 0
    cache_salt: str | None = None
    returns_prompt: bool = False
    pooling: Pooling | None = None
    one_by_one: bool = False


class Abort(Message, tag=2):
    """End a job; nothing is said about it any more."""

    id: int


class Tokenize(Message, tag=3):
    """What token ids is this? The answer is [ids, their texts]."""

    id: int
    prompt: str | None
    chat: Chat | None
    add_special_tokens: bool = True
    returns_texts: bool = False


class Detokenize(Message, tag=4):
    """What text is this? The answer is the text."""

    id: int
    token_ids: list[int]


class Parsers(msgspec.Struct, array_like=True):
    """The forms of tool calls and reasoning; None: what the chat template shows."""

    tools: str | None = None
    reasoning: str | None = None


class Configure(Message, tag=5):
    """The first message to a child: what to load.

    Attributes:
        config: the fields of `EngineConfig`.
        cpus: that it may use; []: any.
        talks: it tells the terminal how loading goes; one of several engines does.
        parsers: how it reads answers.
    """

    config: dict[str, Any]
    cpus: list[int]
    talks: bool
    parsers: Parsers


Order: TypeAlias = Job | Abort | Tokenize | Detokenize | Configure


# ---- engine -> front-end ----------------------------------------------------------------------------------


class TokenLogprob(msgspec.Struct, array_like=True):
    """A token's log probability, its text and its bytes (which are no whole character where the text is "")."""

    token_id: int
    logprob: float
    text: str
    data: bytes


class ToolCallDelta(msgspec.Struct, array_like=True):
    """What is new of a `ToolCall`."""

    index: int
    id: str
    name: str
    arguments: str


class Accepted(Message, tag=10):
    """A job's prompt and parameters are valid, and it has been queued."""

    id: int
    n_prompt: int
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None


class Refused(Message, tag=11):
    """A job or question was not accepted; `error` is the name of a class in `pace.errors`."""

    id: int
    error: str
    message: str


class Delta(Message, tag=12):
    """What is new of one completion; of its `logprobs`, each token's own comes first."""

    id: int
    index: int
    text: str
    token_ids: list[int]
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    logprobs: list[list[TokenLogprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    is_request_error: bool = False


class Scores(Message, tag=13):
    """Log probabilities of the prompt's tokens; None for the first."""

    id: int
    logprobs: list[list[TokenLogprob] | None]


class Done(Message, tag=14):
    """All completions of a job have ended: its counts, and its times in seconds since the engine had it."""

    id: int
    n_prompt: int
    n_cached: int
    n_output: int
    queue_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    speculative: dict[str, Any] | None = None


class Failed(Message, tag=15):
    """A job that had been accepted has no further output, for a reason that is not its own."""

    id: int
    message: str


class Answer(Message, tag=16):
    """To a question."""

    id: int
    value: Any


class Info(Message, tag=17):
    """The engine is ready: facts about it, and the first counters."""

    pid: int
    model: str
    max_model_len: int
    facts: dict[str, Any]
    stats: dict[str, Any]


class Beat(Message, tag=18):
    """The engine's process lives: its counters."""

    stats: dict[str, Any]


class Embedded(Message, tag=19):
    """The embedding of a prompt, f32 in little endian; `Done` follows."""

    id: int
    n_prompt: int
    data: bytes


Event: TypeAlias = Accepted | Refused | Delta | Scores | Done | Failed | Answer | Info | Beat | Embedded

_encoder = msgspec.msgpack.Encoder()


def frame(messages: list[Any]) -> bytes:
    """Messages as bytes, with the length before them."""
    body = _encoder.encode(messages)
    return len(body).to_bytes(4, "little") + body


class Frames:
    """Takes a stream of bytes apart again.

    Args:
        kind: the union of what may come.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(list[kind])
        self._held = bytearray()

    def push(self, data: bytes) -> list[Any]:
        """The messages that are complete with `data`.

        Raises:
            ValueError: it is no such message.
        """
        self._held += data
        messages: list[Any] = []
        while len(self._held) >= 4:
            end = 4 + int.from_bytes(self._held[:4], "little")
            if end > MAX_FRAME:
                raise ValueError(f"a message of {end} bytes, expected at most {MAX_FRAME}")
            if len(self._held) < end:
                break
            messages += self._decoder.decode(memoryview(self._held)[4:end].tobytes())
            del self._held[:end]
        return messages
