import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.errors import TraceError
from thresher.kinetics.published import read_table, read_trace, trace_of_table

SETTINGS = {"model": "qwen3-8b", "method": "topk256", "task": "sums", "max_tokens": 100}
SAMPLE = {"question": "a", "gold": "4", "sample": 0, "length": 12, "score": 1.0, "answer": "4", "prompt": 7}


def written(path, *lines, settings=SETTINGS):
    entries = [{"traces": 1, "settings": settings}, *lines]
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in entries))
    return path


def test_own_format(tmp_path):
    path = written(
        tmp_path / "t.jsonl",
        SAMPLE,
        SAMPLE | {"sample": 1, "score": 0, "answer": None, "length": 100, "ended": False},
        "",
        SAMPLE | {"question": "b", "length": None, "text": "x x x"},
    )
    trace = read_trace(path, lambda text: len(text.split()))
    assert (trace.model, trace.method, trace.cap, trace.samples) == ("qwen3-8b", "topk256", 100, 1)
    a, b = trace.questions
    assert (a.key, a.gold, a.prompt, a.correct, a.lengths) == ("a", "4", 7, 1, [12, 100])
    assert [s.ended for s in a.samples] == [True, False]
    assert b.samples[0].length == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": ...}, "line 2: no gold"),
        ({"score": ...}, "line 2: no score"),
        ({"length": ...}, "line 2: no length; name a tokenizer"),
        ({"score": float("nan")}, "line 2: score is nan"),
        ({"score": 100}, "line 2: score is 100"),
        ({"length": -1}, "line 2: length is -1"),
        ({"length": "7"}, "line 2: length is '7'"),
        ({"length": True}, "line 2: length is True"),
        ({"prompt": -4}, "line 2: prompt is -4"),
        ({"model": "qwen3-4b"}, "line 2: model is 'qwen3-4b', and the file is of 'qwen3-8b'"),
        ({"method": "dense"}, "line 2: method is 'dense'"),
        ({"sample": [1]}, "line 2: unhashable"),
    ],
)
def test_lines_that_are_wrong(tmp_path, change, message):
    entry = {k: v for k, v in (SAMPLE | change).items() if v is not ...}
    with pytest.raises(TraceError, match=message):
        read_trace(written(tmp_path / "t.jsonl", entry))


def test_files_that_are_wrong(tmp_path):
    path = tmp_path / "t.jsonl"
    for lines, message in (
        ([SAMPLE, "{"], "line 3: not a JSON object"),
        ([SAMPLE, "[" * 100_000], "line 3: not a JSON object"),
        ([SAMPLE, SAMPLE], "line 3: sample 0 of question a is there twice"),
        ([SAMPLE, SAMPLE | {"sample": 1, "gold": "5"}], "line 3: gold is '5', and was '4'"),
        ([], "no samples"),
    ):
        with pytest.raises(TraceError, match=message):
            read_trace(written(path, *lines))
    for stated, message in (
        ({}, "line 1: the settings have no model"),
        (None, "line 1: not traces of version 1"),
        (SETTINGS | {"method": "topk-1"}, "t.jsonl: attention 'topk-1'"),
    ):
        with pytest.raises(TraceError, match=message):
            read_trace(written(path, SAMPLE, settings=stated))
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "nowhere")


def published(folder, name, *lines):
    path = folder / name
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def test_published_generations(tmp_path):
    name = "aime24_qwen3-1-7b_local0_block16_blocktopk64.jsonl"
    meta = {"attn_local": 0, "attn_block_topk": 64, "attn_block_size": 16, "task": "aime24", "pass@1": 0.5}
    answers = [
        {"query": "q", "choices": ["809"], "prediction": ["a b c"], "score": 100.0},
        {"query": "q", "choices": ["809"], "prediction": ["a b"], "score": 0.0},
    ]
    path = published(tmp_path, name, meta, *answers)
    trace = read_trace(path, lambda text: len(text.split()))
    assert (trace.model, trace.method, trace.task) == ("qwen3-1.7b", "block16x64", "aime24")
    assert [(s.length, s.score) for s in trace.questions[0].samples] == [(3, 1.0), (2, 0.0)]
    with pytest.raises(TraceError, match="name a tokenizer"):
        read_trace(path)
    count = len
    for lines, message in (
        ([meta | {"attn_block_topk": 32}, *answers], "it says block16x32, and the name says block16x64"),
        (answers, "line 1: a sample, where the first line must say"),
        ([meta, {k: v for k, v in answers[0].items() if k != "score"}], "line 2: no score"),
        ([meta, answers[0] | {"prediction": None}], "line 2: no prediction"),
        ([meta, answers[0] | {"score": float("nan")}], "line 2: score is nan"),
    ):
        with pytest.raises(TraceError, match=message):
            read_trace(published(tmp_path, name, *lines), count)
    with pytest.raises(TraceError, match="the name does not say"):
        read_trace(published(tmp_path, "x.jsonl", meta, *answers), count)


HEAD = "query_id,query,choices,generation_length,trial,coverage,compute_cost,memory_cost,total_cost"


def table(folder, *rows, name="aime24_qwen3-8b_dense_numTrials_tradeoff.csv", head=HEAD):
    path = folder / name
    path.write_text("\n".join((head, *rows)) + "\n")
    return path


def test_published_tables(tmp_path):
    path = table(tmp_path, '0,"a\nb",7,"[10, 20]",1,0.5,1.0,2.0,3.0', '0,"a\nb",7,"[10, 20]",2,1.0,2.0,4.0,6.0')
    found = read_table(path)
    assert (found.model, found.method, found.doubt) == ("qwen3-8b", "dense", "")
    assert [(r.samples, r.coverage, r.memory, r.lengths) for r in found.rows] == [
        (1, 0.5, 2.0, (10, 20)),
        (2, 1.0, 4.0, (10, 20)),
    ]
    trace = trace_of_table(found, lambda row: 5.0)
    assert [(s.length, s.score, s.ended) for s in trace.questions[0].samples] == [(10, 1.0, True), (20, 0.0, False)]
    with pytest.raises(TraceError, match="no rows of one sample"):
        trace_of_table(read_table(table(tmp_path, '0,q,7,"[10, 20]",2,1.0,2.0,4.0,6.0')), lambda row: 5.0)
    good = '0,q,7,"[10, 20]",1,0.5,1.0,2.0,3.0'
    assert len(read_table(table(tmp_path, good, '0,q,7,"[10, 20]",4,nan,1.0,2.0,3.0')).rows) == 1
    sparse = "aime24_qwen3-8b_local0_topk128_numTrials_tradeoff.csv"
    assert "costed as dense" in read_table(table(tmp_path, good, name=sparse)).doubt
    for rows, kind, message in (
        (['0,q,7,"[10, 20]",4,0.5,1.0,2.0,3.0'], {}, "line 2: 4 of 2 samples"),
        (['0,q,7,"[10, 20]",0,0.5,1.0,2.0,3.0'], {}, "line 2: trial is 0"),
        (['0,q,7,"[]",1,0.5,1.0,2.0,3.0'], {}, "line 2: generation_length"),
        (['0,q,7,"[1.5]",1,0.5,1.0,2.0,3.0'], {}, "line 2: generation_length"),
        (['0,q,7,"__import__",1,0.5,1.0,2.0,3.0'], {}, "line 2"),
        (['0,q,7,"[10]",1,1.5,1.0,2.0,3.0'], {}, "line 2: coverage is 1.5"),
        (['0,q,7,"[10]",1,nan,1.0,2.0,3.0'], {}, "line 2: coverage is nan"),
        ([good, '0,q,7,"[10, 20]",2,1.0,0,2.0,3.0'], {}, "line 3: costs are 0.0"),
        ([], {}, "no rows"),
        ([good], {"head": HEAD.replace("trial", "n")}, "no column trial"),
        ([good + ",256"], {"head": HEAD + ",budget", "name": sparse}, "budget is 256, and the name says 128"),
        ([good], {"name": "mine.csv"}, "the name does not say"),
    ):
        with pytest.raises(TraceError, match=message):
            read_table(table(tmp_path, *rows, **kind))


SHAPE = {
    "layers": 2,
    "q_heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "weight_bytes": 9,
    "weight_count": 9,
    "value_bytes": 2,
}
GOOD_TRACE = "".join(
    json.dumps(line) + "\n"
    for line in ({"traces": 1, "settings": SETTINGS | {"shape": SHAPE}}, SAMPLE, SAMPLE | {"sample": 1})
).encode()
GOOD_TABLE = (HEAD + '\n0,"a, b",7,"[10, 20]",1,0.5,1.0,2.0,3.0\n').encode()
pieces = st.one_of(
    st.binary(max_size=4), st.sampled_from([b"{", b"[", b'"', b"NaN", b"1e999", b"-1", b"null", b"\n", b","])
)


@settings(max_examples=300)
@given(data=st.data())
def test_files_that_were_altered_are_read_or_refused(tmp_path_factory, data):
    """Whatever bytes are changed: a trace, or a TraceError that names the file."""
    table = data.draw(st.booleans())
    content = GOOD_TABLE if table else GOOD_TRACE
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        content = content[:at] + data.draw(pieces) + content[at + data.draw(st.integers(0, 6)) :]
    name = "aime24_qwen3-8b_dense_numTrials_tradeoff.csv" if table else "t.jsonl"
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    read = read_table if table else read_trace
    found = []
    with contextlib.suppress(TraceError):
        found.append(read(path))
    if found:
        assert found[0].rows if table else found[0].questions
    else:
        with pytest.raises(TraceError, match=name):
            read(path)


def test_reading_folders_and_nothing(tmp_path):
    with pytest.raises(TraceError, match="Is a directory"):
        read_trace(tmp_path)
    with pytest.raises(TraceError, match="No such file"):
        read_table(Path(tmp_path / "aime24_qwen3-8b_dense.csv"))
