"""The library's front door: load a model, generate, chat, read documents, ask them."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thresher.attention import DEFAULT_ATTENTION
from thresher.attention.base import AttentionMethod
from thresher.attention.dense import Dense
from thresher.attention.registry import parse_method
from thresher.attention.sparse import SparseMethod
from thresher.cache.format import Identity, KVFileInfo
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner
from thresher.decoding.sampling import SamplingParams
from thresher.engine.completion import Completion, collect
from thresher.engine.documents import (
    Context,
    open_document,
    read_document,
    read_into_file,
    save_document,
    source_of,
)
from thresher.engine.engine import Engine, Stream
from thresher.engine.framing import (
    FRAMINGS,
    conversation_tokens,
    default_framing,
    document_tokens,
    prompt_tokens,
    question_tokens,
)
from thresher.engine.memory import MemoryAccount
from thresher.engine.requests import Event, Request, indexed_method
from thresher.engine.scheduler import PASS_SECONDS, Scheduler
from thresher.errors import CapacityError, UsageError
from thresher.machine.memory import available_memory
from thresher.models.load import load, same_tokens
from thresher.models.resolve import DEFAULT_MODEL, resolve
from thresher.speculation.drafters import DraftModel
from thresher.speculation.settings import Speculation, parse_speculation
from thresher.speculation.speculator import AUTO

__all__ = ["LLM", "Completion", "Context"]

DENSE = Dense()
Prompts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | Sequence[str | Sequence[int]]
Messages = Sequence[Mapping[str, str]]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model with its attention method and KV budget. Any number of threads may use it at once.

    >>> llm = LLM()
    >>> context = llm.read(open("book.txt").read(), path="book.kv")
    >>> llm.ask(context, ["Who speaks first?"])[0][0].text
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        attention: str | AttentionMethod | None = None,
        speculate: str | Speculation | None = None,
        weights: str = "bf16",
        kv_budget: int | None = None,
        chunk_size: int = 512,
        pass_seconds: float = PASS_SECONDS,
        allow_extrapolation: bool = False,
        trust_remote_code: bool = False,
        progress: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Load a model.

        model: a hub id, folder, .gguf file or the embedded default. attention: how generated tokens read the cache, as
        "dense" (exact), "auto" (dense where a context is short, else what it takes for nearly the same) or any of
        `thresher methods`, as "streaming:sinks=4,window=1024"; None is "auto", and "dense" with `speculate`. speculate:
        draft tokens and verify them, which gives those of plain decoding sooner: "auto", "self:auto,gamma=4",
        "model:ID", "ngram", or None. weights: bf16, int8 or float32 (keys, values and
        activations are float32 only with float32 weights). kv_budget: bytes that contexts and requests may hold in
        keys, values and indexes, by default half of the free memory. chunk_size: most prompt tokens of one pass.
        pass_seconds: about how long a pass may take while something else waits. allow_extrapolation: permit sequences
        longer than the model was trained for.

        Raises ModelError, UnsupportedModelError, StorageError or UsageError.
        """
        if chunk_size < 1:
            raise UsageError(f"chunk_size={chunk_size}: must be 1 or more")
        if not pass_seconds > 0:
            raise UsageError(f"pass_seconds={pass_seconds}: must be above 0")
        if kv_budget is not None and kv_budget < 1:
            raise UsageError(f"kv_budget={kv_budget}: must be a number of bytes above 0")
        self.speculation = parse_speculation(speculate) if isinstance(speculate, str) else speculate
        self._attention_free = attention is None
        self.attention = _method(attention, DENSE if self.speculation else parse_method(DEFAULT_ATTENTION))
        if self.speculation:
            self.speculation.check_target(self.attention)
        self._progress = progress
        self.source = resolve(model, progress)
        self.model = load(self.source, weights, trust_remote_code, progress)
        self.runner = Runner(self.model)
        self.draft_models: dict[str, DraftModel] = {}
        if self.speculation and self.speculation.model:
            self.draft_models[self.speculation.model] = self._load_draft_model(self.speculation, trust_remote_code)
        self.positions = 1 << 40 if allow_extrapolation else self.model.positions
        if self.speculation:
            self.speculation.check_budget(self.positions)
        self.kv_budget = kv_budget or available_memory() // 2
        self.chunk_size = chunk_size
        self.pass_seconds = pass_seconds
        self.memory = MemoryAccount(self.kv_budget)
        self.engine = Engine(self.scheduler())
        self._preparing = threading.Lock()
        self._told_length = False

    def _load_draft_model(self, speculation: Speculation, trust_remote_code: bool) -> DraftModel:
        """Raises UsageError if its tokens are not those of the model, CapacityError if memory is too small for both."""
        name = str(speculation.model)
        weights = speculation.weights or self.model.weights
        source = resolve(name, self._progress)
        size, free = sum(f.stat().st_size for f in source.folder.glob("*.safetensors")), available_memory()
        if size > free:
            raise CapacityError(
                f"speculate: the draft model {name} takes about {size / 2**20:.0f} MiB beside {self.model.name}, and "
                f"{free / 2**20:.0f} are free"
            )
        drafting = load(source, weights, trust_remote_code, self._progress)
        if not same_tokens(drafting, self.model):
            raise UsageError(
                f"speculate: {drafting.name} has another vocabulary than {self.model.name}; drafts need the same tokens"
            )
        return DraftModel(Runner(drafting), speculation.method)

    @property
    def identity(self) -> Identity:
        return Identity(self.model.name, self.model.fingerprint, self.model.tokenizer_fingerprint)

    @property
    def indexed(self) -> AttentionMethod:
        """The method that documents are indexed for: of the model's own drafts if it makes any, else `attention`."""
        drafting = self.speculation and {"self": self.speculation.method, "auto": AUTO}.get(self.speculation.drafter)
        return drafting if drafting and not isinstance(self.attention, SparseMethod) else self.attention

    @property
    def dense_up_to(self) -> int:
        """Contexts of up to this many tokens are read densely because the sparse method would not win there."""
        return self.runner.dense_up_to(self.attention)

    # Prompts ---------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        params: Params = None,
        framing: str = "plain",
        *,
        attention: str | AttentionMethod | None = None,
        speculate: str | Speculation | None = None,
    ) -> list[list[Completion]]:
        """`params.n` answers to each prompt: a text, a list of token ids, or several of either. framing "chat" wraps
        texts as a user's message. attention: another method than the model's own.

        With one `params` for several prompts each draws random numbers of its own; with a list, a prompt's answer
        depends on its own seed alone. A prompt that fails while others run has completions whose finish_reason is
        "error"; if all fail, the first error is raised. speculate: other drafts than the LLM's own, "none" for none.
        """
        listed = _prompts(prompts)
        return collect(self.stream(listed, params, framing, attention=attention, speculate=speculate), len(listed))

    def stream(
        self,
        prompts: Prompts,
        params: Params = None,
        framing: str = "plain",
        *,
        attention: str | AttentionMethod | None = None,
        speculate: str | Speculation | None = None,
    ) -> Iterator[Event]:
        """The same, token by token, of all prompts as they come. Events name their prompt by its place; leaving the
        iterator cancels what still runs."""
        tokenizer = self.model.tokenizer
        known = _known(framing)
        ids = [prompt_tokens(tokenizer, p, known) if isinstance(p, str) else p for p in _prompts(prompts)]
        return self._submit([(i, None) for i in ids], params, attention, speculate)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: Params = None,
        *,
        attention: str | AttentionMethod | None = None,
        speculate: str | Speculation | None = None,
    ) -> list[list[Completion]]:
        """Answers to a conversation, or to each of several: `[{"role": "user", "content": "..."}, ...]`, with a system
        prompt and earlier turns as the model's template knows them."""
        listed = _conversations(messages)
        return collect(self.stream_chat(listed, params, attention=attention, speculate=speculate), len(listed))

    def stream_chat(
        self,
        messages: Messages | Sequence[Messages],
        params: Params = None,
        *,
        attention: str | AttentionMethod | None = None,
        speculate: str | Speculation | None = None,
    ) -> Iterator[Event]:
        """The same, token by token."""
        ids = [conversation_tokens(self.model.tokenizer, m) for m in _conversations(messages)]
        return self._submit([(i, None) for i in ids], params, attention, speculate)

    # Documents -------------------------------------------------------------------------------------------------------

    def read(
        self,
        text: str,
        path: str | Path | None = None,
        *,
        name: str = "text",
        framing: str | None = None,
        resume: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Context:
        """Prefill a document once, and build the index of the attention method if it has one. With `path` both are kept
        as a KV file, in checkpoints: a read that was cut goes on where it was. framing: "chat" (default if the
        model has a template) or "plain". progress: tokens done, all.

        Raises UsageError, CapacityError, StorageError or KVFileBusyError.
        """
        framing = _known(framing or default_framing(self.model.tokenizer))
        token_ids = document_tokens(self.model.tokenizer, text, framing)
        self.engine.check(self._document_request(KVSequence(self.runner.layout), token_ids))
        self._tell_length(len(token_ids))
        source = source_of(name, text)
        if path is None:
            context = read_document(self.runner, self._prefill, token_ids, source, framing, self.indexed, progress)
        else:
            layout, weights, model = self.runner.layout, self.model.weights, self.source.reference
            info = KVFileInfo(self.identity, layout, len(token_ids), weights, framing, source, model)
            context = read_into_file(
                self.runner,
                self._prefill,
                Path(path),
                info,
                token_ids,
                self.indexed,
                resume,
                progress,
                self._progress,
            )
        self.memory.hold(context.sequence)
        return context

    def open(
        self,
        path: str | Path,
        *,
        verify: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Context:
        """A document from its KV file, memory-mapped. Raises a KVFileError that says what is wrong with it.

        If the file has no index, or one of another method, the first answer builds it in memory; `progress` of the LLM
        tells.
        """
        context, remark = open_document(self.runner, Path(path), self.identity, self.indexed, verify, progress)
        if remark:
            self._progress(remark)
        self.memory.hold(context.sequence)
        return context

    def save(self, context: Context, path: str | Path) -> None:
        """Keep a context, and the attention method's index of it, as a KV file. Raises StorageError or
        KVFileBusyError."""
        with self._preparing:
            model = self.source.reference
            save_document(self.runner, context, Path(path), self.identity, model, self.indexed, self._progress)

    def ask(
        self,
        context: Context,
        questions: str | Sequence[str],
        params: Params = None,
        *,
        attention: str | AttentionMethod | None = None,
        speculate: str | Speculation | None = None,
    ) -> list[list[Completion]]:
        """Answer several questions on one context at once; they share its cache and do not see each other."""
        listed = [questions] if isinstance(questions, str) else list(questions)
        return collect(
            self.stream_answers(context, listed, params, attention=attention, speculate=speculate), len(listed)
        )

    def stream_answers(
        self,
        context: Context,
        questions: str | Sequence[str],
        params: Params = None,
        *,
        attention: str | AttentionMethod | None = None,
        speculate: str | Speculation | None = None,
    ) -> Iterator[Event]:
        """The same, token by token."""
        listed = [questions] if isinstance(questions, str) else list(questions)
        tokens = [question_tokens(self.model.tokenizer, q, context.framing) for q in listed]
        with self._preparing:  # so that the questions share the index
            method, speculation = self._reading(attention, speculate)
            self.runner.prepare(context.sequence, indexed_method(method, speculation, context.sequence))
        return self._submit([(t, context.sequence) for t in tokens], params, attention, speculate)

    # The engine ------------------------------------------------------------------------------------------------------

    def scheduler(self) -> Scheduler:
        """A fresh queue on this model, with the same account of memory, for who wants to make the passes himself."""
        return Scheduler(
            self.runner,
            memory=self.memory,
            positions=self.positions,
            chunk_size=self.chunk_size,
            pass_seconds=self.pass_seconds,
            draft_models=self.draft_models,
        )

    def _reading(
        self, attention: str | AttentionMethod | None, speculate: str | Speculation | None
    ) -> tuple[AttentionMethod, Speculation | None]:
        """How a call reads the cache, and how it drafts. Raises UsageError if the two do not go together."""
        if speculate is None:
            speculation = self.speculation
        else:
            speculation = parse_speculation(speculate) if isinstance(speculate, str) else speculate
        asked = speculation is not None and self._attention_free
        method = _method(attention, DENSE if asked else self.attention)
        if speculation:
            speculation.check_target(method)
            speculation.check_budget(self.positions)
            if speculation.model and speculation.model not in self.draft_models:
                raise UsageError(f"speculate: {speculation.model} is not loaded; give it to LLM(speculate=...)")
        return method, speculation

    def _submit(
        self,
        prompts: list[tuple[Sequence[int], KVSequence | None]],
        params: Params,
        attention: str | AttentionMethod | None,
        speculate: str | Speculation | None,
    ) -> Iterator[Event]:
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        method, speculation = self._reading(attention, speculate)
        for (ids, base), chosen in zip(prompts, each, strict=True):
            self._tell_length(len(ids) + (base.length if base else 0) + chosen.max_new_tokens)
        shared = not isinstance(params, Sequence)  # one seed for several prompts: each draws numbers of its own
        requests = [
            Request(self.engine.new_id(), ids, chosen, base, method, speculation, number if shared else 0)
            for number, ((ids, base), chosen) in enumerate(zip(prompts, each, strict=True))
        ]
        return _placed(self.engine.submit(requests), [r.id for r in requests])

    def _tell_length(self, tokens: int) -> None:
        """Say once that a model without positions reads more than it was trained with: it may, for what that is
        worth."""
        trained = self.model.trained_length
        if trained and tokens > trained and not self._told_length:
            self._told_length = True
            self._progress(
                f"{self.model.name} has no positions and reads any length; it was trained with contexts of {trained} "
                "tokens, and how well it uses more is for you to see"
            )

    def _document_request(self, sequence: KVSequence, token_ids: list[int]) -> Request:
        params = SamplingParams(max_new_tokens=0)
        return Request(self.engine.new_id(), token_ids, params, sequence, self.indexed, grow=True)

    def _prefill(self, sequence: KVSequence, token_ids: list[int], progress: Callable[[int, int], None]) -> None:
        """Append the tokens that a sequence has not yet; the engine reads them beside what else it does."""
        if sequence.length == len(token_ids):
            return
        stream = self.engine.submit([self._document_request(sequence, token_ids[sequence.length :])])
        try:
            for event in stream:
                if event.error:
                    raise event.error
                if event.prompt_done is not None:
                    progress(event.prompt_done, len(token_ids))
        finally:
            stream.close()


def _method(attention: str | AttentionMethod | None, default: AttentionMethod) -> AttentionMethod:
    return parse_method(attention) if isinstance(attention, str) else attention or default


def _placed(stream: Stream, ids: list[int]) -> Iterator[Event]:
    """Events that name their request by its place in the call."""
    places = {id: place for place, id in enumerate(ids)}
    try:
        for event in stream:
            yield replace(event, request=places[event.request])
    finally:
        stream.close()


def _prompts(prompts: Any) -> list[str | Sequence[int]]:
    """One prompt or several, as a list. Raises UsageError if it is neither."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        listed = list(prompts)
    except TypeError:
        raise UsageError(f"a prompt is a text or a list of token ids, not {type(prompts).__name__}") from None
    if listed and all(_is_id(p) for p in listed):
        return [[int(p) for p in listed]]
    for prompt in listed:
        if isinstance(prompt, Mapping):
            raise UsageError("messages are answered by LLM.chat; generate takes texts or token ids")
        if not isinstance(prompt, str) and not (_is_sequence(prompt) and all(_is_id(t) for t in prompt)):
            raise UsageError(f"a prompt is a text or a list of token ids, not {prompt!r:.60}")
    return [p if isinstance(p, str) else [int(t) for t in p] for p in listed]


def _conversations(messages: Any) -> list[Messages]:
    listed = list(messages)
    return [listed] if not listed or isinstance(listed[0], Mapping) else listed


def _is_id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__iter__") and hasattr(value, "__len__")


def _known(framing: str) -> str:
    if framing not in FRAMINGS:
        raise UsageError(f"framing '{framing}': choose one of {', '.join(FRAMINGS)}")
    return framing
