"""Indexes in KV files: what `read` built is what `open` uses, and nothing a stranger wrote reaches the kernels
unchecked."""

import os

import pytest
import torch

from thresher import LLM, SamplingParams
from thresher.attention.index import Index
from thresher.attention.registry import METHODS
from thresher.cache import file as kv
from thresher.cache.sequence import KVSequence
from thresher.errors import KVFileDamagedError, KVFileError, ThresherError

TEXT = "It was the best of times, it was the worst of times. " * 8
GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)
SETTINGS = "dense_below=0,window=8,dense_layers=0"


def llm_with(folder, attention, **kwargs):
    return LLM(folder, weights="float32", attention=attention, **kwargs)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("dense", "streaming", "topk", "sample")])
def test_a_file_brings_its_index(tiny_folder, tmp_path, name):
    llm = llm_with(tiny_folder, f"{name}:{SETTINGS}")
    made = llm.read(TEXT, tmp_path / "x.kv")
    opened = llm.open(tmp_path / "x.kv")
    first, second = made.sequence.fork(), opened.sequence
    built = llm.runner.prepare(first, llm.attention)
    assert isinstance(second.index, Index)
    assert second.index.serves(llm.attention)
    assert [(b.begin, b.end) for b in second.index.blocks] == [(b.begin, b.end) for b in built.blocks]
    for ours, theirs in zip(built.blocks, second.index.blocks, strict=True):
        assert all(torch.equal(ours.arrays[n].view(torch.uint8), t.view(torch.uint8)) for n, t in theirs.arrays.items())
    question = "What times?"
    assert llm.ask(opened, question, GREEDY)[0][0].token_ids == llm.ask(made, question, GREEDY)[0][0].token_ids


def test_an_index_of_another_method_is_said_and_replaced(tiny_folder, tmp_path):
    llm_with(tiny_folder, f"quest:{SETTINGS}").read(TEXT, tmp_path / "x.kv")
    said = []
    llm = llm_with(tiny_folder, f"sign:{SETTINGS}", progress=said.append)
    said.clear()
    context = llm.open(tmp_path / "x.kv")
    assert "quest" in said[-1]
    assert "building one for sign" in said[-1]
    llm.ask(context, "What?", GREEDY)
    assert context.sequence.index.serves(llm.attention)


def test_a_budget_may_change_without_building(tiny_folder, tmp_path):
    llm_with(tiny_folder, f"sign:{SETTINGS},budget=4").read(TEXT, tmp_path / "x.kv")
    said = []
    llm = llm_with(tiny_folder, f"sign:{SETTINGS},budget=4096", progress=said.append)
    said.clear()
    context = llm.open(tmp_path / "x.kv")
    assert not said
    exact = llm_with(tiny_folder, "dense")
    answers = [m.ask(m.open(tmp_path / "x.kv"), "What?", GREEDY)[0][0].token_ids for m in (llm, exact)]
    assert answers[0] == answers[1]
    assert context.sequence.index.blocks


def test_short_documents_have_no_index_and_say_so(tiny_folder, tmp_path):
    said = []
    llm = llm_with(tiny_folder, "sign", progress=said.append)
    llm.read(TEXT, tmp_path / "x.kv")
    said.clear()
    assert llm.open(tmp_path / "x.kv").sequence.index is None
    assert "dense up to" in said[-1]


HARM = {
    "ids": lambda t: t.view(torch.int16).flatten().__setitem__(0, -1),
    "heads": lambda t: t.flatten().__setitem__(3, 1 << 30),
    "assigned": lambda t: t.view(torch.int16).flatten().__setitem__(5, -1),
}


@pytest.mark.parametrize(
    ("attention", "array"), [("lsh:K=4,L=8", "ids"), ("lsh:K=4,L=8", "heads"), ("sign:tail=4", "assigned")]
)
def test_positions_out_of_bounds_are_refused(tiny_folder, tmp_path, attention, array):
    """Checksums do not help against one who writes them: numbers that kernels follow are checked."""
    separator = "," if ":" in attention else ":"
    llm = llm_with(tiny_folder, attention + separator + SETTINGS, allow_extrapolation=True)
    context = llm.read("word " * 240, None)  # enough for a block with tables
    index = llm.runner.prepare(context.sequence, llm.attention)
    meta, arrays = index.state()
    arrays = {n: t.clone() for n, t in arrays.items()}
    HARM[array](next(t for n, t in arrays.items() if n.endswith("/" + array)))
    kv.save(
        tmp_path / "x.kv",
        context.sequence,
        identity=llm.identity,
        weights="float32",
        framing="plain",
        arrays=(meta, arrays),
    )
    with pytest.raises(KVFileDamagedError, match="index"):
        llm.open(tmp_path / "x.kv")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_rows_that_are_not_numbers_end_in_one_line(tiny_folder, tmp_path, name, value):
    """Whatever a method makes of them. A few may never be read; of all there is no answer."""
    llm = llm_with(tiny_folder, name if name == "dense" else f"{name}:{SETTINGS}")
    rows = llm.read(TEXT).sequence
    for positions in (slice(100, 101), slice(None)):
        made = KVSequence(rows.layout)
        kept = rows.rows(0, rows.length)
        kept[1:, :, :, positions] = value
        made.append(rows.token_ids, kept)
        kv.save(tmp_path / "x.kv", made, identity=llm.identity, weights="float32", framing="plain")
        context = llm.open(tmp_path / "x.kv")
        said = ""
        try:
            llm.ask(context, "What?", GREEDY)
        except ThresherError as error:
            said = str(error)
        assert "\n" not in said
        assert said or positions != slice(None) or value == 3e38
        context.close()


def test_a_file_that_is_cut_harms_no_other_context(tiny_folder, tmp_path):
    """Its page faults do not end the process, and the answers that its zeros would give are not given."""
    llm = llm_with(tiny_folder, f"lsh:K=4,L=8,{SETTINGS}", allow_extrapolation=True)
    for name in ("cut", "whole"):
        llm.read("word " * 240, tmp_path / f"{name}.kv")
    cut, whole = (llm.open(tmp_path / f"{name}.kv", verify=False) for name in ("cut", "whole"))
    expected = llm.ask(whole, "What?", GREEDY)[0][0].token_ids
    os.truncate(tmp_path / "cut.kv", 5000)
    with pytest.raises(KVFileDamagedError, match="cut.kv was cut while it was open"):
        llm.ask(cut, "What?", GREEDY)
    with pytest.raises(KVFileDamagedError, match="cut.kv was cut while it was open"):
        llm.save(cut, tmp_path / "copy.kv")
    assert not (tmp_path / "copy.kv").exists()
    assert llm.ask(whole, "What?", GREEDY)[0][0].token_ids == expected


@pytest.mark.parametrize(
    "change",
    [
        {"method": "nothing"},
        {"method": "dense"},
        {"method": 3},
        {"blocks": [[4, 68]]},
        {"blocks": [[0, 64], [64, 128]]},
        {"blocks": [[4, 1 << 40]]},
        {"blocks": "x"},
        {"blocks": [[4]]},
        {"blocks": [[4.0, 68]]},
        {"method": "a" * 60000},
    ],
)
def test_nonsense_is_refused(tiny_folder, tmp_path, change):
    llm = llm_with(tiny_folder, f"sign:{SETTINGS}")
    context = llm.read(TEXT)
    meta, arrays = llm.runner.prepare(context.sequence, llm.attention).state()
    options = {"identity": llm.identity, "weights": "float32", "framing": "plain"}
    kv.save(tmp_path / "x.kv", context.sequence, **options, arrays=(meta | change, arrays))
    with pytest.raises(KVFileError) as caught:
        llm.open(tmp_path / "x.kv")
    assert len(str(caught.value)) < 500
