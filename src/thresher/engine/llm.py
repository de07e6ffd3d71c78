"""The library's front door: load a model, generate, read documents, ask them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Index
from thresher.attention.registry import parse_method
from thresher.attention.sparse import Shape, SparseMethod
from thresher.cache.file import KVFileWriter, open_kv, save
from thresher.cache.format import Identity, KVFileInfo, Source
from thresher.cache.sequence import KVSequence
from thresher.engine.framing import FRAMINGS, default_framing, document_tokens, prompt_tokens, question_tokens
from thresher.engine.runner import Runner, Work
from thresher.engine.sampler import Choice
from thresher.engine.sampling import SamplingParams
from thresher.engine.scheduler import Event, Request, Scheduler
from thresher.errors import CapacityError, KVFileDamagedError, UsageError
from thresher.models.load import load
from thresher.models.resolve import DEFAULT_MODEL, resolve

CHECKPOINT = 2048  # tokens of a document between two checkpoints of its file


@dataclass(frozen=True)
class Completion:
    """One answer. `choices` has a token each, with log-probabilities if they were asked for."""

    text: str
    choices: tuple[Choice, ...]
    finish_reason: str

    @property
    def token_ids(self) -> list[int]:
        return [c.token for c in self.choices]


@dataclass(frozen=True)
class Context:
    """A document in the KV cache, ready for questions."""

    sequence: KVSequence
    framing: str
    source: Source | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        return self.sequence.length


class LLM:
    """A model with its attention method and KV budget.

    >>> llm = LLM()
    >>> context = llm.read(open("book.txt").read(), path="book.kv")
    >>> llm.ask(context, ["Who speaks first?"])[0][0].text
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        attention: str | AttentionMethod = "dense",
        weights: str = "bf16",
        kv_budget: int | None = None,
        chunk_size: int = 512,
        allow_extrapolation: bool = False,
        trust_remote_code: bool = False,
        progress: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Load a model.

        model: a hub id, folder, .gguf file or the embedded default. attention: a method such as "dense" or
        "streaming:sinks=4,window=1024"; it applies to generated tokens. weights: bf16, int8 or float32 (keys, values
        and activations are float32 only with float32 weights). kv_budget: bytes of keys and values that requests may
        hold, by default half of the free memory. chunk_size: prompt tokens of one pass. allow_extrapolation: permit
        sequences longer than the model was trained for.

        Raises ModelError, UnsupportedModelError, StorageError or UsageError.
        """
        if chunk_size < 1:
            raise UsageError(f"chunk_size={chunk_size}: must be 1 or more")
        if kv_budget is not None and kv_budget < 1:
            raise UsageError(f"kv_budget={kv_budget}: must be a number of bytes above 0")
        self.attention = parse_method(attention) if isinstance(attention, str) else attention
        self._progress = progress
        self.source = resolve(model, progress)
        self.model = load(self.source, weights, trust_remote_code)
        self.runner = Runner(self.model)
        self.positions = 1 << 40 if allow_extrapolation else self.model.positions
        self.kv_budget = kv_budget or psutil.virtual_memory().available // 2
        self.chunk_size = chunk_size

    @property
    def identity(self) -> Identity:
        return Identity(self.model.name, self.model.fingerprint, self.model.tokenizer_fingerprint)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        framing: str = "plain",
    ) -> list[list[Completion]]:
        """`params.n` answers to each prompt (text or token ids). framing "chat" wraps texts as a user message."""
        return _collect(self.stream(prompts, params, framing))

    def stream(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        framing: str = "plain",
    ) -> Iterator[Event]:
        """The same, token by token, of all prompts as they come."""
        listed: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        tokenizer = self.model.tokenizer
        requests: list[tuple[list[int], KVSequence | None]] = []
        for prompt in listed:
            ids = prompt_tokens(tokenizer, prompt, _known(framing)) if isinstance(prompt, str) else list(prompt)
            requests.append((ids, None))
        return self._run(requests, params)

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
        self._check_document(len(token_ids))
        source = Source(name, hashlib.sha256(text.encode()).hexdigest())
        if path is None:
            sequence = KVSequence(self.runner.layout)
            self._prefill(sequence, token_ids, progress)
            self.runner.prepare(sequence, self.attention)
            return Context(sequence, framing, source)
        layout, weights, model = self.runner.layout, self.model.weights, self.source.reference
        info = KVFileInfo(self.identity, layout, len(token_ids), weights, framing, source, model)
        with KVFileWriter(Path(path), info, token_ids, resume) as writer:
            sequence = writer.load()
            progress(sequence.length, len(token_ids))
            self._prefill(sequence, token_ids, progress, writer)
            writer.write(sequence, len(token_ids))
            index = self.runner.prepare(sequence, self.attention)
            writer.finish(index.state() if index else None)
        return Context(sequence, framing, source)

    def open(
        self,
        path: str | Path,
        *,
        verify: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Context:
        """A document from its KV file, memory-mapped. Raises a KVFileError that says what is wrong with it.

        If the file has no index, or one of another method, the first answer builds it in memory; `say` tells.
        """
        sequence, info, arrays = open_kv(
            Path(path), expect=self.identity, layout=self.runner.layout, verify=verify, progress=progress
        )
        if arrays:
            sequence.index = self._index_of_file(Path(path), sequence, *arrays)
        say = self._progress
        method = self.attention
        if isinstance(method, SparseMethod) and not method.visibility():
            least = self.dense_up_to
            if sequence.length <= least:
                say(f"attention is dense up to {least} tokens: there {method} would read as much")
            elif method.indexed and not (isinstance(sequence.index, Index) and sequence.index.serves(method)):
                held = f"an index for {sequence.index.method}" if isinstance(sequence.index, Index) else "no index"
                say(f"{path} has {held}: building one for {method} (thresher read --attention keeps it)")
        return Context(sequence, info.framing, info.source)

    @property
    def dense_up_to(self) -> int:
        """Contexts of up to this many tokens are read densely because the sparse method would not win there."""
        method = self.attention
        if not isinstance(method, SparseMethod) or method.visibility():
            return 0
        return method.least_context(self.runner.shape)

    def _index_of_file(
        self, path: Path, sequence: KVSequence, meta: dict[str, Any], arrays: dict[str, torch.Tensor]
    ) -> Index:
        try:
            method = parse_method(meta["method"])
            if not isinstance(method, SparseMethod):
                raise ValueError(f"{method.name} has no index")
            shape = Shape(self.model.heads, self.model.dtype)
            return Index.restore(method, shape, self.model.layers, sequence.length, meta, arrays)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, UsageError) as error:
            raise KVFileDamagedError(f"{path} is damaged: its index makes no sense ({error})") from error

    def save(self, context: Context, path: str | Path) -> None:
        """Keep a context, and the attention method's index of it, as a KV file. Raises StorageError or
        KVFileBusyError."""
        index = self.runner.prepare(context.sequence, self.attention)
        save(
            Path(path),
            context.sequence,
            identity=self.identity,
            weights=self.model.weights,
            framing=context.framing,
            source=context.source,
            model=self.source.reference,
            arrays=index.state() if index else None,
        )

    def ask(
        self, context: Context, questions: str | Sequence[str], params: SamplingParams | None = None
    ) -> list[list[Completion]]:
        """Answer several questions on one context at once; they share its cache and do not see each other."""
        return _collect(self.stream_answers(context, questions, params))

    def stream_answers(
        self, context: Context, questions: str | Sequence[str], params: SamplingParams | None = None
    ) -> Iterator[Event]:
        """The same, token by token."""
        listed = [questions] if isinstance(questions, str) else list(questions)
        tokens = [question_tokens(self.model.tokenizer, q, context.framing) for q in listed]
        self.runner.prepare(context.sequence, self.attention)  # so that the questions share the index
        return self._run([(t, context.sequence) for t in tokens], params)

    def scheduler(self) -> Scheduler:
        """A fresh queue on this model."""
        return Scheduler(self.runner, self.attention, self.positions, self.kv_budget, self.chunk_size)

    def _run(
        self,
        prompts: list[tuple[list[int], KVSequence | None]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> Iterator[Event]:
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        scheduler = self.scheduler()
        for i, ((token_ids, base), chosen) in enumerate(zip(prompts, each, strict=True)):
            scheduler.add(Request(i, token_ids, chosen, base))

        def events() -> Iterator[Event]:
            while scheduler.busy:
                yield from scheduler.step()

        return events()

    def _prefill(
        self,
        sequence: KVSequence,
        token_ids: list[int],
        progress: Callable[[int, int], None],
        writer: KVFileWriter | None = None,
    ) -> None:
        sequence.reserve(len(token_ids) - sequence.length, exact=True)
        while sequence.length < len(token_ids):
            chunk = token_ids[sequence.length : sequence.length + self.chunk_size]
            self.runner.run([Work(sequence, chunk, logits=False)])
            if writer and sequence.length - writer.done >= CHECKPOINT:
                writer.write(sequence, sequence.length)
            progress(sequence.length, len(token_ids))

    def _check_document(self, length: int) -> None:
        if length > self.positions:
            raise CapacityError(
                f"the document has {length} tokens, the model was trained for {self.positions} positions; "
                "shorten it, or allow RoPE extrapolation with --allow-extrapolation"
            )
        needed = length * self.runner.layout.bytes_per_token
        if needed > self.kv_budget:
            raise CapacityError(
                f"the document needs {needed / 2**20:.0f} MiB of KV cache, the budget is "
                f"{self.kv_budget / 2**20:.0f} MiB; shorten it or raise --kv-budget"
            )


def _known(framing: str) -> str:
    if framing not in FRAMINGS:
        raise UsageError(f"framing '{framing}': choose one of {', '.join(FRAMINGS)}")
    return framing


def _collect(events: Iterator[Event]) -> list[list[Completion]]:
    texts: dict[tuple[int, int], list[str]] = {}
    choices: dict[tuple[int, int], list[Choice]] = {}
    reasons: dict[tuple[int, int], str] = {}
    for event in events:
        key = (event.request, event.sample)
        texts.setdefault(key, []).append(event.text)
        if event.choice:
            choices.setdefault(key, []).append(event.choice)
        if event.finish_reason:
            reasons[key] = event.finish_reason
    answers: list[list[Completion]] = [[] for _ in range(1 + max((r for r, _ in reasons), default=-1))]
    for key in sorted(reasons):
        answers[key[0]].append(Completion("".join(texts[key]), tuple(choices.get(key, ())), reasons[key]))
    return answers
