"""`/v1/completions`."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pace.server.backend import Call
from pace.server.counts import Counts
from pace.server.http import json_response
from pace.server.logprobs import completion_logprobs, prompt_logprobs
from pace.server.protocol.completions import Choice, Completion, CompletionRequest, Logprobs
from pace.server.requests import completion_params, id_of, one_by_one, prompts_of
from pace.server.service import FINGERPRINT, Service
from pace.server.sse import DONE, EventStream, TextEvents, event
from pace.server.wire import Delta, Done, Event, Job, Scores, TokenLogprob

__all__ = ["completions"]


class _Writer:
    """Writes the answer to one request, in chunks or as a whole.

    Args:
        wants_output: False: the request is for its prompt's scores, and the one token that was drawn is left out.
    """

    def __init__(
        self, request: CompletionRequest, call: Call, model: str, number: str, wants_output: bool
    ) -> None:
        self.counts = Counts(call.accepted)
        self._request = request
        self._call = call
        self._model = model
        self._number = f"cmpl-{number}"
        self._created = int(time.time())
        self._n = request.n or 1
        self._wants_output = wants_output
        self._offsets: dict[int, int] = {}  # characters of each choice so far
        self._scores: dict[int, list[list[TokenLogprob] | None]] = {}  # by prompt
        self._whole: dict[int, Choice] = {}
        options = request.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._text_event = TextEvents()
        self._is_plain = wants_output and not (
            request.echo
            or request.return_token_ids
            or request.logprobs is not None
            or request.prompt_logprobs is not None
            or self._usage_always
        )

    # ---- in chunks ----------------------------------------------------------------------------------------

    def chunk(self, one: Event) -> bytes:
        """What the client is told of an event."""
        if self._is_plain and isinstance(one, Delta) and one.finish_reason is None:
            self.counts.n_output += len(one.token_ids)
            index = self._call.positions[one.id] * self._n + one.index
            return self._text_event(self._text_chunk, index, one.text)
        choice = self._choice(one)
        return b"" if choice is None else event(self._chunk(choice))

    def _text_chunk(self, index: int, text: str) -> Completion:
        return self._chunk(Choice(index, text, None, None, None))

    def _chunk(self, choice: Choice) -> Completion:
        chunk = self._completion([choice])
        if self._usage_always:
            chunk.usage = self.counts.usage()
        elif self._usage_at_end:
            chunk.usage = None
        return chunk

    def end(self) -> bytes:
        """The end of the stream."""
        if not self._usage_at_end:
            return DONE
        chunk = self._completion([])
        chunk.usage = self.counts.usage()
        if self.counts.speculative is not None:
            chunk.speculative = self.counts.speculative
        return event(chunk) + DONE

    # ---- as a whole ---------------------------------------------------------------------------------------

    def add(self, one: Event) -> None:
        """Keep what an event says."""
        choice = self._choice(one)
        if choice is None:
            return
        whole = self._whole.setdefault(choice.index, choice)
        if whole is not choice:
            whole.text += choice.text
            whole.finish_reason, whole.stop_reason = choice.finish_reason, choice.stop_reason
            if whole.logprobs is not None and choice.logprobs is not None:
                _extend(whole.logprobs, choice.logprobs)
            if self._request.return_token_ids:
                whole.token_ids += choice.token_ids  # type: ignore[operator]  # both are set

    def whole(self) -> Completion:
        """The answer."""
        completion = self._completion([self._whole[index] for index in sorted(self._whole)])
        completion.usage = self.counts.usage()
        if self.counts.speculative is not None:
            completion.speculative = self.counts.speculative
        return completion

    # ---- both ---------------------------------------------------------------------------------------------

    def _completion(self, choices: list[Choice]) -> Completion:
        return Completion(self._number, self._created, self._model, choices, system_fingerprint=FINGERPRINT)

    def _choice(self, one: Event) -> Choice | None:
        """What an event adds to a choice; None: nothing."""
        if isinstance(one, Scores):
            self._scores[one.id] = one.logprobs
        elif isinstance(one, Done):
            self.counts.done(one)
        elif isinstance(one, Delta):
            return self._delta(one)
        return None

    def _delta(self, one: Delta) -> Choice | None:
        request = self._request
        text, positions, token_ids = one.text, list(one.logprobs or ()), one.token_ids
        if not self._wants_output:
            if one.finish_reason is None:
                return None
            text, positions, token_ids = "", [], []
        self.counts.n_output += len(token_ids)
        index = self._call.positions[one.id] * self._n + one.index
        is_new = index not in self._offsets
        offset = self._offsets.get(index, 0)
        prompt, scored = self._echo(one.id) if is_new and request.echo else ("", None)
        logprobs: Logprobs | None = None
        if request.logprobs is not None:
            logprobs = completion_logprobs(positions, offset + len(prompt), request.logprobs)
            if scored is not None:
                _extend(scored, logprobs)
                logprobs = scored
        self._offsets[index] = offset + len(prompt) + len(text)
        choice = Choice(index, prompt + text, logprobs, one.finish_reason, one.stop_reason)
        if request.return_token_ids:
            choice.token_ids = token_ids
            if is_new:
                choice.prompt_token_ids = self._accepted(one.id).prompt_token_ids or []
        if is_new and request.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(self._scores.get(one.id, []))
        return choice

    def _echo(self, number: int) -> tuple[str, Logprobs | None]:
        """The prompt's text and log probabilities."""
        prompt = self._accepted(number).prompt or ""
        scores = self._scores.get(number)
        if scores is None or self._request.logprobs is None:
            return prompt, None
        rest = sum(len(entries[0].text) for entries in scores if entries is not None)
        first = prompt[: max(0, len(prompt) - rest)]
        return prompt, completion_logprobs(scores, 0, self._request.logprobs, first)

    def _accepted(self, number: int) -> Any:
        return self._call.accepted[self._call.positions[number]]


def _extend(logprobs: Logprobs, more: Logprobs) -> None:
    logprobs.tokens += more.tokens
    logprobs.token_logprobs += more.token_logprobs
    logprobs.top_logprobs += more.top_logprobs
    logprobs.text_offset += more.text_offset


async def completions(service: Service, http: HttpRequest) -> Response:
    """Continue prompts."""
    request = await service.read(http, CompletionRequest)
    model = service.check_model(request.model)
    service.check_n(request.n)
    params, wants_output = completion_params(request)
    prompts = prompts_of(request)
    number = id_of(request.request_id, http.scope["pace.id"])
    returns_prompt = bool(request.echo or request.return_token_ids)

    def jobs(call: Call) -> list[Job]:
        return [
            Job(
                job_id,
                number,
                prompt,
                None,
                params,
                request.priority or 0,
                request.cache_salt,
                returns_prompt,
                one_by_one=one_by_one(request),
            )
            for job_id, prompt in zip(call.ids, prompts, strict=True)
        ]

    call = await service.call(http, jobs, len(prompts))
    writer = _Writer(request, call, model, number, wants_output)
    if request.stream:
        return EventStream(call, service.slow, b"", writer.chunk, writer.end)
    await service.collect(call, writer.add)
    return json_response(writer.whole())
