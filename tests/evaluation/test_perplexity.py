import math

import pytest
import torch

from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Work
from thresher.errors import CapacityError, UsageError
from thresher.evaluation.methods import parse_methods
from thresher.evaluation.perplexity import begin_tokens, score_windows, summarize, text_windows

IDS = torch.randint(3, 259, (900,), generator=torch.Generator().manual_seed(0)).tolist()
METHODS = parse_methods(["streaming:sinks=1,window=4000;streaming:sinks=1,window=8"])


def test_windows_spread_over_the_text():
    parts = text_windows(IDS, 100, 20, 5)
    assert [len(part) for part in parts] == [120] * 5
    assert parts[0] == IDS[:120]
    assert parts[-1] == IDS[780:]
    with pytest.raises(UsageError, match="the text has 900"):
        text_windows(IDS, 200, 30, 4)
    with pytest.raises(UsageError, match="must be 1 or more"):
        text_windows(IDS, 0, 30, 4)


def test_losses_are_those_of_one_dense_pass(tiny):
    parts = text_windows(IDS, 100, 20, 2)
    scores = list(score_windows(tiny, parts, 100, METHODS))
    dense, wide, narrow = scores[:3]
    sequence = KVSequence(tiny.runner.layout)
    tiny.runner.run([Work(sequence, parts[0][:99], False)])
    for loss, before, token in zip(dense.losses, parts[0][99:], parts[0][100:], strict=False):
        logits = tiny.runner.run([Work(sequence, [before], True)])[0].double()
        assert loss == pytest.approx(float(logits.logsumexp(0) - logits[token]), abs=1e-6)
    assert wide.losses == dense.losses
    assert all(a != b for a, b in zip(narrow.losses, dense.losses, strict=True))
    rows = summarize(scores)
    assert [row.method for row in rows] == [str(m) for m in METHODS]
    assert rows[0].perplexity.mean == pytest.approx(math.exp(sum(s for w in scores[::3] for s in w.losses) / 40))
    assert rows[0].ratio is None
    assert rows[1].ratio.mean == 1
    assert rows[0].tokens == 40


def test_too_long(tiny):
    with pytest.raises(CapacityError, match="512 positions"):
        list(score_windows(tiny, text_windows(IDS, 500, 20, 1), 500, METHODS))


def test_tokens_before_a_text(tiny):
    assert begin_tokens(tiny.model.tokenizer) == []
