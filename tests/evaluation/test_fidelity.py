"""Fidelity: dense is at distance 0 from itself, larger budgets are nearer, and what is read is counted."""

import pytest

from thresher.attention.registry import parse_method
from thresher.errors import CapacityError
from thresher.evaluation.bench import synthetic_cache
from thresher.evaluation.fidelity import score_text, summarize
from thresher.evaluation.journal import Journal
from thresher.evaluation.teacher import prefill

IDS = [3 + (i * 7919) % 250 for i in range(400)]
METHODS = [
    parse_method(text)
    for text in (
        "dense",
        "topk:budget=4,dense_below=0,window=8",
        "topk:budget=64,dense_below=0,window=8",
        "streaming:window=32",
    )
]


@pytest.fixture(scope="module")
def rows(tiny):
    return summarize(list(score_text(tiny, "text", IDS, 300, 24, METHODS)))


def test_dense_is_itself(rows):
    assert rows[0].kl.mean < 1e-9
    assert rows[0].top1 == rows[0].kv_read == 1
    assert rows[0].output_error < 1e-6


def test_more_is_nearer(rows):
    assert rows[0].kl.mean < rows[2].kl.mean < rows[1].kl.mean
    assert rows[2].output_error < rows[1].output_error
    assert rows[1].rows < rows[2].rows < 300


def test_streaming_reads_its_window(rows):
    assert rows[3].kv_read == pytest.approx(36 / 300)


def test_a_journal_goes_on(tiny, tmp_path):
    with Journal(tmp_path / "j", {}) as journal:
        once = list(score_text(tiny, "text", IDS, 100, 4, METHODS[:2], journal=journal))
    with Journal(tmp_path / "j", {}) as journal:
        assert list(score_text(tiny, "text", IDS, 100, 4, METHODS[:2], journal=journal)) == once


def test_too_long(tiny):
    with pytest.raises(CapacityError, match="positions"):
        list(score_text(tiny, "text", IDS * 2, 600, 4, METHODS[:1]))


def test_synthetic_rows_are_like_the_real_ones(tiny):
    real = prefill(tiny, IDS[:200])
    long = synthetic_cache(real, 2000)
    assert long.length == 2000
    assert (long.rows(0, 200) == real.rows(0, 200)).all()
    before, after = real.rows(64, 200).float(), long.rows(200, 2000).float()
    assert ((before.mean(3) - after.mean(3)).abs() < 0.5 * before.std(3) + 1e-3).all()
    assert ((after.std(3) / before.std(3).clamp(min=1e-6)).log().abs().mean()) < 0.2
