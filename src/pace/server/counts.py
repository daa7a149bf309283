"""How many tokens a request took."""

from __future__ import annotations

from typing import Any

from pace.server.protocol.common import PromptDetails, Usage
from pace.server.wire import Accepted, Done

__all__ = ["Counts"]


class Counts:
    """Adds up the tokens of a request's jobs."""

    def __init__(self, accepted: list[Accepted | None]) -> None:
        self.n_prompt = sum(one.n_prompt for one in accepted if one is not None)
        self.n_output = 0
        self.n_cached = 0
        self.speculative: dict[str, Any] | None = None

    def done(self, done: Done) -> None:
        """A job has ended."""
        self.n_cached += done.n_cached
        if done.speculative is not None:
            self.speculative = done.speculative

    def usage(self) -> Usage:
        """In OpenAI's shape."""
        return Usage(
            self.n_prompt, self.n_output, self.n_prompt + self.n_output, PromptDetails(self.n_cached)
        )
