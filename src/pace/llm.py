"""`LLM`: load a model, generate, chat, stream."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from pace.chat import ChatTemplate
from pace.config import EngineConfig, parse_cpus
from pace.engine.loader import Loaded, load
from pace.engine.sequence import Sequence
from pace.errors import ForkError, PaceError, RequestError, show
from pace.outputs import RequestOutput
from pace.params import SamplingParams
from pace.tokenizer import Tokenizer

__all__ = ["LLM", "Messages", "Prompt"]

Prompt = str | Mapping[str, Any]
"""Text, {"prompt": text} or {"prompt_token_ids": [...]} (optionally with the text it came from)."""

Messages = Seq[Mapping[str, Any]]
"""One conversation: [{"role": "user", "content": "..."}, ...]."""

Mailbox = deque[RequestOutput]


class LLM:
    """A model, ready to generate.

    One LLM may be used from many threads: their requests run together, a step at a time, driven by
    whichever caller waits. None of them changes another's output.

    Args:
        model: a checkpoint folder, a hub id `org/name`, or "demo" for the embedded model.
        revision: branch, tag or commit of a hub id.
        tokenizer: folder or hub id to take the tokenizer from; None: the model's own.
        trust_tokenizer: take a tokenizer whose patterns are not on the allow-list.
        skip_tokenizer_init: load no tokenizer: prompts are token ids, outputs have no text.
        max_model_len: longest prompt and output together, in tokens; None: what the checkpoint supports, or
            less where 40 % of the available memory do not hold one such sequence.
        max_num_seqs: sequences that run in one step.
        max_num_batched_tokens: tokens of one step; a longer prompt is read in several.
        threads: of the engine; None: PACE_THREADS, else min(affinity, cgroup quota, physical cores).
        cpus: CPUs to pin them to, as numbers or "0-3,8"; None: PACE_CPUS, else not pinned.
        kernels: {operator: tier or "reference"} to force, for bisecting.
        seed: seeds the requests that give none.
        show_progress: a progress bar on stderr while loading; None: where that is a terminal.

    Raises:
        ConfigError, CheckpointError, CapacityError: the model can't be loaded as asked; nothing stays behind.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        trust_tokenizer: bool = False,
        skip_tokenizer_init: bool = False,
        max_model_len: int | None = None,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 2048,
        threads: int | None = None,
        cpus: Seq[int] | str | None = None,
        kernels: Mapping[str, str] | None = None,
        seed: int = 0,
        show_progress: bool | None = None,
    ) -> None:
        config = EngineConfig(
            model=os.fspath(model),
            revision=revision,
            tokenizer=None if tokenizer is None else os.fspath(tokenizer),
            trust_tokenizer=trust_tokenizer,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            n_threads=threads,
            # The config checks the type of whatever else comes here.
            cpus=parse_cpus(cpus) if isinstance(cpus, str) else cpus,  # type: ignore[arg-type]
            kernels={} if kernels is None else kernels,
            seed=seed,
        )
        self._start(config, load(config, show_progress=show_progress, skip_tokenizer=skip_tokenizer_init))

    @classmethod
    def from_loaded(cls, config: EngineConfig, loaded: Loaded) -> LLM:
        """Wrap an engine that `engine.loader.load` has made."""
        self = cls.__new__(cls)
        self._start(config, loaded)
        return self

    def _start(self, config: EngineConfig, loaded: Loaded) -> None:
        self.config = config
        self.loaded = loaded
        self.engine = loaded.engine
        self._chat_template: ChatTemplate | None = None
        self._ids = itertools.count()
        self._pid = os.getpid()
        self._turn = threading.Condition()  # guards the four below
        self._stepping = False  # a thread is inside engine.step()
        self._closed = False
        self._mailboxes: dict[str, Mailbox] = {}  # by request id; many requests may share one

    # ---- generation ---------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams | None] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many together.

        Args:
            prompts: see `Prompt`; a list of them runs as one batch.
            sampling_params: for all prompts, or one for each; fields not set take the checkpoint's defaults.
            use_tqdm: a progress bar on stderr; None: where that is a terminal and there are several prompts.

        Returns:
            One output per prompt, in order. A request that failed while running has finish_reason "error"
            and the message as stop_reason; the others are unaffected.

        Raises:
            RequestError: a prompt or parameter is invalid; the message names its index, and nothing has run.
        """
        items = [prompts] if isinstance(prompts, (str, Mapping)) else prompts
        if not isinstance(items, (list, tuple)):
            raise RequestError(f"prompts is {show(prompts)}, expected a string, a dict, or a list of them")
        return self._run(self._encode(items), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Seq[Messages],
        sampling_params: SamplingParams | Seq[SamplingParams | None] | None = None,
        use_tqdm: bool | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many together, through the checkpoint's chat template.

        Args:
            messages: a conversation or a list of them.
            add_generation_prompt: end the prompt where the assistant's answer begins.
            chat_template: a jinja2 template instead of the checkpoint's.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages.
            RequestError: as `generate`.
        """
        if not isinstance(messages, (list, tuple)):
            raise RequestError(f"messages is {show(messages)}, expected a list of messages")
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [
            self._encode_chat(conversation, add_generation_prompt, chat_template)
            for conversation in conversations
        ]
        return self._run(prompts, sampling_params, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt token by token.

        Returns:
            An iterator of outputs whose text and token_ids grow; text that has been shown never changes.
            Closing or dropping the iterator ends the request.

        Raises:
            RequestError: the prompt or a parameter is invalid; raised here, not by the iterator.
        """
        (encoded,) = self._encode([prompt])
        (seq,) = self._prepare([encoded], sampling_params, stream=True)
        return self._stream(seq)

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
    ) -> Iterator[RequestOutput]:
        """`stream` for a conversation; arguments as `chat`."""
        encoded = self._encode_chat(messages, add_generation_prompt, chat_template)
        (seq,) = self._prepare([encoded], sampling_params, stream=True)
        return self._stream(seq)

    # ---- the rest of the surface
    # ----------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            RequestError: it was loaded without one.
        """
        if self.loaded.tokenizer is None:
            raise RequestError("this model was loaded without a tokenizer; give prompt_token_ids")
        return self.loaded.tokenizer

    def stats(self) -> dict[str, Any]:
        """Counters since the model was loaded; see `engine.core.EngineStats`."""
        stats = self.engine.stats
        pool = self.engine.scheduler.tables.pool
        return {
            "n_steps": stats.n_steps,
            "n_tokens": stats.n_tokens,
            "n_sampled": stats.n_sampled,
            "step_s": stats.step_s,
            "run_s": stats.run_s,
            "sample_s": stats.sample_s,
            "python_s": stats.python_s,
            "n_running": len(self.engine.scheduler.running),
            "n_blocks": pool.n_blocks,
            "n_free_blocks": pool.n_free,
        }

    def close(self) -> None:
        """End the engine's threads; requests in flight end with an error. Calling it again does nothing."""
        if os.getpid() != self._pid:
            return  # the threads belong to the parent
        with self._turn:
            self._turn.wait_for(lambda: not self._stepping)
            if not self._closed:
                self._closed = True
                self.loaded.team.close()
            self._turn.notify_all()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- from prompts to sequences
    # --------------------------------------------------------------------------

    def _encode(self, prompts: Seq[object]) -> list[tuple[Any, str | None]]:
        """Token ids and text of every prompt; texts are encoded together."""
        encoded: list[tuple[Any, str | None]] = []
        texts: dict[int, str] = {}
        for i, prompt in enumerate(prompts):
            text, ids = _parse_prompt(prompt, f"prompt {i}")
            encoded.append((ids, text))
            if ids is None and text is not None:
                texts[i] = text
        if texts:
            tokenizer = self.get_tokenizer()
            try:
                batch = tokenizer.encode_batch(list(texts.values()))
            except RequestError:
                for i, text in texts.items():  # once more, one by one, to learn which it was
                    with _naming(f"prompt {i}"):
                        tokenizer.encode(text)
                raise
            for i, ids in zip(texts, batch, strict=True):
                encoded[i] = ids, texts[i]
        return encoded

    def _encode_chat(
        self, messages: Messages, add_generation_prompt: bool, chat_template: str | None
    ) -> tuple[list[int], str]:
        tokenizer = self.get_tokenizer()
        if chat_template is not None:
            template = ChatTemplate(chat_template, special_tokens=tokenizer.special_tokens)
        else:
            if self._chat_template is None:
                self._chat_template = ChatTemplate.load(self.loaded.tokenizer_directory, tokenizer)
            template = self._chat_template
        text = template.render(messages, add_generation_prompt=add_generation_prompt)
        # The template has written the special tokens itself.
        return tokenizer.encode(text, add_special_tokens=False), text

    def _prepare(
        self,
        prompts: Seq[tuple[Any, str | None]],
        sampling_params: object,
        stream: bool = False,
    ) -> list[Sequence]:
        """Check every request; nothing is accepted yet."""
        all_params: Seq[object]
        if isinstance(sampling_params, (list, tuple)):
            if len(sampling_params) != len(prompts):
                raise RequestError(
                    f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts; "
                    "expected one for each, or a single one for all"
                )
            all_params = sampling_params
        else:
            all_params = [sampling_params] * len(prompts)
        merged: dict[int, SamplingParams] = {}
        sequences = []
        for i, ((ids, text), params) in enumerate(zip(prompts, all_params, strict=True)):
            if params is not None and not isinstance(params, SamplingParams):
                raise RequestError(f"sampling_params {i} is {show(params)}, expected SamplingParams")
            with _naming(f"prompt {i}"):
                if id(params) not in merged:  # thousands of prompts usually share one
                    chosen = SamplingParams() if params is None else params
                    merged[id(params)] = chosen.merged_with(self.loaded.defaults.sampling)
                request_id = str(next(self._ids))
                complete = merged[id(params)]
                sequences.append(self.engine.prepare(request_id, ids, complete, prompt=text, stream=stream))
        return sequences

    # ---- driving the engine
    # -----------------------------------------------------------------------------------

    def _run(
        self, prompts: Seq[tuple[Any, str | None]], sampling_params: object, use_tqdm: bool | None
    ) -> list[RequestOutput]:
        sequences = self._prepare(prompts, sampling_params)
        if use_tqdm is None:
            use_tqdm = len(sequences) > 1 and sys.stderr.isatty()
        mailbox: Mailbox = deque()
        done: dict[str, RequestOutput] = {}
        with self._accepted(sequences, mailbox), _bar(len(sequences), use_tqdm) as bar:
            while len(done) < len(sequences):
                self._wait(mailbox)
                while mailbox:
                    output = mailbox.popleft()
                    done[output.request_id] = output
                    if bar is not None:
                        bar.update()
        return [done[seq.request_id] for seq in sequences]

    def _stream(self, seq: Sequence) -> Iterator[RequestOutput]:
        mailbox: Mailbox = deque()
        with self._accepted([seq], mailbox):
            finished = False
            while not finished:
                self._wait(mailbox)
                while mailbox:
                    output = mailbox.popleft()
                    finished = output.finished
                    yield output

    def _accepted(self, sequences: list[Sequence], mailbox: Mailbox) -> AbstractContextManager[None]:
        return _Accepted(self, sequences, mailbox)

    def _wait(self, mailbox: Mailbox) -> None:
        """Return when the mailbox holds something, or after a step that did not fill it.

        One of the waiting threads runs the step, for everybody's requests; the others sleep until it is over.
        """
        self._check_usable()
        with self._turn:
            while self._stepping and not mailbox:
                self._turn.wait()
            if mailbox:
                return
            self._check_usable()
            self._stepping = True
        outputs: list[RequestOutput] = []
        try:
            outputs = self.engine.step()
        finally:
            with self._turn:
                self._stepping = False
                for output in outputs:
                    box = self._mailboxes.get(output.request_id)
                    if box is not None:
                        box.append(output)
                self._turn.notify_all()

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkError("this LLM belongs to the parent process; build it after the fork, or use spawn")
        if self._closed:
            raise PaceError("this LLM is closed")


class _Accepted:
    """Requests are in the engine inside the with block; what has not finished at its end is aborted."""

    def __init__(self, llm: LLM, sequences: list[Sequence], mailbox: Mailbox) -> None:
        self.llm, self.sequences, self.mailbox = llm, sequences, mailbox

    def __enter__(self) -> None:
        self.llm._check_usable()
        with self.llm._turn:
            for seq in self.sequences:
                self.llm._mailboxes[seq.request_id] = self.mailbox
        for seq in self.sequences:
            self.llm.engine.submit(seq)

    def __exit__(self, *exception: object) -> None:
        if os.getpid() != self.llm._pid:
            return  # a generator that a forked child inherited; the lock may be held by a thread it hasn't
        with self.llm._turn:
            for seq in self.sequences:
                self.llm._mailboxes.pop(seq.request_id, None)
        for seq in self.sequences:
            if seq.finish_reason is None:
                self.llm.engine.abort(seq.request_id)


def _parse_prompt(prompt: object, where: str) -> tuple[str | None, Any]:
    """Text and token ids of a prompt; exactly one of them may be None."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        raise RequestError(
            f'{where} is {show(prompt)}, expected text, {{"prompt": text}} or {{"prompt_token_ids": [...]}}'
        )
    unknown = [key for key in prompt if key not in ("prompt", "prompt_token_ids")]
    if unknown:
        raise RequestError(f"{where} has the key {show(unknown[0])}, expected prompt or prompt_token_ids")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"{where}: prompt is {show(text)}, expected a string")
    if text is None and ids is None:
        raise RequestError(f"{where} has neither prompt nor prompt_token_ids")
    return text, ids


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """An error of one request says whose it is."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


def _bar(n_prompts: int, show_bar: bool) -> AbstractContextManager[Any]:
    if not show_bar:
        return nullcontext()
    from tqdm import tqdm  # comes with tokenizers' huggingface_hub; most imports of pace need not pay for it

    bar: AbstractContextManager[Any] = tqdm(total=n_prompts, desc="generating", unit="prompt", leave=False)
    return bar
