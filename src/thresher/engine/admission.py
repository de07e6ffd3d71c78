"""Which requests may begin: those whose memory, all that they may come to need, fits into the account."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from thresher.attention.index import Index, index_bytes_per_token
from thresher.decoding.runner import Runner
from thresher.engine.memory import MemoryAccount
from thresher.engine.requests import Request
from thresher.errors import CapacityError, UsageError
from thresher.speculation.drafters import DraftModel

OVERTAKES = 8  # requests that may be admitted past one that does not fit yet


@dataclass(frozen=True)
class Needs:
    """What a request may come to hold: bytes for its prompt and for each of its samples, and tokens of a sample."""

    prompt: int
    sample: int
    limit: int

    def bytes(self, samples: int) -> int:
        return self.prompt + samples * self.sample


@dataclass(eq=False)
class Waiting:
    request: Request
    needs: Needs
    passed: int = 0  # requests that were admitted before it, though it came first

    @property
    def bytes(self) -> int:
        return self.needs.bytes(self.request.params.n)


class Admission:
    """The requests that wait, in order of arrival."""

    def __init__(
        self, runner: Runner, memory: MemoryAccount, positions: int, draft_models: Mapping[str, DraftModel]
    ) -> None:
        """positions: longest sequence; draft_models: by name, their caches count as well."""
        self._draft_models = draft_models
        self._runner = runner
        self._memory = memory
        self._positions = positions
        self.waiting: list[Waiting] = []

    def needs(self, request: Request) -> Needs:
        """What no context holds already: rows of the new tokens, and an index of all that is read by one."""
        row = self._runner.layout.bytes_per_token
        # The last token of a sample needs no position of its own.
        left = self._positions - request.prompt_length + 1
        limit = 0 if request.grow else min(request.params.max_new_tokens, left)
        grown = max(limit - 1, 0)
        index = index_bytes_per_token(request.indexed, self._runner.index_shape, self._runner.model.layers)
        layout = self._runner.layout
        read = request.prompt_length if request.grow else len(request.token_ids)
        prompt = read * row + layout.states_bytes(read)
        sample = grown * row + layout.states_bytes(grown)
        if request.speculation and request.speculation.model and not request.grow:
            drafting = self._draft_models[request.speculation.model].runner.layout.bytes_per_token
            prompt += request.prompt_length * drafting
            sample += grown * drafting
        if index and request.prompt_length + grown > self._runner.dense_up_to(request.indexed):
            base = request.base.index if request.base is not None else None
            shared = base.bytes if isinstance(base, Index) and base.serves(request.indexed) else 0
            prompt += max(0, round(index * request.prompt_length) - shared)
            sample += round(index * grown)
        return Needs(prompt, sample, limit)

    def check(self, request: Request) -> Needs:
        """What a request needs. Raises UsageError or CapacityError if it could never run."""
        if not request.token_ids:
            raise UsageError("the prompt is empty; give it at least one token")
        vocab = self._runner.model.vocab_size
        if not all(0 <= t < vocab for t in request.token_ids):
            raise UsageError(f"the prompt holds token ids outside of 0 .. {vocab - 1}")
        if request.prompt_length > self._positions:
            raise CapacityError(
                f"the {'document' if request.grow else 'prompt'} has {request.prompt_length} tokens, the model was "
                f"trained for {self._positions} positions; shorten it, or allow RoPE extrapolation with "
                "--allow-extrapolation"
            )
        needs = self.needs(request)
        if needs.bytes(request.params.n) > self._memory.budget:
            raise CapacityError(
                f"the {'document' if request.grow else 'request'} needs up to "
                f"{needs.bytes(request.params.n) / 2**20:.0f} MiB of KV cache, the budget is "
                f"{self._memory.budget / 2**20:.0f} MiB; shorten it or raise --kv-budget"
            )
        return needs

    def add(self, request: Request) -> None:
        """Queue a request. Raises as `check` does."""
        self.waiting.append(Waiting(request, self.check(request)))

    def holds(self, request_id: int) -> bool:
        return any(entry.request.id == request_id for entry in self.waiting)

    def take(self, request_id: int) -> list[Waiting]:
        """Remove a request, if it waits."""
        taken = [entry for entry in self.waiting if entry.request.id == request_id]
        self.waiting = [entry for entry in self.waiting if entry.request.id != request_id]
        return taken

    def admitted(self, running: Callable[[], bool]) -> Iterator[Waiting]:
        """Those whose turn it is, removed one by one: each may take up memory before the next is looked at.

        One that does not fit waits for what runs, and a few smaller ones may pass it; if nothing runs it comes out too.
        """
        held_up: Waiting | None = None
        for entry in sorted(self.waiting, key=lambda w: w.request.priority):
            if entry.bytes > self._memory.free and running():
                held_up = held_up or entry
            else:
                if held_up:
                    held_up.passed += 1
                self.waiting.remove(entry)
                yield entry
            if held_up and held_up.passed >= OVERTAKES:
                return
