from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.speculation.drafters import Lookup, _common


def looked_up(ids, most, gamma):
    """By trying every place: the longest match of the last tokens, of those the latest."""
    for length in range(min(most, len(ids) - 1), 0, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == ids[-length:]:
                return ids[end : end + gamma]
    return []


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(0, 8),
    st.lists(st.integers(1, 4), max_size=8),
)
def test_lookup_finds_what_trying_every_place_finds(ids, most, gamma, steps):
    """Also while the text grows by some tokens at a time."""
    lookup = Lookup(most)
    n = 1
    for step in [0, *steps]:
        n = min(n + step, len(ids))
        assert lookup.draft(ids[: n - 1], ids[n - 1], gamma).token_ids == looked_up(ids[:n], most, gamma)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_common_beginning(a, b, cut):
    b = a[:cut] + b
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    for known in {0, expected // 2, expected}:
        assert _common(a, b, known) == expected
