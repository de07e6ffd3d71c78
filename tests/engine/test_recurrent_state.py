"""Models whose layers carry a recurrent state, here Memory Mosaics, through everything that the engine does to a
sequence."""

import pytest
import torch

from conftest import VOCAB, byte_tokenizer
from thresher import LLM, SamplingParams
from thresher.attention.registry import METHODS, parse_method
from thresher.cache import file as kv
from thresher.cache.file import open_kv
from thresher.cache.sequence import RECENT_STATES, STATE_EVERY, KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.errors import KVFileDamagedError
from thresher.models.load import prepare
from thresher.models.mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM

GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
TEXT = "".join(f"Line {i}: the fox number {i * 7 % 31} jumps over the lazy dog. " for i in range(90))  # 4,500 bytes


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


def module(version, seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0}
    if version == 1:
        config = MemoryMosaicConfig(**sizes)
    else:
        config = MemoryMosaicConfig.v2(**sizes, short_window=40, long_delay=12)
    made = MemoryMosaicForCausalLM(config).eval()
    with torch.no_grad():  # keys that tell tokens apart, so that what is read matters
        for block in made.model.blocks:
            for memory in block.memories:
                memory.values.weight.mul_(3)
                if version == 1:
                    memory.key_scale.fill_(0.22)
    return made


@pytest.fixture(scope="module", params=[1, 2], ids=["v1", "v2"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / f"mosaic-{request.param}"
    module(request.param).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, weights="float32", attention="dense")


@pytest.fixture(scope="module")
def document(llm):
    return llm.read(TEXT)


def ids(n, seed=0):
    return torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole_logits(runner, token_ids):
    return runner.run([Work(KVSequence(runner.layout), token_ids, len(token_ids))])


def test_greedy_tokens_are_those_of_transformers(folder):
    llm = LLM(folder, weights="float32", attention="dense", chunk_size=50)
    stock = MemoryMosaicForCausalLM.from_pretrained(folder).eval()
    prompts = [ids(n) for n in (1, 2, 17, 64, 130)]
    answers = llm.generate(prompts, GREEDY)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        expected = stock.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("cuts", [[1] * 40, [39, 1], [7, 13, 20], [3, 37]])
def test_chunks_give_the_same_bits(llm, cuts):
    tokens = ids(40)
    whole = whole_logits(llm.runner, tokens)
    sequence, parts, at = KVSequence(llm.runner.layout), [], 0
    for n in cuts:
        parts.append(llm.runner.run([Work(sequence, tokens[at : at + n], n)]))
        at += n
    assert torch.equal(torch.cat(parts), whole)


def test_a_ragged_batch_gives_the_same_bits(llm):
    texts = [ids(n, seed=n) for n in (1, 5, 40, 90)]
    alone = [whole_logits(llm.runner, t) for t in texts]
    sequences = [KVSequence(llm.runner.layout) for _ in texts]
    half = [len(t) // 2 + 1 for t in texts]
    first = llm.runner.run([Work(s, t[:h], h) for s, t, h in zip(sequences, texts, half, strict=True)])
    rest = [(s, t[h:]) for s, t, h in zip(sequences, texts, half, strict=True) if t[h:]]
    second = llm.runner.run([Work(s, t, len(t)) for s, t in rest])
    firsts, seconds = first.split(half), iter(second.split([len(t) for _, t in rest]))
    for whole, h, part in zip(alone, half, firsts, strict=True):
        together = torch.cat([part, next(seconds)]) if len(whole) > h else part
        assert torch.equal(together, whole)


def test_forks_go_on_by_themselves(llm):
    tokens, ends = ids(70), [ids(9, seed=2), ids(9, seed=3)]
    sequence = KVSequence(llm.runner.layout)
    llm.runner.run([Work(sequence, tokens, 0)])
    forks = [sequence.fork() for _ in ends]
    logits = llm.runner.run([Work(f, e, len(e)) for f, e in zip(forks, ends, strict=True)]).split(9)
    for end, got in zip(ends, logits, strict=True):
        assert torch.equal(got, whole_logits(llm.runner, tokens + end)[-9:])
    assert sequence.state_length == 70


@pytest.mark.parametrize("back", [1, 2, 8, RECENT_STATES - 1, RECENT_STATES + 30, 150])
@pytest.mark.parametrize("steps", ["one by one", "one pass"])
def test_going_back(llm, back, steps):
    """Close to the end by a snapshot, further back by computing again what came after an older one."""
    tokens, other = ids(150), ids(20, seed=5)
    sequence = KVSequence(llm.runner.layout)
    for piece in [[t] for t in tokens] if steps == "one by one" else [tokens]:
        llm.runner.run([Work(sequence, piece, 0)])
    sequence.crop(150 - back)
    known = steps == "one by one" and back < RECENT_STATES
    assert (sequence.state_length == sequence.length) == (known or back == 150)
    got = llm.runner.run([Work(sequence, other, len(other))])
    assert torch.equal(got, whole_logits(llm.runner, tokens[: 150 - back] + other)[-20:])


def test_snapshots_that_are_kept(llm, document):
    sequence = document.sequence.fork()
    length = sequence.length
    checkpoints = list(range(STATE_EVERY, length, STATE_EVERY))
    assert len(checkpoints) == 2
    assert set(checkpoints) <= set(sequence.states)
    llm.runner.run([Work(sequence, ids(100), 0)])
    for token in ids(50, seed=9):
        llm.runner.run([Work(sequence, [token], 0)])
    recent = range(sequence.length - RECENT_STATES + 1, sequence.length + 1)
    assert set(sequence.states) == {*checkpoints, *recent}
    assert length in document.sequence.states


def test_memory_counts_snapshots(llm, document):
    shape = document.sequence.layout.state
    size = 4 * shape[0] * shape[1]
    assert document.sequence.layout.state_bytes == size
    before = llm.memory.held
    fork = document.sequence.fork()
    llm.memory.hold(fork)
    assert llm.memory.held == before  # all shared
    llm.runner.run([Work(fork, [5], 0)])
    tail = fork.segments()[-1][0]
    assert llm.memory.held == before + size + tail.numel() * tail.element_size()


def test_a_file_brings_its_states(llm, document, tmp_path):
    made = llm.read(TEXT, tmp_path / "x.kv")
    opened = llm.open(tmp_path / "x.kv")
    assert set(opened.sequence.states) == {2048, 4096, opened.length}
    for position, state in opened.sequence.states.items():
        assert torch.equal(state, made.sequence.states[position])
    question = "Which fox is next?"
    answers = [llm.ask(c, question, GREEDY)[0][0].token_ids for c in (document, made, opened)]
    assert answers[0] == answers[1] == answers[2]


def test_a_saved_context_is_the_same_even_after_going_back(llm, document, tmp_path):
    context = llm.read(TEXT)
    context.sequence.crop(3001)
    llm.save(context, tmp_path / "x.kv")
    opened = llm.open(tmp_path / "x.kv")
    assert set(opened.sequence.states) == {2048, 3001}
    logits = [llm.runner.run([Work(c.sequence.fork(), ids(20), 20)]) for c in (context, opened)]
    assert torch.equal(*logits)


def test_questions_share_what_is_computed_again(llm, monkeypatch):
    context = llm.read(TEXT)
    context.sequence.crop(3001)
    passes = []
    run = llm.runner._pass
    monkeypatch.setattr(
        llm.runner, "_pass", lambda batch, plan: (passes.append(len(batch[0].token_ids)), run(batch, plan))[1]
    )
    llm.ask(context, ["Which?", "What?", "Who?"], SamplingParams(max_new_tokens=2, ignore_eos=True))
    assert passes.count(3001 - 2048) == 1


def test_a_read_that_was_cut_goes_on(llm, tmp_path):
    class Cut(Exception):
        pass

    def stop(done, total):
        if done > 2600:
            raise Cut

    with pytest.raises(Cut):
        llm.read(TEXT, tmp_path / "x.kv", progress=stop)
    seen = []
    made = llm.read(TEXT, tmp_path / "x.kv", progress=lambda done, total: seen.append(done))
    assert seen[0] == 2048  # the last snapshot before the last block that was written
    whole = llm.read(TEXT)
    assert torch.equal(made.sequence.states[made.length], whole.sequence.states[whole.length])
    opened, _, _ = open_kv(tmp_path / "x.kv")
    assert torch.equal(opened.rows(0, opened.length), whole.sequence.rows(0, whole.length))


def test_a_changed_state_is_noticed(llm, tmp_path):
    path = tmp_path / "x.kv"
    llm.read(TEXT, path)
    info = kv.inspect(path)
    with path.open("r+b") as file:
        size = len(kv.encode_header(info, [0] * info.blocks)) - 24
        where = kv.offsets(info, size).states + info.layout.state_bytes + 40  # of the second snapshot
        file.seek(where)
        byte = file.read(1)
        file.seek(where)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(KVFileDamagedError, match="tokens 3584 to 4096"):
        llm.open(path)


READ = "dense_below=0,dense_layers=none"


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("dense", "lsh", "sample")])
def test_methods_that_may_read_all_answer_as_dense_does(llm, document, name):
    budget = {"verified": "heavy=9000", "streaming": "window=9000"}.get(name, "budget=9000")
    method = f"{name}:{budget}" if name == "streaming" else f"{name}:{READ},{budget}"
    dense = llm.ask(document, "Which fox?", GREEDY, attention="dense")[0][0].token_ids
    assert llm.ask(document, "Which fox?", GREEDY, attention=method)[0][0].token_ids == dense


@pytest.mark.parametrize("name", METHODS)
def test_blank_rows_are_read_by_no_method(llm, name):
    """Whatever lies there: the answer has the same bits."""
    method = parse_method({"dense": "dense", "streaming": "streaming:window=64"}.get(name, f"{name}:{READ},sinks=0"))
    sequence = llm.read(TEXT).sequence
    prepared = llm.runner.prepare(sequence, method)
    assert name in ("dense", "streaming") or prepared.method.sinks == llm.model.blank
    before = llm.runner.run([Work(sequence.fork(), [40], 1, method)])
    memories = llm.model.module.config.memories
    rows, _ = sequence.segments()[0]
    for layer, cached in enumerate(rows):
        cached[:, :, : memories[layer % len(memories)][0]] = 50
    assert torch.equal(llm.runner.run([Work(sequence.fork(), [40], 1, method)]), before)


def test_a_method_may_leave_all_layers_dense(folder):
    """Two layers, and a method whose default leaves two of them dense."""
    llm = LLM(folder, weights="float32", attention="sign:dense_below=0")
    context = llm.read(TEXT)
    dense = llm.ask(context, "Which fox?", GREEDY, attention="dense")[0][0].token_ids
    assert llm.ask(context, "Which fox?", GREEDY)[0][0].token_ids == dense


@pytest.mark.parametrize(
    "method",
    [
        "auto:dense_below=0,budget=48",
        "quest:dense_below=0,dense_layers=none,budget=512",
        "lsh:dense_below=0,dense_layers=none,K=4,L=60",
    ],
)
def test_sparse_reading_stays_near(folder, document, method, tmp_path):
    """Logits of the token behind the document, read sparsely from a file with its index: nearer to those of reading
    all than what the last 500 tokens alone give."""
    llm = LLM(folder, weights="float32", attention=method)
    llm.read(TEXT, tmp_path / "x.kv")
    opened = llm.open(tmp_path / "x.kv")
    assert opened.sequence.index.method.sinks >= llm.model.blank
    exact = llm.runner.run([Work(opened.sequence.fork(), [40], 1)])
    sparse = llm.runner.run([Work(opened.sequence.fork(), [40], 1, llm.attention)])
    window = llm.runner.run([Work(opened.sequence.fork(), [40], 1, parse_method("streaming:window=500"))])
    assert 0 < (exact - sparse).norm() < 0.5 * (exact - window).norm()


@pytest.mark.parametrize(
    "draft",
    [
        "self:auto,budget=12,tail=4,sinks=2,window=16,dense_layers=none,dense_below=0",
        "ngram",
        "self:streaming,sinks=2,window=16,dense_below=0",
    ],
)
@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(max_new_tokens=24, temperature=0.8, seed=3, ignore_eos=True)]
)
def test_speculation_gives_the_same_tokens(llm, draft, params):
    prompts = [ids(12) * 9, ids(150, seed=4)]
    plain = llm.generate(prompts, params)
    drafted = llm.generate(prompts, params, speculate=f"{draft},gamma=4" if draft != "ngram" else "ngram:gamma=4")
    for (a,), (b,) in zip(plain, drafted, strict=True):
        assert a.token_ids == b.token_ids
    assert sum(sum(b.speculation.drafted) for (b,) in drafted) > 0


def test_samples_share_a_prompt(llm):
    params = SamplingParams(max_new_tokens=10, n=3, temperature=1.0, seed=1, ignore_eos=True)
    prompt = ids(60)
    together = llm.generate([prompt], params)[0]
    assert len({tuple(a.token_ids) for a in together}) > 1
    again = llm.generate([prompt, ids(30, seed=8)], params)[0]
    assert [a.token_ids for a in together] == [a.token_ids for a in again]


def test_unfused_layers_run_as_well(folder):
    stock = MemoryMosaicForCausalLM.from_pretrained(folder).eval()
    tokens = ids(60)
    with torch.no_grad():
        expected = stock(torch.tensor([tokens]), use_cache=False).logits[0]
    runner = Runner(prepare(stock, byte_tokenizer(), "mosaic", "float32", swap=False))
    assert torch.allclose(whole_logits(runner, tokens), expected, atol=2e-5)


def test_a_context_longer_than_trained_is_said_once(tmp_path):
    made = module(1)
    made.config.trained_length = 100
    made.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    said = []
    llm = LLM(tmp_path, weights="float32", attention="dense", progress=said.append)
    short = SamplingParams(max_new_tokens=2, ignore_eos=True)
    llm.generate([ids(90)], short)
    assert not any("trained with contexts" in s for s in said)
    llm.generate([ids(99)], short)
    llm.generate([ids(150)], short)
    assert sum("trained with contexts of 100 tokens" in s for s in said) == 1
