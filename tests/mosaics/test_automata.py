"""Random automata: their languages, instances and labels, and predictions that can be counted by hand."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.errors import UsageError
from thresher.mosaics.automata import (
    IGNORED,
    PADDING,
    SEPARATOR,
    SYMBOLS,
    VOCABULARY,
    Automaton,
    Instance,
    Measures,
    Sizes,
    automata,
    batch,
    bayes,
    chance,
    draw,
    instance,
    measure,
    minimal,
    ngram,
    states,
    truth,
)

# Few letters, so that states often do the same and random words are often allowed.
DENSE = Sizes(states=(4, 9), alphabet=(3, 3))


def generator(seed=0):
    return np.random.default_rng(seed)


def drawn(count, seed=0, sizes=Sizes()):  # noqa: B008
    rng = generator(seed)
    return [instance(a, rng, sizes) for a in automata(count, rng, sizes)]


def words(tokens):
    found = [[]]
    for token in tokens:
        if token == SEPARATOR:
            found.append([])
        else:
            found[-1].append(token)
    return found


def walk(automaton, word):
    """Allowed symbols before each one of a word, and at its end; None after a symbol that is not."""
    state, found = 0, []
    for symbol in [*word, None]:
        edges = dict(automaton.edges[state])
        found.append(tuple(sorted(edges)))
        if symbol not in edges:
            return [*found, None] if symbol is not None else found
        state = edges[symbol]
    return found


def same(automaton):
    """Pairs of states that no word tells apart, by filling the table of pairs that one does."""
    edges = [dict(e) for e in automaton.edges]
    pairs = set(itertools.combinations(range(len(edges)), 2))
    apart = {(a, b) for a, b in pairs if edges[a].keys() != edges[b].keys()}
    while True:
        more = {
            (a, b)
            for a, b in pairs - apart
            if any((min(edges[a][x], edges[b][x]), max(edges[a][x], edges[b][x])) in apart for x in edges[a])
        }
        if not more:
            return pairs - apart
        apart |= more


def test_what_is_drawn():
    rng, sizes = generator(), Sizes()
    found = [draw(rng, sizes) for _ in range(600)]
    assert {len(a.edges) for a in found} == set(range(4, 13))
    assert {len(edges) for a in found for edges in a.edges} == {1, 2, 3}
    assert {symbol for a in found for edges in a.edges for symbol, _ in edges} == set(range(SYMBOLS))
    letters = [len({symbol for edges in a.edges for symbol, _ in edges}) for a in found]
    assert max(letters) <= 18
    assert min(letters) <= 4
    for a in found:
        for state, edges in enumerate(a.edges):
            symbols, targets = zip(*edges, strict=True)
            assert list(symbols) == sorted(set(symbols))
            assert len(set(targets)) == len(targets)
            assert state not in targets
            assert set(targets) <= set(range(len(a.edges)))
    assert len({len(draw(rng, DENSE).edges) for _ in range(100)}) == 6


@settings(max_examples=150)
@given(st.integers(0, 400), st.lists(st.integers(0, 2), max_size=14))
def test_minimisation_keeps_the_language(seed, word):
    """And the probabilities, which are those of the symbols that may follow."""
    automaton = draw(generator(seed), DENSE)
    alphabet = sorted({symbol for edges in automaton.edges for symbol, _ in edges})
    word = [alphabet[i % len(alphabet)] for i in word]
    assert walk(minimal(automaton), word) == walk(automaton, word)


def test_minimal_is_minimal():
    rng = generator(1)
    found = [draw(rng, sizes) for sizes in (DENSE, Sizes()) for _ in range(150)]
    assert sum(bool(same(a)) for a in found) > 30  # or this would show nothing
    for a in found:
        small = minimal(a)
        assert not same(small)
        reached = {0}
        for _ in small.edges:
            reached |= {t for state in reached for _, t in small.edges[state]}
        assert reached == set(range(len(small.edges)))
        assert minimal(small) == small
        others = [0, *(1 + rng.permutation(len(a.edges) - 1)).tolist()]  # the same with other numbers of states
        back = sorted(range(len(others)), key=others.__getitem__)
        assert minimal(Automaton(tuple(tuple((x, others[t]) for x, t in a.edges[s]) for s in back))) == small


def test_automata_differ():
    found = automata(60, generator(5), DENSE)
    assert len(set(found)) == 60
    assert found == automata(60, generator(5), DENSE)
    assert found[:20] == automata(20, generator(5), DENSE)
    assert found != automata(60, generator(6), DENSE)
    never = set(found[:30])
    others = automata(30, generator(5), DENSE, never)
    assert others == found[30:]
    single = Sizes(states=(2, 2), alphabet=(1, 1), edges=(1, 1))  # x* for one of 18 symbols x
    assert {a.edges for a in automata(18, generator(), single)} == {(((x, 0),),) for x in range(18)}
    with pytest.raises(UsageError, match="19 different automata were not found"):
        automata(19, generator(), single)


@pytest.mark.parametrize(
    "changes",
    [
        {"states": (5, 4)},
        {"words": (0, 3)},
        {"alphabet": (4, 19)},
        {"edges": (1, 4), "states": (4, 5)},
        {"edges": (1, 4), "states": (5, 5), "alphabet": (3, 9)},
        {"tokens": 1},
    ],
)
def test_sizes_that_cannot_be(changes):
    with pytest.raises(UsageError):
        Sizes(**changes)


def test_words_are_accepted():
    found = drawn(300)
    assert found == drawn(300)
    assert found != drawn(300, seed=1)
    lengths = set()
    for one in found:
        parts = words(one.tokens)
        assert 10 <= len(parts) <= 19
        lengths |= {len(w) for w in parts}
        assert all(None not in walk(one.automaton, w) for w in parts)
    assert {len(words(one.tokens)) for one in found} == set(range(10, 20))
    assert lengths == set(range(1, 50))
    assert max(len(one.tokens) for one in found) < Sizes().longest == 949


def test_instances_are_cut_by_tokens():
    whole, cut = drawn(20), drawn(20, sizes=Sizes(tokens=100))
    assert Sizes(tokens=100).longest == 100
    assert whole[0].tokens[:100] == cut[0].tokens
    assert all(len(one.tokens) == 100 for one in cut)


def test_edges_are_equally_likely():
    sizes = replace(Sizes(), words=(400, 400), symbols=(40, 40), tokens=20_000)
    for one in drawn(3, sizes=sizes):
        before = [0, *states(one.automaton, one.tokens)[:-1]]
        counts = np.zeros((len(one.automaton.edges), SYMBOLS))
        for state, token in zip(before, one.tokens, strict=True):
            if token != SEPARATOR:
                counts[state, token] += 1
        for state, edges in enumerate(one.automaton.edges):
            total = counts[state].sum()
            for symbol, _ in edges:
                assert abs(counts[state, symbol] / total - 1 / len(edges)) < 4 * math.sqrt(0.25 / total)


def test_labels():
    found = drawn(8)
    tokens, labels = batch(found)
    assert tokens.shape == labels.shape == (8, max(len(one.tokens) for one in found))
    for row, label, one in zip(tokens, labels, found, strict=True):
        length = len(one.tokens)
        assert tuple(row[:length]) == one.tokens
        assert (row[length:] == PADDING).all()
        expected = [IGNORED if t == SEPARATOR else t for t in one.tokens]
        assert list(label) == expected + [IGNORED] * (len(row) - length)
    assert (labels == IGNORED).sum() > 8 * 9


def test_the_truth_is_right():
    found = drawn(30)
    assert measure(map(truth, found), found) == Measures(1.0, 0.0)
    for one in found[:10]:
        rows = truth(one)
        assert rows.shape == (len(one.tokens), VOCABULARY)
        state = 0
        for row, token in zip(rows, one.tokens, strict=True):
            state = 0 if token == SEPARATOR else dict(one.automaton.edges[state])[token]
            allowed = [symbol for symbol, _ in one.automaton.edges[state]]
            assert dict(zip(*np.unique(row, return_counts=True), strict=True)) == {
                0: VOCABULARY - len(allowed),
                1 / len(allowed): len(allowed),
            }
            assert (row[allowed] > 0).all()
    with pytest.raises(ValueError, match="symbol 7 at token 2"):
        states(Automaton((((3, 0),),)), (3, SEPARATOR, 7))


def test_measures_by_hand():
    """ab, a: after a always b, after b always a. Scored are the predictions of b and of the second word's a."""
    automaton = Automaton((((0, 1),), ((1, 0),)))
    one = Instance(automaton, (0, 1, SEPARATOR, 0))
    rows = np.zeros((4, VOCABULARY))
    rows[0, [1, 5]] = 0.6, 0.4
    rows[1, 9] = 1  # before a separator: does not count
    rows[2, [0, 2, SEPARATOR]] = 0.25, 0.25, 0.5  # a separator instead of a symbol is wrong
    rows[3, 9] = 1  # nothing follows
    assert measure([rows], [one]) == Measures(0.5, pytest.approx((0.4 + 0.75) / 2))
    rows[2, [0, 2, SEPARATOR]] = 0.5, 0.5, 0
    assert measure([rows], [one]) == Measures(0.75, pytest.approx((0.4 + 0.5) / 2))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ngram_by_counting(order):
    (one,) = drawn(1, 4, Sizes(words=(4, 6), symbols=(1, 15)))

    def backed_off(history, seen):
        """p(. | history) from the words so far, in fractions."""
        padded = [[SEPARATOR] * (order - 1) + w for w in seen]
        follow = [w[i] for w in padded for i in range(order - 1, len(w)) if w[i - len(history) : i] == history]
        lower = backed_off(history[1:], seen) if history else [Fraction(1, SYMBOLS)] * SYMBOLS
        others = sum(p for x, p in enumerate(lower) if x not in follow)
        share = [Fraction(follow.count(x)) if x in follow else lower[x] / others for x in range(SYMBOLS)]
        return [p / (len(follow) + 1) for p in share]

    rows = ngram(one, order)
    assert np.allclose(rows.sum(1), 1)
    for t in range(0, len(one.tokens), 7):
        seen = words(one.tokens[: t + 1])
        history = ([SEPARATOR] * (order - 1) + seen[-1])[len(seen[-1]) :]
        expected = [float(p) for p in backed_off(history, seen)]
        assert np.allclose(rows[t, :SYMBOLS], expected, atol=1e-12)
        assert (rows[t, SYMBOLS:] == 0).all()


def test_ngram_when_every_symbol_was_seen():
    one = Instance(Automaton((tuple((x, 0) for x in range(SYMBOLS)),)), (*range(SYMBOLS), 0))
    assert np.allclose(ngram(one, 1)[-1, :SYMBOLS], [2 / 19] + [1 / 19] * 17)


def test_bayes_by_enumeration():
    """Every alphabet, and every set of symbols of every state."""
    sizes = Sizes(states=(4, 5), alphabet=(3, 4), edges=(1, 3), words=(3, 4), symbols=(1, 9))
    (one,) = drawn(1, 3, sizes)
    rows = bayes(one, sizes)
    assert np.allclose(rows.sum(1), 1)
    after = states(one.automaton, one.tokens)
    for t in (0, 1, 2, 4, 8, len(one.tokens) - 1):
        seen = {state: [] for state in range(len(one.automaton.edges))}
        for state, token in zip([0, *after[:t]], one.tokens[: t + 1], strict=True):
            if token != SEPARATOR:
                seen[state].append(token)
        expected = np.zeros(SYMBOLS)
        for letters in (3, 4):
            for alphabet in itertools.combinations(range(SYMBOLS), letters):
                subsets = [
                    (c, 1 / math.comb(letters, k)) for k in (1, 2, 3) for c in itertools.combinations(alphabet, k)
                ]
                weight = 1 / math.comb(SYMBOLS, letters)
                for symbols in seen.values():
                    if symbols:
                        weight *= sum(p * len(c) ** -len(symbols) for c, p in subsets if set(symbols) <= set(c))
                here = seen[after[t]]
                fit = [(c, p * len(c) ** -len(here)) for c, p in subsets if set(here) <= set(c)] if weight else []
                total = sum(p for _, p in fit)
                for c, p in fit:
                    expected[list(c)] += weight * p / total / len(c)
        assert np.allclose(rows[t, :SYMBOLS], expected / expected.sum(), atol=1e-12), t


def test_ngram_lies_between_chance_and_bayes():
    sizes, found = Sizes(), drawn(40)
    low, middle, high = (measure(map(f, found), found) for f in (chance, ngram, lambda one: bayes(one, sizes)))
    assert low.accuracy < 0.15 < 0.9 < middle.accuracy < high.accuracy - 0.02
    assert low.tvd > 0.85 > 0.35 > middle.tvd > high.tvd + 0.1
    assert high.tvd > 0.01  # it must see a state to know it
