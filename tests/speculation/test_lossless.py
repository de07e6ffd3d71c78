"""The tokens are those of plain decoding, bit for bit, whoever drafts."""

import pytest
import torch

from conftest import byte_tokenizer, tiny_module
from thresher import LLM, SamplingParams
from thresher.attention.index import Index
from thresher.attention.registry import parse_method
from thresher.errors import CapacityError

READ = "sinks=2,window=16,dense_layers=none,dense_below=0"
SELF = {
    "auto": f"self:auto,budget=12,tail=4,{READ}",
    "lsh": f"self:lsh,K=3,L=12,{READ}",
    "sign": f"self:sign,budget=12,{READ}",
    "verified": f"self:verified,heavy=8,epsilon=0.9,delta=0.6,{READ}",
    "clusters": f"self:clusters,budget=24,tokens=8,{READ}",
    "quest": f"self:quest,budget=16,page=8,{READ}",
    "block_topk": f"self:block_topk,budget=16,block=4,tail=2,{READ}",
    "snapkv": f"self:snapkv,budget=12,observe=8,{READ}",
    "streaming": "self:streaming,sinks=2,window=16,dense_below=0",
    "topk": f"self:topk,budget=12,union=0,{READ}",
    "sample": f"self:sample,draws=12,{READ}",
}
SPARSE_TARGETS = [
    f"auto:budget=12,tail=4,{READ}",
    f"topk:budget=0.2,{READ}",
    "streaming:sinks=2,window=16,dense_below=0",
    "sign:budget=12,sinks=2,window=16,dense_layers=none,dense_below=150",
]


def prompts():
    generator = torch.Generator().manual_seed(0)
    again = torch.randint(3, 259, (12,), generator=generator).tolist()
    fresh = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (1, 60, 150, 220)]
    return [*fresh[:2], again * 9, *fresh[2:]]


PARAMS = [
    SamplingParams(max_new_tokens=40, ignore_eos=True),
    SamplingParams(max_new_tokens=80, temperature=0.7, top_p=0.9, seed=4, ignore_eos=True),
    SamplingParams(max_new_tokens=70, ignore_eos=True, repetition_penalty=1.1, presence_penalty=0.2, min_tokens=9),
    SamplingParams(max_new_tokens=30, temperature=1.3, top_k=20, seed=3, ignore_eos=True, frequency_penalty=0.3),
    SamplingParams(max_new_tokens=2, ignore_eos=True),
]


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory):
    """A model that agrees with the tiny one now and then: its weights, changed a little."""
    folder = tmp_path_factory.mktemp("models") / "tiny-draft"
    module = tiny_module("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=generator))
    module.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tiny):
    return [tiny.generate([p], s, attention="dense")[0][0] for p, s in zip(prompts(), PARAMS, strict=True)]


def tokens(answers):
    return [a[0].token_ids for a in answers]


@pytest.mark.parametrize("name", SELF)
@pytest.mark.parametrize("gamma", [1, 4, 8])
def test_drafts_of_its_own(tiny, plain, name, gamma):
    together = tiny.generate(prompts(), PARAMS, attention="dense", speculate=f"{SELF[name]},gamma={gamma}")
    assert tokens(together) == [p.token_ids for p in plain]
    assert [a[0].text for a in together] == [p.text for p in plain]
    stats = together[4][0].speculation
    assert stats.gammas == (1,)  # two tokens leave no room for a draft
    long = together[1][0].speculation
    assert sum(long.accepted) > 0
    assert sum(long.gammas) == long.passes < 80
    assert list(long.drafters.values()) == [sum(long.gammas[1:])]


def test_a_view_that_is_chosen_once_is_renewed(tiny, monkeypatch):
    """Every 64 tokens, from what the passes before weighed; all drafts stand here, so those are the answer's tokens.
    The answer does not change, and nothing of it happens to other views."""
    seen = []

    def renew(index, sequence, votes):
        before = index.covered
        original(index, sequence, votes)
        keys = sequence.rows(0, sequence.length)[:, 0].double()
        group = tiny.model.heads.q_heads // keys.shape[1]
        voters = round(votes[0, 0].sum().item() / group)
        queries = tiny.runner.recent_queries(sequence, voters).double()  # [layers, n, q_heads, head_dim]
        scores = torch.einsum("lnhd,lhkd->lhnk", queries, keys.repeat_interleave(group, 1)) * queries.shape[-1] ** -0.5
        later = torch.arange(sequence.length) > torch.arange(sequence.length - voters, sequence.length)[:, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(-1).sum(2).unflatten(1, (-1, group)).sum(2)
        assert votes[:, :, : sequence.length] == pytest.approx(weights, rel=1e-3, abs=1e-4)
        seen.append((sequence.length, before, index.covered, voters))

    original = Index.renew
    monkeypatch.setattr(Index, "renew", renew)
    ids, params = prompts()[3], SamplingParams(max_new_tokens=150, ignore_eos=True)
    plain = tiny.generate([ids], params, attention="dense", speculate="none")[0][0]
    everything = f"self:snapkv,budget=512,{READ},gamma=2"
    answer = tiny.generate([ids], params, attention="dense", speculate=everything)[0][0]
    assert answer.token_ids == plain.token_ids
    assert answer.speculation.accepted == answer.speculation.drafted
    assert len(seen) == 2
    assert all(64 * (i + 1) <= length - len(ids) <= 64 * (i + 1) + 6 for i, (length, *_) in enumerate(seen))
    assert all(after >= before + 64 and 29 <= voters <= 36 for _, before, after, voters in seen)
    tiny.generate([ids], params, attention="dense", speculate=f"{SELF['sign']},gamma=2")
    tiny.generate([ids], params, attention=SPARSE_TARGETS[0], speculate="ngram:gamma=2")
    assert len(seen) == 2


@pytest.mark.parametrize("gamma", range(1, 9))
def test_perfect_drafts_are_all_accepted(tiny, gamma):
    """A method that reads everything drafts what the target says: every pass gives gamma + 1 tokens (T4)."""
    ids, params = prompts()[3], SamplingParams(max_new_tokens=1 + 4 * (gamma + 1), ignore_eos=True)
    speculate = f"self:topk,budget=512,{READ},gamma={gamma}"
    answer = tiny.generate([ids], params, attention="dense", speculate=speculate)[0][0]
    assert answer.token_ids == tiny.generate([ids], params, attention="dense", speculate="none")[0][0].token_ids
    assert answer.speculation.passes == 4
    assert answer.speculation.accepted == (4,) * gamma == answer.speculation.drafted


@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_prompt_lookup(tiny, plain, gamma):
    together = tiny.generate(prompts(), PARAMS, attention="dense", speculate=f"ngram:gamma={gamma}")
    assert tokens(together) == [p.token_ids for p in plain]


@pytest.mark.parametrize("gamma", [1, 3, 8])
@pytest.mark.parametrize("method", ["", f",attention=sign,budget=12,{READ}"])
def test_a_model_that_drafts(tiny_folder, draft_folder, plain, gamma, method):
    llm = LLM(tiny_folder, weights="float32", speculate=f"model:{draft_folder}{method},gamma={gamma}")
    assert str(llm.attention) == "dense"
    together = llm.generate(prompts(), PARAMS)
    assert tokens(together) == [p.token_ids for p in plain]
    stats = [a[0].speculation for a in together]
    assert stats[1].accepted[0] > stats[1].drafted[0] / 3
    assert llm.generate([prompts()[1]], PARAMS[1])[0][0].token_ids == plain[1].token_ids  # from what was kept


@pytest.mark.parametrize("method", SPARSE_TARGETS)
@pytest.mark.parametrize("drafter", ["ngram:gamma=6", "ngram:ngram=1,gamma=1"])
def test_sparse_targets(tiny, method, drafter):
    """Each token of a draft reads what it would alone, also where an index begins or grows."""
    expected = tiny.generate(prompts(), PARAMS, attention=method)
    together = tiny.generate(prompts(), PARAMS, attention=method, speculate=drafter)
    assert tokens(together) == tokens(expected)
    dense = tiny.generate(prompts(), PARAMS, attention="dense")
    assert tokens(expected) != tokens(dense)
    assert sum(sum(a[0].speculation.accepted) for a in together) > 0


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("speculate", [f"{SELF['sign']},gamma=3", f"{SELF['auto']},gamma=7", "ngram:gamma=5"])
def test_low_precision(tiny_folder, weights, speculate):
    llm = LLM(tiny_folder, weights=weights, attention="dense")
    expected = [llm.generate([p], s)[0][0].token_ids for p, s in zip(prompts(), PARAMS, strict=True)]
    assert tokens(llm.generate(prompts(), PARAMS, speculate=speculate)) == expected


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "mistral", "qwen3_moe"])
def test_other_architectures(tmp_path, name):
    tiny_module(name).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    llm = LLM(tmp_path, weights="float32", attention="dense")
    expected = tokens(llm.generate(prompts(), PARAMS))
    for speculate in (f"{SELF['sign']},gamma=4", "ngram:gamma=4"):
        assert tokens(llm.generate(prompts(), PARAMS, speculate=speculate)) == expected


@pytest.mark.parametrize("speculate", [f"{SELF['sign']},gamma=6", "ngram:gamma=6"])
def test_stops_inside_a_draft(tiny, plain, speculate):
    ids, free = prompts()[1], plain[1]
    for at in range(3, 60, 7):
        token = free.token_ids[at]
        params = SamplingParams(
            max_new_tokens=80, temperature=0.7, top_p=0.9, seed=4, stop_token_ids=(token,), ignore_eos=True
        )
        stopped = tiny.generate([ids], params, attention="dense", speculate=speculate)[0][0]
        assert stopped.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
        assert (stopped.finish_reason, stopped.matched) == ("stop", token)
        text = free.text[at : at + 3]
        params = SamplingParams(max_new_tokens=80, temperature=0.7, top_p=0.9, seed=4, stop=text, ignore_eos=True)
        expected = tiny.generate([ids], params, attention="dense")[0][0]
        stopped = tiny.generate([ids], params, attention="dense", speculate=speculate)[0][0]
        assert (stopped.text, stopped.token_ids) == (expected.text, expected.token_ids)
        assert stopped.finish_reason == expected.finish_reason


@pytest.mark.parametrize("speculate", [f"{SELF['auto']},gamma=5", "ngram:gamma=5"])
def test_samples_and_logprobs(tiny, speculate):
    params = SamplingParams(max_new_tokens=40, temperature=0.9, seed=11, n=4, logprobs=3, ignore_eos=True)
    expected = tiny.generate([prompts()[3]], params, attention="dense")[0]
    answers = tiny.generate([prompts()[3]], params, attention="dense", speculate=speculate)[0]
    assert [a.choices for a in answers] == [a.choices for a in expected]
    assert len({tuple(a.token_ids) for a in answers}) == 4


def test_documents_and_files(tiny, tmp_path):
    text = "The quick brown fox jumps over the lazy dog. " * 6
    questions = ["Who jumps?", "Over whom does the quick brown fox jump?"]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    expected = tokens(tiny.ask(tiny.read(text), questions, params, attention="dense"))
    context = tiny.read(text, tmp_path / "fox.kv")
    for speculate in (f"{SELF['auto']},gamma=4", "ngram:gamma=4", "auto"):
        assert tokens(tiny.ask(context, questions, params, attention="dense", speculate=speculate)) == expected
        opened = tiny.open(tmp_path / "fox.kv")
        assert tokens(tiny.ask(opened, questions, params, attention="dense", speculate=speculate)) == expected


@pytest.mark.parametrize("speculate", [f"{SELF['sign']},gamma=4", "auto", "ngram"])
def test_a_drafter_that_fails_is_done_without(tiny, plain, speculate, monkeypatch):
    def fail(*args, **kwargs):
        args[1][0].sequence.reserve(3)
        raise RuntimeError("no")

    monkeypatch.setattr("thresher.speculation.speculator.draft", fail)
    together = tiny.generate(prompts(), PARAMS, attention="dense", speculate=speculate)
    assert tokens(together) == [p.token_ids for p in plain]


def test_what_a_draft_model_keeps_gives_way(tiny_folder, draft_folder):
    """Its sequences of answers that ended are held in the account of memory, and let go when there is no room."""
    row = LLM(tiny_folder, weights="float32").runner.layout.bytes_per_token
    llm = LLM(tiny_folder, weights="float32", speculate=f"model:{draft_folder},gamma=2", kv_budget=700 * row)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    for ids in (prompts()[3], prompts()[4], prompts()[1]):  # 250 tokens at most, in two models
        assert len(llm.generate([ids], params)[0][0].token_ids) == 30
        assert 0 < llm.memory.held <= 700 * row
    with pytest.raises(CapacityError, match="needs up to"):
        llm.generate([prompts()[4] + prompts()[3]], SamplingParams(max_new_tokens=100))


def test_the_cache_is_that_of_plain_decoding(tiny):
    """After every step the rows are what the target computes, and no more than those of the tokens there are (T5)."""
    from thresher.cache.sequence import KVSequence
    from thresher.decoding.runner import Work
    from thresher.engine.requests import Request
    from thresher.speculation.settings import parse_speculation

    ids, params = prompts()[3], SamplingParams(max_new_tokens=40, ignore_eos=True)
    scheduler = tiny.scheduler()
    speculation = parse_speculation(f"{SELF['sign']},gamma=4")
    scheduler.add(Request(0, ids, params, method=parse_method("dense"), speculation=speculation))
    given, steps = [], 0
    while scheduler.busy:
        given += [event.choice.token for event in scheduler.step()]
        if scheduler.busy and given:
            (sequence,) = scheduler.sequences()
            assert sequence.token_ids == [*ids, *given[:-1]]
            fresh = KVSequence(tiny.runner.layout)
            tiny.runner.run([Work(fresh, sequence.token_ids, 0)])
            assert torch.equal(fresh.rows(0, fresh.length), sequence.rows(0, sequence.length))
            steps += 1
    assert steps < len(given) == 40
