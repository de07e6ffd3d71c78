"""Documents in the KV cache: read once, kept as files, opened again."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Index
from thresher.attention.registry import parse_method
from thresher.attention.sparse import Shape, SparseMethod
from thresher.cache.file import KVFileWriter, open_kv, save
from thresher.cache.format import Identity, KVFileInfo, Source
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner
from thresher.errors import KVFileDamagedError, UsageError

_LONGEST_METHOD = 1000  # characters: a name that is not known is compared with all that are
CHECKPOINT = 2048  # tokens of a document between two checkpoints of its file

Progress = Callable[[int, int], None]
Prefill = Callable[[KVSequence, list[int], Progress], None]  # appends the tokens that are missing


@dataclass(frozen=True)
class Context:
    """A document in the KV cache, ready for questions. It counts against the KV budget until it is let go."""

    sequence: KVSequence
    framing: str
    source: Source | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        return self.sequence.length

    def close(self) -> None:
        """Give its memory back now. Answers that are being generated on it go on."""
        self.sequence.crop(0)


def read_document(
    runner: Runner,
    prefill: Prefill,
    token_ids: list[int],
    source: Source,
    framing: str,
    method: AttentionMethod,
    progress: Progress,
) -> Context:
    """Prefill a document and build the index of the method."""
    sequence = KVSequence(runner.layout)
    prefill(sequence, token_ids, progress)
    runner.prepare(sequence, method)
    return Context(sequence, framing, source)


def read_into_file(
    runner: Runner,
    prefill: Prefill,
    path: Path,
    info: KVFileInfo,
    token_ids: list[int],
    method: AttentionMethod,
    resume: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> Context:
    """The same, kept as a KV file in checkpoints; one that was cut goes on where it was."""
    with KVFileWriter(path, info, token_ids, resume, say) as writer:
        sequence = writer.load()
        progress(sequence.length, len(token_ids))

        def checkpoint(done: int, total: int) -> None:
            if done - writer.done >= CHECKPOINT:
                writer.write(sequence, done)
            progress(done, total)

        prefill(sequence, token_ids, checkpoint)
        writer.write(sequence, len(token_ids))
        index = runner.prepare(sequence, method)
        writer.finish(index.state() if index else None, sequence)
    return Context(sequence, info.framing, info.source)


def open_document(
    runner: Runner, path: Path, identity: Identity, method: AttentionMethod, verify: bool, progress: Progress
) -> tuple[Context, str]:
    """A document from its file, and a remark on how the method will read it (or nothing)."""
    sequence, info, arrays = open_kv(path, expect=identity, layout=runner.layout, verify=verify, progress=progress)
    if max(sequence.token_ids) >= runner.model.vocab_size:
        raise KVFileDamagedError(f"{path} is damaged: token ids beyond the model's vocabulary")
    if arrays:
        sequence.index = _restore(runner, path, sequence, *arrays)
    return Context(sequence, info.framing, info.source), _remark(runner, path, sequence, method)


def save_document(
    runner: Runner,
    context: Context,
    path: Path,
    identity: Identity,
    model: str,
    method: AttentionMethod,
    say: Callable[[str], None],
) -> None:
    """Keep a context and the method's index of it as a KV file. model: where it can be loaded from."""
    index = runner.prepare(context.sequence, method)
    save(
        path,
        context.sequence,
        identity=identity,
        weights=runner.model.weights,
        framing=context.framing,
        source=context.source,
        model=model,
        arrays=index.state() if index else None,
        say=say,
    )


def source_of(name: str, text: str) -> Source:
    return Source(name, hashlib.sha256(text.encode()).hexdigest())


def _restore(
    runner: Runner, path: Path, sequence: KVSequence, meta: dict[str, Any], arrays: dict[str, torch.Tensor]
) -> Index:
    try:
        if len(meta["method"]) > _LONGEST_METHOD:
            raise ValueError("the name of its method has no end")
        method = parse_method(meta["method"])
        if not isinstance(method, SparseMethod):
            raise ValueError(f"{method.name} has no index")
        shape = Shape(runner.model.heads, runner.model.dtype)
        return Index.restore(method, shape, runner.model.layers, sequence.length, meta, arrays)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, UsageError) as error:
        raise KVFileDamagedError(f"{path} is damaged: its index makes no sense ({error!s:.200})") from error


def _remark(runner: Runner, path: Path, sequence: KVSequence, method: AttentionMethod) -> str:
    if not isinstance(method, SparseMethod) or method.visibility():
        return ""
    least = runner.dense_up_to(method)
    if sequence.length <= least:
        return f"attention is dense up to {least} tokens: there {method} would read as much"
    if method.indexed and not (isinstance(sequence.index, Index) and sequence.index.serves(runner.fitted(method))):
        held = f"an index for {sequence.index.method}" if isinstance(sequence.index, Index) else "no index"
        return f"{path} has {held}: building one for {method} (thresher read --attention keeps it)"
    return ""
