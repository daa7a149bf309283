"""`LLM`: load a model, generate, chat, stream, embed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from pace.console import progress_bar
from pace.driver import Inbox, Ticket
from pace.engine.request import Request
from pace.errors import PaceError, RequestError, show
from pace.frontend import Frontend
from pace.inputs import ChatOptions, Encoded, Messages, Prompt, deadline, embedding_of, prompt_list
from pace.outputs import EmbeddingRequestOutput, RequestOutput
from pace.params import SamplingParams
from pace.pooling_params import PoolingParams
from pace.vllm_names import REQUEST_OPTIONS, takes_names

__all__ = ["LLM", "Messages", "Prompt"]

UseTqdm = bool | Callable[..., Any] | None


class LLM(Frontend):
    """A model, ready to generate.

    One LLM may be used from many threads: their requests run together, a step at a time, while any of them
    waits. None of them changes another's output.
    """

    _on_demand = True

    @takes_names(REQUEST_OPTIONS)
    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams | None] | None = None,
        use_tqdm: UseTqdm = None,
        *,
        priority: int | Seq[int] = 0,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many together.

        Args:
            prompts: see `Prompt`; a list of them, however long, runs as one batch. A list of ints is one prompt.
            sampling_params: for all prompts, or one for each; fields not set take the checkpoint's defaults.
                The output kind does not matter here.
            use_tqdm: a progress bar on stderr, or what makes one in tqdm's place; None: where stderr is a terminal and
                there are several prompts.
            priority: for all prompts, or one for each; lower runs first.
            timeout_s: what has not finished after so many seconds ends with finish_reason "abort" and
                stop_reason "deadline".

        Returns:
            One output per prompt, in order. A request that failed while running has finish_reason "error"
            and the message as stop_reason; the others are unaffected.

        Raises:
            RequestError, CapacityError: a prompt or parameter is invalid; the message names its index, and
                nothing has run.
            EngineDeadError: the engine failed as a whole.
        """
        self._driver.check()
        return self._run(
            self._inputs.encode(prompt_list(prompts)), sampling_params, use_tqdm, priority, timeout_s
        )

    @takes_names(REQUEST_OPTIONS)
    def chat(
        self,
        messages: Messages | Seq[Messages],
        sampling_params: SamplingParams | Seq[SamplingParams | None] | None = None,
        use_tqdm: UseTqdm = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Seq[Mapping[str, Any]] | None = None,
        include_reasoning: bool = False,
        tool_choice: str | Mapping[str, Any] | None = None,
        tool_parser: str | None = None,
        priority: int | Seq[int] = 0,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many together, through the checkpoint's chat template.

        Args:
            messages: a conversation or a list of them.
            add_generation_prompt: end the prompt where the assistant's answer begins; None: unless the last message is
                continued.
            continue_final_message: end the prompt inside the last message, which the output continues.
            chat_template: the name of one of the checkpoint's templates, or a jinja2 template; None: the checkpoint's
                default, or "tool_use" where there are tools and it has one.
            chat_template_kwargs: further variables of the template, such as {"enable_thinking": False}.
            tools: JSON schemas of functions that the model may call, as its template wants them.
            include_reasoning: the text is all that the model writes; otherwise it is the final answer, what the model
                thinks before it is the output's `reasoning`, and calls of the tools are its `tool_calls`.
            tool_choice: "auto" (None): the model calls tools where it wants to; "none": it is told of none; "required": its
                answer is calls; {"type": "function", "function": {"name": ...}}: it is one of this one.
            tool_parser: the form of its calls, see docs/tools-and-structure.md; None: what its template shows.

        The other arguments are those of `generate`.

        Raises:
            ChatTemplateError: there is no template, or it is malformed or failed.
            RequestError: a message or an option has a wrong form, or the template refuses it; else as `generate`.
            CapacityError, EngineDeadError: as `generate`.
        """
        self._driver.check()
        if not isinstance(messages, (list, tuple)):
            raise RequestError(f"messages is {show(messages)}, expected a list of messages")
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        options = ChatOptions(
            add_generation_prompt,
            continue_final_message,
            chat_template,
            chat_template_kwargs,
            tools,
            include_reasoning,
            tool_choice,
            tool_parser,
        )
        prompts = self._inputs.encode_chats(conversations, options)
        return self._run(prompts, sampling_params, use_tqdm, priority, timeout_s)

    @takes_names(REQUEST_OPTIONS)
    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Complete one prompt token by token.

        The engine runs while the iterator waits for the next token. When other callers let it run further,
        the next output tells of several tokens at once.

        Returns:
            A generator of outputs, of the kind that sampling_params.output_kind says: the whole output so
            far (CUMULATIVE, the default), what is new (DELTA), or the last one only (FINAL_ONLY). Text that
            has been shown never changes. Closing or dropping the iterator ends the request.

        Raises:
            RequestError, CapacityError: the prompt or a parameter is invalid; raised here, not by the
                iterator.
            QueueFullError, EngineDeadError: raised by the iterator.
        """
        self._driver.check()
        return self._stream(self._inputs.encode([prompt]), sampling_params, priority, timeout_s)

    @takes_names(REQUEST_OPTIONS)
    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Seq[Mapping[str, Any]] | None = None,
        include_reasoning: bool = False,
        tool_choice: str | Mapping[str, Any] | None = None,
        tool_parser: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """`stream` for a conversation; arguments as `chat`."""
        self._driver.check()
        options = ChatOptions(
            add_generation_prompt,
            continue_final_message,
            chat_template,
            chat_template_kwargs,
            tools,
            include_reasoning,
            tool_choice,
            tool_parser,
        )
        prompts = self._inputs.encode_chats([messages], options)
        return self._stream(prompts, sampling_params, priority, timeout_s)

    @takes_names(REQUEST_OPTIONS)
    def embed(
        self,
        prompts: Prompt | Seq[Prompt],
        use_tqdm: UseTqdm = None,
        *,
        pooling_params: PoolingParams | None = None,
        priority: int | Seq[int] = 0,
        timeout_s: float | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Turn one text or many into vectors.

        An embedding is made of the hidden states behind the model's last norm, in the bits that it has alone, whatever runs
        beside it.

        Args:
            prompts: as `generate`; a prompt may fill max_model_len.
            use_tqdm: as `generate`.
            pooling_params: for all prompts; None: the checkpoint's own pooling, else that of the last token, normalised.
            priority: as `generate`.
            timeout_s: as `generate`; prompts that were not read in time are an error.

        Returns:
            One embedding per prompt, in order.

        Raises:
            RequestError, CapacityError: as `generate`.
            CheckpointError: the checkpoint asks for a pooling that pace does not have.
            PaceError: there is no embedding of a prompt; the message names its index.
            EngineDeadError: the engine failed as a whole.
        """
        self._driver.check()
        requests = self._inputs.embedding_requests(
            self._inputs.encode(prompt_list(prompts)),
            pooling_params,
            map(str, self._ids),
            priority=priority,
            deadline_s=deadline(timeout_s),
        )
        embeddings = []
        for i, output in enumerate(self._wait_for(requests, use_tqdm)):
            try:
                embeddings.append(embedding_of(output))
            except PaceError as error:
                raise PaceError(f"prompt {i}: {error}") from None
        return embeddings

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(
        self,
        prompts: Seq[Encoded],
        sampling_params: object,
        use_tqdm: UseTqdm,
        priority: object,
        timeout_s: object,
    ) -> list[RequestOutput]:
        requests = self._inputs.requests(
            prompts,
            sampling_params,
            map(str, self._ids),
            stream=False,
            priority=priority,
            deadline_s=deadline(timeout_s),
        )
        return self._wait_for(requests, use_tqdm)

    def _wait_for(self, requests: Seq[Request], use_tqdm: UseTqdm) -> list[RequestOutput]:
        """Let requests run; returns their last outputs, in order."""
        inbox: Inbox = SimpleQueue()
        notify = inbox.put
        tickets = [Ticket(request, notify) for request in requests]
        done: dict[str, RequestOutput] = {}
        if use_tqdm is None and len(tickets) < 2:
            use_tqdm = False
        try:
            with _Progress(len(tickets), use_tqdm) as progress:
                # max_num_waiting does not bound them: they are in memory already, and in one queue the callers of all
                # threads are served in order.
                for ticket in tickets:
                    self._driver.submit(ticket, bounded=False)
                while len(done) < len(tickets):
                    for ticket in self._driver.wait(inbox):
                        output = ticket.take()
                        if output is not None:
                            done[output.request_id] = output
                            progress.add(output)
        except BaseException:
            self._give_up(tickets, inbox)
            raise
        return [done[ticket.request_id] for ticket in tickets]

    def _give_up(self, tickets: list[Ticket], inbox: Inbox) -> None:
        """End all these requests, and return when the engine has: in a step or two."""
        for ticket in tickets:
            self._driver.drop(ticket)
        with suppress(PaceError):
            while any(map(self._driver.holds, tickets)):
                self._driver.wait(inbox)

    def _stream(
        self, prompts: Seq[Encoded], params: SamplingParams | None, priority: object, timeout_s: object
    ) -> Generator[RequestOutput, None, None]:
        (request,) = self._inputs.requests(
            prompts,
            params,
            map(str, self._ids),
            stream=True,
            priority=priority,
            deadline_s=deadline(timeout_s),
        )
        inbox: Inbox = SimpleQueue()
        return self._outputs(Ticket(request, inbox.put), inbox)

    def _outputs(self, ticket: Ticket, inbox: Inbox) -> Generator[RequestOutput, None, None]:
        try:
            self._driver.submit(ticket)
            finished = False
            while not finished:
                self._driver.wait(inbox)
                output = ticket.take()
                if output is not None:
                    finished = output.finished
                    yield output
        finally:
            self._driver.drop(ticket)


class _Progress:
    """A bar of finished prompts with tokens per second."""

    def __init__(self, n_prompts: int, show: UseTqdm) -> None:
        self._n_prompts = n_prompts
        self._show = show
        self._bar: Any = None
        self._start_s = 0.0
        self._n_input = self._n_output = 0

    def __enter__(self) -> _Progress:
        self._bar = progress_bar(
            self._show, total=self._n_prompts, desc="generating", unit="prompt", leave=False
        )
        self._start_s = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, output: RequestOutput) -> None:
        """One prompt has finished."""
        if self._bar is not None:
            self._n_input += output.metrics.n_prompt_tokens
            self._n_output += output.metrics.n_output_tokens
            seconds = time.perf_counter() - self._start_s
            rates = f"in {self._n_input / seconds:.0f} tok/s, out {self._n_output / seconds:.0f} tok/s"
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update()
