"""Random finite automata to be learned in context (RegBench), and the predictions that models are held against.

A language is that of a small automaton. An instance is some words of one language: a model that has read a few of them
can know which symbols may come next. Symbols are the tokens 0 .. 17.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from thresher.errors import UsageError

SYMBOLS = 18
SEPARATOR = 18
PADDING = 19
VOCABULARY = 20
IGNORED = -100  # a label without a loss, as transformers has it

Tokens = tuple[int, ...]
Array = NDArray[np.float64]
_LOG_FACTORIALS = np.cumsum(np.log([1, *range(1, SYMBOLS + 1)]))


@dataclass(frozen=True)
class Sizes:
    """What is drawn, uniformly and with both ends: by default what RegBench draws.

    states, alphabet: of an automaton, before it is minimised; edges: of a state; words: of an instance; symbols: of a
    word; tokens: most of an instance, what is behind is cut (none of RegBench's is so long).
    """

    states: tuple[int, int] = (4, 12)
    alphabet: tuple[int, int] = (4, SYMBOLS)
    edges: tuple[int, int] = (1, 3)
    words: tuple[int, int] = (10, 19)
    symbols: tuple[int, int] = (1, 49)
    tokens: int = 1024

    def __post_init__(self) -> None:
        ranges = (self.states, self.alphabet, self.edges, self.words, self.symbols)
        if any(not 1 <= low <= high for low, high in ranges) or self.alphabet[1] > SYMBOLS or self.tokens < 2:
            raise UsageError(f"{self}: ranges begin at 1 or more, there are {SYMBOLS} symbols, and 2 tokens at least")
        if self.edges[1] > min(self.states[0] - 1, self.alphabet[0]):
            raise UsageError(f"{self}: a state's edges have symbols of their own and lead to other states, each to one")

    @property
    def longest(self) -> int:
        """Tokens that an instance can have."""
        return min(self.tokens, self.words[1] * (self.symbols[1] + 1) - 1)


@dataclass(frozen=True)
class Automaton:
    """Deterministic and partial; it begins in state 0 and every state accepts.

    edges: of each state (symbol, next state), by symbol. A word goes along each of a state's edges with the same
    probability.
    """

    edges: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Instance:
    """tokens: words of the automaton with separators between them."""

    automaton: Automaton
    tokens: Tokens


@dataclass(frozen=True)
class Measures:
    """accuracy: the share of positions whose most likely symbol is allowed; tvd: half the L1 distance between predicted
    and true distribution of the next symbol. Positions are those before a symbol."""

    accuracy: float
    tvd: float


def draw(rng: np.random.Generator, sizes: Sizes) -> Automaton:
    """An automaton as it is drawn: states may be out of reach or do the same as others."""
    count, letters = _between(rng, sizes.states), _between(rng, sizes.alphabet)
    alphabet = rng.choice(SYMBOLS, letters, replace=False)
    edges = []
    for state in range(count):
        degree = _between(rng, sizes.edges)
        symbols = rng.choice(alphabet, degree, replace=False)
        others = rng.choice(count - 1, degree, replace=False)
        targets = others + (others >= state)
        edges.append(tuple(sorted(zip(symbols.tolist(), targets.tolist(), strict=True))))
    return Automaton(tuple(edges))


def _between(rng: np.random.Generator, ends: tuple[int, int]) -> int:
    return int(rng.integers(ends[0], ends[1] + 1))


def minimal(automaton: Automaton) -> Automaton:
    """The smallest automaton of the same language, by Moore's partition refinement. Its states are numbered in the
    order of a breadth-first walk, so that two of the same language are equal.

    States that are merged allow the same symbols, so the words keep their probabilities, too.
    """
    edges = automaton.edges
    block, blocks = [0] * len(edges), 1  # all accept: at first no state is told from another
    while True:
        signs = [(block[s], *((symbol, block[t]) for symbol, t in edges[s])) for s in range(len(edges))]
        names = {sign: i for i, sign in enumerate(dict.fromkeys(signs))}
        block = [names[sign] for sign in signs]
        if len(names) == blocks:
            break
        blocks = len(names)
    number, walk = {block[0]: 0}, [0]
    for state in walk:  # it grows meanwhile; what is out of reach never gets in
        for _, target in edges[state]:
            if block[target] not in number:
                number[block[target]] = len(walk)
                walk.append(target)
    return Automaton(tuple(tuple((symbol, number[block[t]]) for symbol, t in edges[s]) for s in walk))


def automata(
    count: int, rng: np.random.Generator, sizes: Sizes, besides: Collection[Automaton] = frozenset()
) -> list[Automaton]:
    """Minimal automata of different languages, none of `besides`. More of them begin with the same ones. Raises
    UsageError if there are not so many."""
    found: dict[Automaton, None] = {}
    for _ in range(100 + 20 * count):
        if len(found) == count:
            break
        one = minimal(draw(rng, sizes))
        if one not in besides:
            found[one] = None
    if len(found) < count:
        raise UsageError(f"{sizes}: {count} different automata were not found; give fewer")
    return list(found)


def instance(automaton: Automaton, rng: np.random.Generator, sizes: Sizes) -> Instance:
    """Random words of an automaton."""
    tokens: list[int] = []
    for _ in range(_between(rng, sizes.words)):
        if tokens:
            tokens.append(SEPARATOR)
        state = 0
        for chance in rng.random(_between(rng, sizes.symbols)).tolist():
            edges = automaton.edges[state]
            symbol, state = edges[int(chance * len(edges))]
            tokens.append(symbol)
    return Instance(automaton, tuple(tokens[: sizes.tokens]))


def batch(instances: Sequence[Instance]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and labels `[instances, longest]`, padded behind. Labels are the tokens themselves, as transformers takes
    them, and IGNORED where there is no symbol."""
    tokens = np.full((len(instances), max(len(i.tokens) for i in instances)), PADDING, np.int64)
    for row, one in zip(tokens, instances, strict=True):
        row[: len(one.tokens)] = one.tokens
    return tokens, np.where(tokens < SYMBOLS, tokens, IGNORED)


def states(automaton: Automaton, tokens: Sequence[int]) -> list[int]:
    """The state after each token. Raises ValueError where a word is not the automaton's."""
    found: list[int] = []
    state = 0
    for token in tokens:
        state = 0 if token == SEPARATOR else dict(automaton.edges[state]).get(token, -1)
        if state < 0:
            raise ValueError(f"symbol {token} at token {len(found)} is not allowed")
        found.append(state)
    return found


def truth(one: Instance) -> Array:
    """The distribution `[tokens, VOCABULARY]` of the next symbol after each token, if the word goes on."""
    rows = np.zeros((len(one.automaton.edges), VOCABULARY))
    for row, edges in zip(rows, one.automaton.edges, strict=True):
        row[[symbol for symbol, _ in edges]] = 1 / len(edges)
    return rows[states(one.automaton, one.tokens)]


def measure(predicted: Iterable[Array], instances: Iterable[Instance]) -> Measures:
    """Of predictions `[tokens, VOCABULARY]` for each instance, row t made from tokens up to t. All positions count the
    same. Of symbols that are equally likely the share that is allowed counts."""
    right, distance, positions = 0.0, 0.0, 0
    for rows, one in zip(predicted, instances, strict=True):
        scored = np.asarray(one.tokens[1:]) < SYMBOLS
        guess, true = rows[:-1][scored], truth(one)[:-1][scored]
        best = guess == guess.max(1, keepdims=True)
        right += float(((best & (true > 0)).sum(1) / best.sum(1)).sum())
        distance += float(np.abs(guess - true).sum()) / 2
        positions += len(guess)
    return Measures(right / positions, distance / positions)


def chance(one: Instance) -> Array:
    """Every symbol is as likely: `[tokens, VOCABULARY]`."""
    rows = np.zeros((len(one.tokens), VOCABULARY))
    rows[:, :SYMBOLS] = 1 / SYMBOLS
    return rows


def ngram(one: Instance, order: int = 3) -> Array:
    """What an n-gram model with back-off predicts that is fitted to the tokens so far: `[tokens, VOCABULARY]`.

    A word begins with order - 1 separators. After a history with c continuations so far, a symbol that followed it n
    times has n / (c + 1); 1 / (c + 1) is shared among the others as the next shorter history says. Below single symbols
    all are as likely.
    """
    counts: dict[Tokens, Array] = {}
    start: Tokens = (SEPARATOR,) * (order - 1)
    history, rows = start, np.zeros((len(one.tokens), VOCABULARY))
    for row, token in zip(rows, one.tokens, strict=True):
        if token == SEPARATOR:
            history = start
        else:
            for shorter in range(order):
                counts.setdefault(history[shorter:], np.zeros(SYMBOLS))[token] += 1
            history = (*history, token)[1:]
        guess = np.full(SYMBOLS, 1 / SYMBOLS)
        for shorter in reversed(range(order)):
            seen = counts.get(history[shorter:])
            if seen is not None:
                rest = np.where(seen > 0, 0.0, guess)
                left = rest.sum()
                guess = seen / (seen.sum() + 1) + rest / (left * (seen.sum() + 1)) if left else seen / seen.sum()
        row[:SYMBOLS] = guess
    return rows


def bayes(one: Instance, sizes: Sizes) -> Array:
    """The upper mark: exact predictions `[tokens, VOCABULARY]` of who is told the state after each token, but not
    which symbols a state has.

    The prior is that of `draw`: a random alphabet, of which each state has 1 to 3 random symbols. The posterior over
    the alphabet, and each state's symbols, is summed in closed form, from the symbols that were seen in every state so
    far. A model sees no states, so in the mean over automata none has a lower log loss or a higher accuracy. (That
    `minimal` merges states now and then is not in the prior.)
    """
    letters, holds = _alphabets(sizes)
    after = states(one.automaton, one.tokens)
    seen = np.zeros((len(one.automaton.edges), SYMBOLS))
    known = dict.fromkeys(range(len(seen)), _degrees(0, 0, sizes))
    evidence = np.zeros(len(letters))  # log, of what was seen in all states, by letters of the alphabet
    rows = np.zeros((len(one.tokens), VOCABULARY))
    before = 0
    for row, token, state in zip(rows, one.tokens, after, strict=True):
        if token != SEPARATOR:
            seen[before, token] += 1
            evidence -= known[before][0]
            known[before] = _degrees(int(seen[before].sum()), int((seen[before] > 0).sum()), sizes)
            evidence += known[before][0]
        ever, here = seen.any(0), seen[state] > 0
        unseen = SYMBOLS - int(ever.sum())
        weights = evidence + holds[SYMBOLS - unseen]
        weights = np.exp(weights - weights.max())
        weights /= weights.sum()
        _, each_seen, each_other = known[state]
        # A symbol that was never seen must be in the alphabet first.
        new = each_other * (letters - SYMBOLS + unseen) / max(1, unseen)
        row[:SYMBOLS] = np.where(here, weights @ each_seen, np.where(ever, weights @ each_other, weights @ new))
        before = state
    return rows


@lru_cache
def _alphabets(sizes: Sizes) -> tuple[NDArray[np.int64], Array]:
    """How many letters an alphabet may have, and for n = 0 .. SYMBOLS the log probability that a random one of so many
    letters holds n given symbols: `[n, letters]`."""
    letters = np.arange(sizes.alphabet[0], sizes.alphabet[1] + 1)
    given = np.arange(SYMBOLS + 1)[:, None]
    return letters, _log_choose(SYMBOLS - given, letters - given) - _log_choose(np.array(SYMBOLS), letters)


@lru_cache(maxsize=10_000)
def _degrees(count: int, different: int, sizes: Sizes) -> tuple[Array, Array, Array]:
    """Of a state in which `different` symbols were seen, `count` in all, by letters of the alphabet: the log likelihood
    of that, and the probability to come next of each symbol that was seen, and of each other of the alphabet."""
    letters = _alphabets(sizes)[0][:, None]
    degrees = np.arange(sizes.edges[0], sizes.edges[1] + 1)[None, :]
    # The share of a state's possible sets of symbols that hold these, and the probability of their order.
    log = _log_choose(letters - different, degrees - different) - _log_choose(letters, degrees)
    log = log - count * np.log(degrees)
    likelihood = np.logaddexp.reduce(log, axis=1)
    posterior = np.exp(log - likelihood[:, None])
    others = (posterior * (degrees - different) / degrees).sum(1)
    return likelihood, (posterior / degrees).sum(1), others / np.maximum(1, letters[:, 0] - different)


def _log_choose(n: NDArray[np.int64], k: NDArray[np.int64]) -> Array:
    """Log of how many sets of k there are of n; of k below 0 or above n there are none."""
    n, k = np.broadcast_arrays(n, k)
    some = (k >= 0) & (k <= n)
    found = np.full(n.shape, -np.inf)
    found[some] = _LOG_FACTORIALS[n[some]] - _LOG_FACTORIALS[k[some]] - _LOG_FACTORIALS[(n - k)[some]]
    return found
