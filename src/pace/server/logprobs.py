"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pace.server.protocol.chat import ChatLogprobs, TokenEntry, TopEntry
from pace.server.protocol.completions import Logprobs
from pace.server.wire import TokenLogprob

__all__ = ["chat_logprobs", "completion_logprobs", "prompt_logprobs", "token_text"]


def token_text(entry: TokenLogprob) -> str:
    r"""A token's text; of one that is no whole character its bytes, as `bytes:\xe2\x80`, which OpenAI writes too."""
    if entry.text or not entry.data:
        return entry.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.data)


def completion_logprobs(
    positions: Sequence[Sequence[TokenLogprob] | None], offset: int, n_top: int, first: str = ""
) -> Logprobs:
    """Entries of a text's tokens.

    Args:
        positions: for each token its entries, its own first; None: nothing predicts it.
        offset: characters of the text before them.
        n_top: most probable tokens that were asked for; the drawn one comes beside them.
        first: text of a token that nothing predicts.
    """
    tokens: list[str] = []
    own: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entries in positions:
        offsets.append(offset)
        if entries is None:
            tokens.append(first)
            own.append(None)
            tops.append(None)
            offset += len(first)
            continue
        chosen = entries[0]
        tokens.append(token_text(chosen))
        own.append(chosen.logprob)
        top = {token_text(chosen): chosen.logprob}
        for entry in entries[1 : n_top + 1]:
            top.setdefault(token_text(entry), entry.logprob)
        tops.append(top)
        offset += len(chosen.text)
    return Logprobs(tokens, own, tops, offsets)


def chat_logprobs(positions: Sequence[Sequence[TokenLogprob]], n_top: int) -> ChatLogprobs:
    """Entries of an answer's tokens; `top_logprobs` holds the n_top most probable ones, the drawn one only if it is one of
    them."""
    content = []
    for entries in positions:
        chosen = entries[0]
        best = sorted(entries, key=lambda entry: -entry.logprob)[:n_top]
        content.append(
            TokenEntry(
                token_text(chosen),
                chosen.logprob,
                list(chosen.data),
                [TopEntry(token_text(entry), entry.logprob, list(entry.data)) for entry in best],
            )
        )
    return ChatLogprobs(content)


def prompt_logprobs(positions: Sequence[Sequence[TokenLogprob] | None]) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each token {id: {logprob, decoded_token}}."""
    return [
        None
        if entries is None
        else {
            str(entry.token_id): {"logprob": entry.logprob, "decoded_token": entry.text} for entry in entries
        }
        for entries in positions
    ]
