"""Sparse methods as the engine runs them, on tiny models in float32."""

import pytest
import torch

from conftest import byte_tokenizer, tiny_module
from thresher import LLM, SamplingParams
from thresher.attention.index import Index
from thresher.attention.registry import METHODS, parse_method
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Work
from thresher.engine.requests import Request

READ = "sinks=2,window=16,dense_layers=none,dense_below=0"
SPARSE = {
    "auto": f"auto:budget=12,tail=4,{READ}",
    "lsh": f"lsh:K=3,L=12,{READ}",
    "sign": f"sign:budget=12,{READ}",
    "verified": f"verified:heavy=8,epsilon=0.9,delta=0.6,{READ}",
    "clusters": f"clusters:budget=24,tokens=8,{READ}",
    "quest": f"quest:budget=16,page=8,{READ}",
    "block_topk": f"block_topk:budget=16,block=4,tail=2,{READ}",
    "snapkv": f"snapkv:budget=12,observe=8,{READ}",
    "streaming": "streaming:sinks=2,window=16,dense_below=0",
    "topk": f"topk:budget=12,union=0,{READ}",
    "sample": f"sample:draws=12,{READ}",
}
COVERING = {
    "dense": "dense",
    "auto": f"auto:budget=512,{READ}",
    "lsh": f"lsh:K=0,L=2,{READ}",
    "sign": f"sign:budget=512,{READ}",
    "verified": f"verified:heavy=512,{READ}",
    "clusters": f"clusters:budget=512,{READ}",
    "quest": f"quest:budget=512,{READ}",
    "block_topk": f"block_topk:budget=512,{READ}",
    "snapkv": f"snapkv:budget=512,{READ}",
    "streaming": "streaming:sinks=0,window=4096",
    "topk": f"topk:budget=512,{READ}",
}
SAMPLED = [
    SamplingParams(max_new_tokens=30, temperature=1.0, seed=3, ignore_eos=True),
    SamplingParams(max_new_tokens=80, temperature=0.7, top_p=0.9, seed=4, ignore_eos=True),
    SamplingParams(max_new_tokens=70, ignore_eos=True),
    SamplingParams(max_new_tokens=20, temperature=1.3, top_k=20, seed=3, ignore_eos=True),
]
TEXT = "The quick brown fox jumps over the lazy dog. " * 6


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (1, 60, 150, 220)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine(tiny_folder):
    """The tiny model read by a method."""
    llm = LLM(tiny_folder, weights="float32")

    def by(text):
        llm.attention = parse_method(text)
        return llm

    return by


def tokens(completions):
    return [[choice.token_ids for choice in answer] for answer in completions]


def step(runner, ids, method, token=5):
    """A prompt, then one token by the method; the sequence, its logits, and what layers attended with."""
    sequence = KVSequence(runner.layout)
    runner.run([Work(sequence, ids, False)])
    logits, captured = runner.run_captured([Work(sequence, [token], True, method)])
    return sequence, logits, captured


def test_every_method_is_here():
    assert set(SPARSE) == set(METHODS) - {"dense"}
    assert set(COVERING) == set(METHODS) - {"sample"}


@pytest.mark.parametrize("name", SPARSE)
def test_results_do_not_depend_on_the_batch(engine, name):
    llm = engine(SPARSE[name])
    alone = [tokens(llm.generate([p], s))[0] for p, s in zip(prompts(), SAMPLED, strict=True)]
    assert tokens(llm.generate(prompts(), SAMPLED)) == alone
    assert tokens(llm.generate(prompts()[::-1], SAMPLED[::-1]))[::-1] == alone
    dense = [tokens(engine("dense").generate([p], s))[0] for p, s in zip(prompts(), SAMPLED, strict=True)]
    assert alone != dense  # it does read less
    assert [a[0][0] for a in alone] == [d[0][0] for d in dense]  # prompts are read densely


@pytest.mark.parametrize("name", SPARSE)
def test_results_do_not_depend_on_the_batch_in_bf16(tiny_folder, name):
    llm = LLM(tiny_folder, weights="bf16", attention=SPARSE[name])
    few = [SamplingParams(max_new_tokens=12, ignore_eos=True)] * 4
    alone = [tokens(llm.generate([p], s))[0] for p, s in zip(prompts(), few, strict=True)]
    assert tokens(llm.generate(prompts(), few)) == alone


@pytest.mark.parametrize("name", SPARSE)
def test_samples_share_a_prompt(engine, name):
    """Samples of one prompt are forks; the first is what a single sample gives, and all differ."""
    llm = engine(SPARSE[name])
    many = SamplingParams(max_new_tokens=40, temperature=1.0, seed=0, n=4, ignore_eos=True)
    single = SamplingParams(max_new_tokens=40, temperature=1.0, seed=0, ignore_eos=True)
    answers = tokens(llm.generate([prompts()[2]], many))[0]
    assert answers[0] == tokens(llm.generate([prompts()[2]], single))[0][0]
    assert len({tuple(a) for a in answers}) == 4


@pytest.mark.parametrize("name", SPARSE)
def test_questions_to_a_context(engine, name):
    """Questions go on from forks of a context that was read; alone or together makes no difference."""
    llm = engine(SPARSE[name])
    context = llm.read(TEXT)
    params = SamplingParams(max_new_tokens=15, ignore_eos=True)
    questions = ["Who jumps?", "Over what?", "How?"]
    together = tokens(llm.ask(context, questions, params))
    assert together == [tokens(llm.ask(context, q, params))[0] for q in questions]


@pytest.mark.parametrize("name", COVERING)
def test_a_budget_that_covers_the_context_gives_the_dense_tokens(engine, tiny, name):
    expected = tokens(tiny.generate(prompts(), SAMPLED))
    assert tokens(engine(COVERING[name]).generate(prompts(), SAMPLED)) == expected


@pytest.mark.parametrize("name", sorted(set(SPARSE) - {"streaming"}))
def test_only_layers_that_are_not_dense_are_read_sparsely(tiny, name):
    method = parse_method(SPARSE[name].replace("dense_layers=none", "dense_layers=0+2"))
    sequence, _, captured = step(tiny.runner, prompts()[-1], method)
    assert isinstance(sequence.index, Index)
    assert sequence.index.layers == [1, 3]
    for layer in range(4):
        same = torch.equal(captured.outputs[layer], captured.dense[layer])
        assert same == (layer in (0, 2))
    assert sequence.index.readings().readings == 2 * 2  # layers times KV heads


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_sliding_layers_stay_dense(tmp_path_factory, architecture):
    """All layers of the one have a sliding window, half of the other's."""
    folder = tmp_path_factory.mktemp("models") / architecture
    tiny_module(architecture).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    llm = LLM(folder, weights="float32")
    sliding = {0, 1, 2, 3} if architecture == "mistral" else {0, 2}
    ids = prompts()[-1]
    for name in sorted(set(SPARSE) - {"streaming"}):
        sequence, _, captured = step(llm.runner, ids, parse_method(SPARSE[name]))
        for layer in range(4):
            same = torch.equal(captured.outputs[layer], captured.dense[layer])
            assert same == (layer in sliding), name
        assert sequence.index.readings().readings == (4 - len(sliding)) * 2
    if architecture == "mistral":  # a tiny Gemma may say the same for other reasons; its layers are compared above
        dense = tokens(llm.generate([ids], SAMPLED[2]))
        llm.attention = parse_method(SPARSE["topk"])
        assert tokens(llm.generate([ids], SAMPLED[2])) == dense


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense", "streaming", "topk", "sample"}))
def test_short_contexts_stay_dense_by_default(engine, tiny, name):
    """No index is made where a method would not win. (The oracles never win, and are used at any length.)"""
    llm = engine(name)
    scheduler = llm.scheduler()
    scheduler.add(Request(0, prompts()[-1], SAMPLED[0], method=llm.attention))
    answer = []
    while scheduler.busy:
        answer += [e.choice.token for e in scheduler.step()]
        assert all(s.sequence.index is None for s in scheduler._samples)
    assert answer == tiny.generate([prompts()[-1]], SAMPLED[0])[0][0].token_ids


def test_dense_below_is_where_an_index_begins(tiny):
    for length, below, indexed in ((150, 150, False), (151, 150, True), (220, 500, False), (150, 0, True)):
        method = parse_method(f"topk:tail=2,budget=12,sinks=2,window=16,dense_layers=none,dense_below={below}")
        sequence, _, captured = step(tiny.runner, (prompts()[-1] * 2)[:length], method)
        assert (sequence.index is not None) == indexed
        assert torch.equal(captured.outputs, captured.dense) != indexed


def test_another_method_goes_on_with_the_sequence(tiny):
    """The index is kept where it serves the next method, and made anew where it does not."""
    sequence = KVSequence(tiny.runner.layout)
    tiny.runner.run([Work(sequence, prompts()[-1], False)])
    first = parse_method(f"sign:budget=12,{READ}")
    tiny.runner.run([Work(sequence, [5], True, first)])
    index = sequence.index
    tiny.runner.run([Work(sequence, [6], True, parse_method(f"sign:budget=30,{READ}"))])
    assert sequence.index is index
    tiny.runner.run([Work(sequence, [7], True, None)])
    assert sequence.index is index
    tiny.runner.run([Work(sequence, [8], True, parse_method(f"quest:budget=16,{READ}"))])
    assert sequence.index is not index
    logits = tiny.runner.run([Work(sequence, [9], True, first)])
    other = KVSequence(tiny.runner.layout)
    # The same index is made from the same rows: those that the sequence has now.
    other.append(sequence.token_ids[:-1], sequence.rows(0, sequence.length - 1))
    assert torch.equal(tiny.runner.run([Work(other, [9], True, first)]), logits)


def test_a_question_is_read_densely(tiny):
    """Also one after an answer, as a chat has it."""
    method = parse_method(SPARSE["topk"])
    sequence, _, _ = step(tiny.runner, prompts()[-1], method)
    _, captured = tiny.runner.run_captured([Work(sequence, [5, 6, 7], True)])
    assert torch.equal(captured.outputs, captured.dense)


@pytest.mark.parametrize("name", SPARSE)
def test_tokens_that_are_verified_read_what_each_would_alone(tiny, name):
    method = parse_method(SPARSE[name])
    together, _, _ = step(tiny.runner, prompts()[-1], method)
    alone, _, _ = step(tiny.runner, prompts()[-1], method)
    expected = torch.cat([tiny.runner.run([Work(alone, [token], 1, method)]) for token in (5, 6, 7)])
    logits, captured = tiny.runner.run_captured([Work(together, [5, 6, 7], 3, method)])
    assert torch.equal(logits, expected)
    assert torch.equal(captured.outputs, captured.dense) == (name == "streaming")  # a window is part of the pass
