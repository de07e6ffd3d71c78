"""Drafts for the samples of a step: who makes them, how long they are, and what is learned from what became of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Index
from thresher.attention.registry import parse_method
from thresher.attention.sparse import SparseMethod
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner
from thresher.decoding.sampler import SampleState
from thresher.speculation.drafters import DraftModel, Lookup, Wanted, draft
from thresher.speculation.policy import (
    MOST_CHOSEN,
    PROBE,
    PROBE_GAMMA,
    REPLAN,
    REPLAN_UNSURE,
    Acceptance,
    Case,
    Chunk,
    Clock,
    best_plan,
)
from thresher.speculation.settings import Speculation
from thresher.speculation.verify import Draft, Verdict

TARGET, NGRAM = "target", "ngram"
AUTO, WINDOW = parse_method("auto"), parse_method("streaming:window=512")
# Views of the cache that "auto" has for the model's own drafts: the best that is known if a document's index is there
# for it, and one that needs no index, which to build would cost more than most answers gain.
VIEWS = {f"self:{view}": view for view in (AUTO, WINDOW)}
PRIORS = {f"self:{AUTO}": (0.9,), f"self:{WINDOW}": (0.75,), NGRAM: (0.3, 0.6)}  # of acceptance, of others 0.6
_OTHERS = (0.6,)
_LIKELY = 0.5  # that often right is a look-up that is verified now and then to see what it takes
_FIRST = 1.9  # drafts of a maker that nothing is known of: two, the first counting a little less
RENEW = 64  # tokens after which a view that is chosen once is chosen anew, by the last half of them
_MOST_VOTERS = 16  # tokens of a pass that votes are taken from
_SHADOW = 4  # tokens that are looked up only to see whether they would have been right, after as many passes


@dataclass(frozen=True)
class SpeculationStats:
    """Of one answer. passes: of the target; drafted, accepted: tokens of drafts at each position (those behind one that
    fell count as drafted); gammas: passes by the length of their draft, from zero; drafters: passes by who drafted."""

    passes: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    gammas: tuple[int, ...]
    drafters: Mapping[str, int]


@dataclass(eq=False)
class Speculating:
    """A sample that speculates. target: the attention method that verifies; matching: tokens are compared and not
    rejected by chance, so that they are those of plain decoding; ends: tokens that end the answer."""

    settings: Speculation
    sequence: KVSequence
    state: SampleState
    target: AttentionMethod | None
    matching: bool
    ends: frozenset[int]
    lookup: Lookup | None = None
    acceptance: dict[str, Acceptance] = field(default_factory=dict)
    maker: str | None = None  # of drafts, and how long they are, as planned
    gamma: int = 0
    lookup_gamma: int = 0
    lookup_first: bool = False
    steps: int = 0  # since drafts began or ended
    patience: int = PROBE  # of these until it is asked again whether to try one
    broken: set[str] = field(default_factory=set)  # makers of drafts that have failed
    current: str = ""  # who made the draft that is being verified
    renewed: int = 0  # length of the sequence when its view was chosen
    votes: torch.Tensor | None = None
    shadow: list[int] = field(default_factory=list)
    hits: int = 0
    passes: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    gammas: list[int] = field(default_factory=list)
    drafters: dict[str, int] = field(default_factory=dict)

    @property
    def stats(self) -> SpeculationStats:
        return SpeculationStats(
            self.passes, tuple(self.drafted), tuple(self.accepted), tuple(self.gammas), dict(self.drafters)
        )


@dataclass(frozen=True)
class Turn:
    """A sample in the next step. pending: its last token, which is not in the cache yet; left: tokens that it may still
    get; indexed: whether its index is built as far as a draft reads it."""

    sample: Speculating
    pending: int
    left: int
    indexed: bool = True


class Speculator:
    """Makes and judges the drafts of a model's requests. Holds the caches of draft models, and what passes took."""

    def __init__(self, runner: Runner, models: Mapping[str, DraftModel]) -> None:
        """models: by the `Speculation.model` that asks for them."""
        self._runner = runner
        self._models = models
        self.clock = Clock(runner.shape, {name: model.runner.shape for name, model in models.items()})
        self._known: dict[str, Acceptance] = {}  # of all samples
        self._planned: list[Speculating] = []
        self._until_replan = 0
        self._without_lookups = 0  # plans

    def start(
        self,
        settings: Speculation,
        sequence: KVSequence,
        state: SampleState,
        target: AttentionMethod | None,
        matching: bool,
        ends: frozenset[int],
    ) -> Speculating:
        """A sample begins."""
        lookup = Lookup(settings.ngram) if settings.drafter in ("auto", "ngram") else None
        return Speculating(settings, sequence, state, target, matching, ends, lookup, renewed=sequence.length)

    def end(self, sample: Speculating) -> list[KVSequence]:
        """A sample has ended. Returns the sequences of draft models that are kept for the next ones."""
        for model in self._models.values():
            model.end(sample)
        return [sequence for model in self._models.values() for sequence in model.kept]

    def let_go(self) -> None:
        """Forget sequences that are kept for nobody yet."""
        for model in self._models.values():
            model.let_go()

    def drafts(self, turns: Sequence[Turn]) -> list[Draft]:
        """A draft for each sample, an empty one where none pays or none is ready. Sequences are as they were."""
        for turn in turns:
            self._renew(turn.sample)
        self._plan(turns)
        drafts = [Draft() for _ in turns]
        asked: dict[str, list[tuple[int, int]]] = {}  # maker -> (place, tokens)
        for i, turn in enumerate(turns):
            sample = turn.sample
            maker, gamma = self._chosen(turn)
            sample.current = ""
            if sample.lookup and (sample.lookup_first or not maker or not gamma):
                room = min(sample.lookup_gamma, self._most(turn))
                drafts[i] = sample.lookup.draft(sample.sequence.token_ids, turn.pending, room) if room else Draft()
                if drafts[i].token_ids:
                    sample.current = NGRAM
                    continue
            if gamma and maker:
                asked.setdefault(maker, []).append((i, gamma))
            self._begin_shadow(turn)
        for maker, places in asked.items():
            made = self._made(maker, [(turns[i], gamma) for i, gamma in places])
            for (i, _), result in zip(places, made, strict=True):
                drafts[i] = result
                turns[i].sample.current = maker if result.token_ids else ""
        return drafts

    def judged(self, results: Sequence[tuple[Speculating, Draft, Verdict]], seconds: float | None) -> None:
        """What became of the drafts of a step, while they are still in the cache. seconds: of the target's pass, if it
        was of these samples alone."""
        if seconds is not None:
            chunks = [
                Chunk(1 + len(d.token_ids), s.sequence.length - 1 - len(d.token_ids), s.target) for s, d, _ in results
            ]
            self.clock.observe(TARGET, chunks, seconds)
        for sample, made, verdict in results:
            n = len(made.token_ids)
            sample.passes += 1
            sample.steps += 1
            _count(sample.gammas, n, 1)
            for k in range(n):
                _count(sample.drafted, k, 1)
                _count(sample.accepted, k, int(k < verdict.accepted))
            if n:
                sample.drafters[sample.current] = sample.drafters.get(sample.current, 0) + 1
                for acceptance in self._acceptances(sample, sample.current):
                    acceptance.observe(verdict.chances)
            self._compare_shadow(sample, [c.token for c in verdict.choices if not isinstance(c, Exception)])

    def votes(self, sample: Speculating, tokens: int) -> torch.Tensor | None:
        """What a pass that verifies so many tokens adds the weights of all rows to (`Work.votes`), if the sample's view
        is to be chosen anew before long: they are computed in any case."""
        index, length = sample.sequence.index, sample.sequence.length
        fixed = isinstance(index, Index) and bool(index.blocks) and not index.method.grows
        if not fixed or isinstance(sample.target, SparseMethod) or length < sample.renewed + RENEW // 2:
            return None
        if sample.votes is None:
            layout = sample.sequence.layout
            sample.votes = torch.zeros(layout.layers, layout.kv_heads, length + 2 * RENEW)
        return sample.votes if tokens <= _MOST_VOTERS and length + tokens <= sample.votes.shape[2] else None

    def _renew(self, sample: Speculating) -> None:
        index, length = sample.sequence.index, sample.sequence.length
        if sample.votes is None or length < sample.renewed + RENEW:
            return
        if isinstance(index, Index) and sample.votes.isfinite().all():
            index.renew(sample.sequence, sample.votes)
        sample.votes, sample.renewed = None, length

    def sequences(self) -> list[KVSequence]:
        """Of draft models."""
        return [s for model in self._models.values() for s in model.sequences()]

    # Who drafts, and how much ----------------------------------------------------------------------------------------

    def _most(self, turn: Turn) -> int:
        """Tokens that a draft may have: what is left with the target's own token behind them, and what one pass can
        verify."""
        sample = turn.sample
        most = min(sample.settings.gamma or MOST_CHOSEN, turn.left - 1)
        return self._runner.verifiable(sample.sequence, sample.target, most + 1) - 1 if most > 0 else 0

    def _makers(self, turn: Turn) -> list[str]:
        """Models that may draft for a sample now."""
        return [maker for maker in self._fitting(turn) if maker not in turn.sample.broken]

    def _fitting(self, turn: Turn) -> list[str]:
        settings, sample = turn.sample.settings, turn.sample
        if settings.drafter == "ngram":
            return []
        if settings.drafter == "model":
            return [str(settings.model)]
        if settings.drafter == "self":
            return [f"self:{settings.method}"] if turn.indexed else []
        found = [settings.model] if settings.model else []
        if isinstance(sample.target, SparseMethod):
            return found
        index = sample.sequence.index
        for name, view in VIEWS.items():
            if seen := view.visibility():
                pays = sample.sequence.length > 2 * seen.window
            else:
                pays = turn.indexed and isinstance(index, Index) and bool(index.blocks) and index.serves(view)
            found += [name] if pays else []
        return found

    def _chosen(self, turn: Turn) -> tuple[str | None, int]:
        """Who drafts for a sample in this step, and how many tokens."""
        sample, makers = turn.sample, self._makers(turn)
        fixed = sample.settings.gamma
        if fixed is not None:
            sample.lookup_gamma = fixed
            return (makers[0] if makers else None), self._most(turn)
        maker, gamma = (sample.maker, sample.gamma) if sample.maker in makers else (None, 0)
        if maker is None:  # for all samples of a batch alike, or what is measured would be another pass than is planned
            tried = next((m for m in makers if self._curious(turn, m)), None)
            maker, gamma = (tried, PROBE_GAMMA) if tried else (None, 0)
            self._until_replan = min(self._until_replan, REPLAN_UNSURE) if tried else self._until_replan
        elif gamma and sample.steps >= PROBE:
            sample.steps = gamma = 0  # what a pass without a draft takes is to stay known
        return maker, min(gamma, self._most(turn))

    def _curious(self, turn: Turn, maker: str) -> bool:
        """Whether to try a draft where none was planned: nothing is known of its maker, or not for long."""
        sample = turn.sample
        if not self.clock.measured(TARGET) or turn.left < PROBE // 4:
            return False
        if maker not in self._known or self._known[maker].drafts < _FIRST:
            return True
        if sample.steps < sample.patience:
            return False
        # If not even drafts that are always right paid, only the times may have changed.
        case = self._case(turn, maker)
        sure = Case(case.past, case.target, case.drafting, case.most, [1.0] * MOST_CHOSEN)
        hopeless = best_plan(self.clock, maker, [sure]).gammas == [0]
        if hopeless and sample.steps < 8 * PROBE:
            sample.patience = sample.steps + PROBE
            return False
        sample.steps, sample.patience = 0, PROBE
        return True

    def _plan(self, turns: Sequence[Turn]) -> None:
        """Choose lengths anew after some steps, or if the batch has changed."""
        free = [t for t in turns if t.sample.settings.gamma is None]
        samples = [t.sample for t in free]
        self._until_replan -= 1
        if not free or (self._until_replan > 0 and samples == self._planned):
            return
        if not self.clock.measured(TARGET):
            return
        self._planned, self._until_replan = samples, REPLAN
        found: list[tuple[float, str, Turn, int]] = []
        for maker in sorted({m for t in free for m in self._makers(t)}):
            group = [t for t in free if maker in self._makers(t)]
            cases = [self._case(t, maker) for t in group]
            present = max((t.sample.gamma for t in group if t.sample.maker == maker), default=0)
            best = best_plan(self.clock, maker, cases, present)
            found += [(best.rate, maker, turn, gamma) for turn, gamma in zip(group, best.gammas, strict=True)]
            if any(not self.clock.measured(TARGET, 1 + gamma) for gamma in best.gammas):
                self._until_replan = REPLAN_UNSURE
        rates: dict[Speculating, float] = {}
        for turn in free:
            paying = [(rate, maker, gamma) for rate, maker, t, gamma in found if t is turn and gamma]
            rate, maker, gamma = max(paying, default=(0.0, "", 0))
            if gamma:
                rates[turn.sample] = rate
            if (gamma > 0) != (turn.sample.gamma > 0):
                turn.sample.steps, turn.sample.patience = 0, PROBE
            turn.sample.maker, turn.sample.gamma = maker or None, gamma
        self._plan_lookups(free, rates)

    def _plan_lookups(self, turns: Sequence[Turn], rates: Mapping[Speculating, float]) -> None:
        """How much of what is looked up is worth verifying, and whether it is better than what models draft, with
        `rates` of tokens a second."""
        turns = [turn for turn in turns if turn.sample.lookup]
        if not turns:
            return
        cases = [self._case(turn, NGRAM) for turn in turns]
        best = best_plan(self.clock, None, cases, max(turn.sample.lookup_gamma for turn in turns))
        gammas = best.gammas
        self._without_lookups = 0 if any(gammas) else self._without_lookups + 1
        if self._without_lookups % (PROBE // REPLAN) == 1:  # it may be cheaper than is expected, or than it was
            gammas = [int(case.most > 0 and case.rates[0] > _LIKELY) for case in cases]
            self._until_replan = REPLAN_UNSURE if any(gammas) else self._until_replan
        for turn, gamma in zip(turns, gammas, strict=True):
            turn.sample.lookup_gamma = gamma
            turn.sample.lookup_first = gamma > 0 and best.rate > rates.get(turn.sample, 0.0)
            if not self.clock.measured(TARGET, 1 + gamma):
                self._until_replan = REPLAN_UNSURE

    def _case(self, turn: Turn, drafter: str) -> Case:
        sample = turn.sample
        rates = self._acceptances(sample, drafter)[0].rates(MOST_CHOSEN)
        return Case(
            sample.sequence.length,
            sample.target,
            self._drafting(sample, drafter),
            min(self._most(turn), MOST_CHOSEN),
            rates,
        )

    def _drafting(self, sample: Speculating, drafter: str) -> AttentionMethod | None:
        """How a drafter reads its cache."""
        if drafter in self._models:
            return self._models[drafter].method
        if sample.settings.drafter == "self":
            return sample.settings.method
        return VIEWS.get(drafter)

    def _acceptances(self, sample: Speculating, drafter: str) -> list[Acceptance]:
        """Of the sample, and of all; a sample begins with what is known of the others."""
        if drafter not in self._known:
            self._known[drafter] = Acceptance(PRIORS.get(drafter, _OTHERS))
        known = self._known[drafter]
        if drafter not in sample.acceptance:
            sample.acceptance[drafter] = Acceptance(known.rates(MOST_CHOSEN))
        return [sample.acceptance[drafter], known]

    # Drafts ----------------------------------------------------------------------------------------------------------

    def _made(self, maker: str, turns: Sequence[tuple[Turn, int]]) -> list[Draft]:
        """Drafts by a model, of the lengths chosen; empty ones where it has not read the prompt yet. If it fails its
        samples go on without it: what is wrong with the target or its cache, the target's own pass will say."""
        lengths = [turn.sample.sequence.length for turn, _ in turns]
        try:
            return self._drafted(maker, turns)
        except Exception:
            for turn, _ in turns:
                turn.sample.broken.add(maker)
            return [Draft() for _ in turns]
        finally:
            for (turn, _), length in zip(turns, lengths, strict=True):
                turn.sample.sequence.crop(length)

    def _drafted(self, maker: str, turns: Sequence[tuple[Turn, int]]) -> list[Draft]:
        model = self._models.get(maker)
        made = [Draft() for _ in turns]
        wanted: dict[int, Wanted] = {}
        for i, (turn, gamma) in enumerate(turns):
            sample = turn.sample
            sequence, behind = sample.sequence, [turn.pending]
            if model is not None:
                behind = model.behind(sample, sample.sequence.token_ids, turn.pending)
                sequence = model.sequence(sample)
                if not model.catch_up(sample, behind):
                    continue
            method = self._drafting(sample, maker)
            wanted[i] = Wanted(sequence, behind, gamma, sample.state, method, sample.matching, sample.ends)
        if wanted:
            runner = model.runner if model is not None else self._runner
            observe = partial(self.clock.observe, maker)
            drafts = draft(runner, list(wanted.values()), self._runner.model.vocab_size, observe)
            for i, result in zip(wanted, drafts, strict=True):
                made[i] = result
        return made

    # What would have been looked up ----------------------------------------------------------------------------------

    def _begin_shadow(self, turn: Turn) -> None:
        """Look up what may come, to see how often that is right where it is not used."""
        sample = turn.sample
        if sample.lookup and sample.settings.gamma is None and not sample.shadow and sample.passes % _SHADOW == 0:
            sample.shadow = sample.lookup.draft(sample.sequence.token_ids, turn.pending, _SHADOW).token_ids
            sample.hits = 0

    def _compare_shadow(self, sample: Speculating, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not sample.shadow:
                return
            right = token == sample.shadow[sample.hits]
            sample.hits += right
            if not right or sample.hits == len(sample.shadow):
                for acceptance in self._acceptances(sample, NGRAM):
                    acceptance.observe([1.0] * sample.hits + [0.0] * (not right))
                sample.shadow = []


def _count(counts: list[int], place: int, n: int) -> None:
    counts += [0] * (place + 1 - len(counts))
    counts[place] += n
