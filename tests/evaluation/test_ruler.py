import json
import re

import pytest

from conftest import byte_tokenizer
from thresher import LLM, SamplingParams
from thresher.attention.streaming import Streaming
from thresher.errors import CapacityError, UsageError
from thresher.evaluation.journal import Journal
from thresher.evaluation.methods import parse_methods
from thresher.evaluation.ruler.run import run_settings, run_tasks
from thresher.evaluation.ruler.samples import build_sample
from thresher.evaluation.ruler.sources import SampleKey, Sources, read_questions
from thresher.evaluation.ruler.summary import notes, summarize
from thresher.evaluation.ruler.tasks import TASKS, choose_tasks, string_match_all, string_match_part

TEXT = "The miller went to the river. There he saw a heron! Was it asleep? It was not; it waited for a fish. " * 20
SOURCES = Sources("text", TEXT)
TOKENIZER = byte_tokenizer()
LENGTH = 6000  # bytes are tokens here

# Bytes of one unit of haystack, at most: a prompt may be that much shorter than what was wanted.
UNIT = {"noise": 91, "words": 20, "needles": 140, "numbered": 130, "coded": 40, "documents": 330}
UNITS = dict.fromkeys(TASKS, UNIT["words"]) | {
    "niah_single_1": UNIT["noise"],
    "niah_multikey_2": UNIT["needles"],
    "niah_multikey_3": UNIT["needles"],
    "vt": UNIT["noise"],
    "cwe": UNIT["numbered"],
    "fwe": UNIT["coded"],
    "qa_1": UNIT["documents"],
    "qa_2": UNIT["documents"],
}


def build(task, length=LENGTH, index=0, seed=0, sources=SOURCES, framing="chat"):
    if task == "cwe":  # 30 times each of 10 words needs more bytes
        length = max(length, 12_000)
    return build_sample(SampleKey(task, length, index, seed), sources, TOKENIZER, framing)


@pytest.mark.parametrize("task", TASKS)
def test_length_is_what_was_wanted(task):
    for index in range(3):
        sample = build(task, index=index)
        tokens = len(sample.token_ids) + TASKS[task].tokens_to_generate
        assert sample.key.length - UNITS[task] <= tokens <= sample.key.length


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_prompt(task):
    assert build(task) == build(task)
    others = [build(task, index=1), build(task, seed=1)]
    assert all(other.token_ids != build(task).token_ids for other in others)


@pytest.mark.parametrize("task", TASKS)
def test_prompt_holds_its_answers_and_begins_the_models_turn(task):
    sample = build(task)
    text = TOKENIZER.decode(sample.token_ids)
    assert text.startswith("[user]")
    assert text.endswith("[assistant]" + sample.draft.answer_prefix)
    assert sample.draft.references
    assert all(reference in sample.draft.text for reference in sample.draft.references)
    assert len(set(sample.draft.references)) == len(sample.draft.references)
    plain = TOKENIZER.decode(build(task, framing="plain").token_ids)
    assert plain.endswith(sample.draft.answer_prefix)
    assert "[user]" not in plain


@pytest.mark.parametrize(
    ("task", "needles", "answers"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multikey_2", None, 1),
        ("niah_multikey_3", None, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_lead_from_the_question_to_the_answer(task, needles, answers):
    for seed in range(5):
        sample = build(task, seed=seed)
        found = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", sample.draft.text)
        assert len(found) == (sample.amount + 1 if needles is None else needles)
        kinds = {kind for kind, _, _ in found}
        assert kinds == {"uuids" if task in ("niah_single_3", "niah_multikey_3") else "numbers"}
        question = re.search(r"magic \w+ for (.*?) mentioned in the provided text\?", sample.draft.text).group(1)
        asked = re.split(r", and |, ", question)
        wanted = [value for name in asked for _, key, value in found if key == name]
        assert sorted(wanted) == sorted(sample.draft.references)
        assert len(wanted) == answers


def test_variables_form_one_chain():
    sample = build("vt")
    asked = sample.draft.text.split("\n\n\n\n")[1]  # behind the worked example
    value = re.search(r"assigned the value (\d+) in", asked).group(1)
    (held,) = re.findall(rf"VAR ([A-Z]+) = {value}", asked)
    for before, name in re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+)", asked):
        assert name in (held, *sample.draft.references)
        assert before in sample.draft.references
    assert sample.draft.references[0] == held
    assert len(sample.draft.references) == 5
    assert value not in sample.draft.text.split("\n\n\n\n")[0]


@pytest.mark.parametrize(("length", "often", "seldom"), [(4000, 6, 1), (12_000, 30, 3)])
def test_common_words_are_common(length, often, seldom):
    sample = build_sample(SampleKey("cwe", length, 0, 0), SOURCES, TOKENIZER, "plain")
    listed = sample.draft.text.rpartition("most often.\n")[2].rpartition("\nQuestion")[0]
    words = re.findall(r"\d+\. (\S+)", listed)
    counts = {word: words.count(word) for word in words}
    assert {word for word, n in counts.items() if n == often} == set(sample.draft.references)
    assert {n for word, n in counts.items() if word not in sample.draft.references} <= {seldom}
    assert len(sample.draft.references) == 10


@pytest.mark.parametrize("length", [1500, 6000, 20_000])
def test_frequent_words_are_the_most_frequent(length):
    sample = build("fwe", length=length)
    words = sample.draft.text.rpartition("coded words. ")[2].rpartition("\nQuestion")[0].split()
    counts = {word: words.count(word) for word in words}
    ranked = sorted(counts, key=lambda word: -counts[word])
    assert ranked[0] == "..."
    assert tuple(ranked[1:4]) == sample.draft.references
    assert counts[ranked[3]] > counts[ranked[4]]


def test_invented_questions_have_one_answer():
    for task in ("qa_1", "qa_2"):
        text = build(task, seed=3).draft.text
        name = re.search(r"(?:town was |teacher of )(\w+ \w+) born\?", text).group(1)
        if task == "qa_2":
            name = re.search(rf"{name} learned the trade from (\w+ \w+)\.", text).group(1)
        (town,) = re.findall(rf"{name} was born in the town of (\w+)", text)
        assert build(task, seed=3).draft.references == (town,)


def test_question_files(tmp_path):
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": f"Fact {a}{p}: the answer is colour{a}{p}.",
                        "qas": [
                            {"question": f"Which {a}{p}?", "answers": [{"text": f"colour{a}{p}"}]},
                            {"question": "None?", "answers": [], "is_impossible": True},
                        ],
                    }
                    for p in range(3)
                ]
            }
            for a in range(5)
        ]
    }
    hotpot = [
        {"question": f"Who {i}?", "answer": f"person{i}", "context": [[f"T{i}", [f"It was person{i}.", " Yes."]]]}
        for i in range(9)
    ]
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    (tmp_path / "hotpot.json").write_text(json.dumps(hotpot))
    sources = Sources("text", TEXT, read_questions([tmp_path / "squad.json", tmp_path / "hotpot.json"]))
    sample = build("qa_1", 1000, 4, sources=sources)
    assert sample.draft.references == ("colour11",)
    assert all(f"Fact 1{p}" in sample.draft.text for p in range(3))  # the article's own come first
    assert build("qa_2", 1000, 2, sources=sources).draft.references == ("person2",)
    assert "T2\nIt was person2. Yes." in build("qa_2", 1000, 2, sources=sources).draft.text
    with pytest.raises(UsageError, match="holds 15 questions"):
        build("qa_1", 1000, 15, sources=sources)
    for content, words in (("{}", "neither in SQuAD"), ("[1", "not a JSON"), ("[]", "no questions")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UsageError, match=words):
            read_questions([tmp_path / "bad.json"])
    with pytest.raises(UsageError, match="second file in squad format"):
        read_questions([tmp_path / "squad.json"] * 2)
    assert notes([], choose_tasks(["qa"]), sources) == []
    assert len(notes([], choose_tasks(["qa"]), SOURCES)) == 2


def test_scores():
    assert string_match_all("It is 123 and ABC", ["123", "abc", "9", "8"]) == 0.5
    assert string_match_part("It is Paris.", ["paris", "Lyon"]) == 1
    assert string_match_part("It is Rome.", ["paris", "Lyon"]) == 0


def test_choosing():
    assert len(choose_tasks(["all"])) == 13
    assert [t.name for t in choose_tasks(["qa", "vt", "qa_1"])] == ["qa_1", "qa_2", "vt"]
    with pytest.raises(UsageError, match="task 'hay': not known"):
        choose_tasks(["hay"])
    with pytest.raises(UsageError, match="it needs"):
        build_sample(SampleKey("vt", 300, 0, 0), SOURCES, TOKENIZER, "chat")
    methods = parse_methods(["streaming:sinks=1,window=9; dense", "streaming:sinks=1,window=9"])
    assert [str(m) for m in methods] == ["dense", "streaming:sinks=1,window=9"]


@pytest.fixture(scope="module")
def long_tiny(tiny_folder):
    return LLM(tiny_folder, weights="float32", allow_extrapolation=True)


def run(llm, journal=None, samples=2, methods="streaming:sinks=1,window=100000;streaming:sinks=1,window=16"):
    tasks = choose_tasks(["niah_single_1", "qa_1"])
    return list(
        run_tasks(llm, tasks, [1500], samples, parse_methods([methods]), SOURCES, framing="chat", journal=journal)
    )


@pytest.fixture(scope="module")
def outcomes(long_tiny):
    return run(long_tiny)


def test_a_method_that_sees_everything_answers_as_dense(long_tiny, outcomes):
    assert [(o.task, o.index) for o in outcomes[::3]] == [(t, i) for t in ("niah_single_1", "qa_1") for i in (0, 1)]
    for dense, wide, narrow in zip(outcomes[::3], outcomes[1::3], outcomes[2::3], strict=True):
        assert wide.answer == dense.answer
        assert (dense.kv_read, wide.kv_read) == (1, 1)
        assert narrow.kv_read == pytest.approx(17 / narrow.prompt_tokens)
        assert dense.prompt_tokens <= 1500
    sample = build_sample(SampleKey("qa_1", 1500, 0, 0), SOURCES, long_tiny.model.tokenizer, "chat")
    params = SamplingParams(max_new_tokens=TASKS["qa_1"].tokens_to_generate)
    assert outcomes[6].answer == long_tiny.generate([list(sample.token_ids)], params)[0][0].text


def test_summary(outcomes):
    rows = summarize(outcomes)
    assert [(r.task, r.samples) for r in rows[::3]] == [("niah_single_1", 2), ("qa_1", 2), ("all", 4)]
    assert rows[0].difference is None
    assert rows[1].difference.mean == 0
    assert any("fails with dense" in note for note in notes(rows, choose_tasks(["vt"]), SOURCES))


def test_a_run_goes_on_from_its_journal(long_tiny, outcomes, tmp_path, monkeypatch):
    path, settings = tmp_path / "j", run_settings(long_tiny, SOURCES, "chat")
    with Journal(path, settings) as journal:
        begun = run(long_tiny, journal, samples=1)
    reads = []
    stock = long_tiny.runner.run
    monkeypatch.setattr(long_tiny.runner, "run", lambda batch: reads.append(batch) or stock(batch))
    with Journal(path, settings) as journal:
        assert run(long_tiny, journal, samples=1) == begun
        assert not reads
        again = run(long_tiny, journal)
    assert reads
    assert begun == [o for o in again if o.index == 0]
    assert [o.answer for o in again] == [o.answer for o in outcomes]


def test_too_long(tiny, long_tiny):
    with pytest.raises(CapacityError, match="512 positions"):
        run(tiny)
    with pytest.raises(UsageError, match="does not fit into 100 tokens"):
        list(run_tasks(long_tiny, choose_tasks(["vt"]), [100], 1, [Streaming()], SOURCES, framing="chat"))
