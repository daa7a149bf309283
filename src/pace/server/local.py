"""An engine in the server's own process: for tests, notebooks, and programs that mount the app into theirs."""

from __future__ import annotations

import asyncio
from typing import Any

from pace.errors import PaceError
from pace.server.backend import Backend, Call, Health
from pace.server.station import Station
from pace.server.wire import Detokenize, Job, Tokenize

__all__ = ["LocalBackend"]


class LocalBackend(Backend):
    """Serves one `Station`; made in the event loop that will use it."""

    def __init__(self, station: Station) -> None:
        super().__init__()
        self._station = station
        self.info = station.info()
        station.open(asyncio.get_running_loop(), self.dispatch)

    def submit(self, job: Job, call: Call) -> None:
        """See `Backend`."""
        self._calls[job.id] = call
        self._station.submit(job)

    def abort(self, number: int) -> None:
        """See `Backend`."""
        self.forget(number)
        self._station.abort(number)

    def send_question(self, question: Tokenize | Detokenize) -> None:
        """See `Backend`."""
        if isinstance(question, Tokenize):
            self._station.tokenize(question)
        else:
            self._station.detokenize(question)

    def health(self) -> Health:
        """See `Backend`."""
        try:
            self._station.check()
        except PaceError as error:
            return Health(False, False, str(error))
        return Health(True, True)

    def stats(self) -> list[dict[str, Any]]:
        """See `Backend`."""
        return [self._station.beat()]

    async def close(self) -> None:
        """See `Backend`."""
        await asyncio.get_running_loop().run_in_executor(None, self._station.close)
