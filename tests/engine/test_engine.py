"""The engine as its users see it, on a tiny model in float32."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from conftest import byte_tokenizer, tiny_module
from thresher import LLM, SamplingParams
from thresher.cache.sequence import KVSequence, resident_bytes
from thresher.decoding.runner import Work
from thresher.engine import documents
from thresher.engine.memory import MemoryAccount
from thresher.engine.requests import Request
from thresher.engine.scheduler import Scheduler
from thresher.errors import CapacityError, KVFileBusyError, KVFileDamagedError, KVFileMismatchError, UsageError

TEXT = "The quick brown fox jumps over the lazy dog. " * 8


def prompts():
    torch.manual_seed(0)
    return [torch.randint(3, 259, (n,)).tolist() for n in (1, 5, 40, 100, 200)]


SAMPLED = [
    SamplingParams(max_new_tokens=30, temperature=1.0, seed=3, ignore_eos=True),
    SamplingParams(max_new_tokens=12, temperature=0.7, top_p=0.9, seed=4, ignore_eos=True),
    SamplingParams(max_new_tokens=25, ignore_eos=True),
    SamplingParams(max_new_tokens=9, temperature=1.3, top_k=20, seed=3, repetition_penalty=1.2, ignore_eos=True),
    SamplingParams(max_new_tokens=40, temperature=1.0, min_p=0.02, seed=5, presence_penalty=0.5, ignore_eos=True),
]


def test_results_do_not_depend_on_the_batch(tiny):
    alone = [tiny.generate([p], s)[0][0].token_ids for p, s in zip(prompts(), SAMPLED, strict=True)]
    together = [a[0].token_ids for a in tiny.generate(prompts(), SAMPLED)]
    assert together == alone
    backwards = [a[0].token_ids for a in tiny.generate(prompts()[::-1], SAMPLED[::-1])]
    assert backwards[::-1] == alone
    assert [len(t) for t in alone] == [30, 12, 25, 9, 40]


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_results_do_not_depend_on_the_batch_in_low_precision(tiny_folder, weights):
    llm = LLM(tiny_folder, weights=weights)
    alone = [llm.generate([p], s)[0][0].token_ids for p, s in zip(prompts(), SAMPLED, strict=True)]
    assert [a[0].token_ids for a in llm.generate(prompts(), SAMPLED)] == alone


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_logits_do_not_depend_on_chunks(tiny_folder, tiny, chunk):
    ids = prompts()[-1]
    sequence, whole = KVSequence(tiny.runner.layout), KVSequence(tiny.runner.layout)
    for begin in range(0, len(ids), chunk):
        logits = tiny.runner.run([Work(sequence, ids[begin : begin + chunk], True)])
    reference = tiny.runner.run([Work(whole, ids, True)])
    assert torch.equal(logits, reference)
    assert torch.equal(sequence.rows(0, 200), whole.rows(0, 200))


def test_same_seed_same_answer_other_seed_another(tiny):
    ids = prompts()[2]
    params = [SamplingParams(max_new_tokens=20, temperature=1.0, seed=s, ignore_eos=True) for s in (7, 7, 8)]
    first, second, third = (a[0].token_ids for a in tiny.generate([ids] * 3, params))
    assert first == second != third


def test_samples_share_the_prompt(tiny):
    ids = prompts()[-1]
    params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=0, n=8, ignore_eos=True)
    scheduler = tiny.scheduler()
    scheduler.add(Request(0, ids, params))
    answers = {}
    while scheduler.busy:
        for event in scheduler.step():
            answers.setdefault(event.sample, []).append(event.choice.token)
        live = scheduler.sequences()
        if live:
            assert resident_bytes(live) == (200 + 8 * 19) * tiny.runner.layout.bytes_per_token
    assert len({tuple(a) for a in answers.values()}) > 4
    single = SamplingParams(max_new_tokens=20, temperature=1.0, seed=0, ignore_eos=True)
    assert tiny.generate([ids], single)[0][0].token_ids == answers[0]


def test_streaming_gives_the_same_text(tiny):
    params = SamplingParams(max_new_tokens=30, temperature=1.0, seed=0, ignore_eos=True)
    pieces = {0: "", 1: ""}
    for event in tiny.stream(["abc", "def"], params):
        pieces[event.request] += event.text
    assert [a[0].text for a in tiny.generate(["abc", "def"], params)] == list(pieces.values())


def test_stopping(tiny):
    ids = prompts()[2]
    free = tiny.generate([ids], SamplingParams(max_new_tokens=30, ignore_eos=True))[0][0]
    token = free.token_ids[9]
    stopped = tiny.generate([ids], SamplingParams(max_new_tokens=30, ignore_eos=True, stop_token_ids=(token,)))[0][0]
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert stopped.finish_reason == "stop"
    assert free.finish_reason == "length"
    letter = next(c for c in free.text if c.isascii())
    cut = tiny.generate([ids], SamplingParams(max_new_tokens=30, ignore_eos=True, stop=letter))[0][0]
    assert cut.text == free.text.split(letter)[0]
    assert cut.finish_reason == "stop"


def test_nothing_asked_nothing_done(tiny):
    answer = tiny.generate(["hello"], SamplingParams(max_new_tokens=0, n=2))[0]
    assert [(a.text, a.token_ids, a.finish_reason) for a in answer] == [("", [], "length")] * 2
    assert tiny.generate([]) == []


def test_logprobs(tiny):
    ids = prompts()[1]
    answer = tiny.generate([ids], SamplingParams(max_new_tokens=3, logprobs=4))[0][0]
    sequence = KVSequence(tiny.runner.layout)
    expected = tiny.runner.run([Work(sequence, ids, True)])[0].log_softmax(0)
    first = answer.choices[0]
    assert first.logprob == pytest.approx(float(expected[first.token]))
    assert len(first.top) == 4


def test_bad_requests(tiny):
    with pytest.raises(UsageError, match="empty"):
        tiny.generate("")
    with pytest.raises(UsageError, match="empty"):
        tiny.generate([[]])
    with pytest.raises(UsageError, match="token ids outside"):
        tiny.generate([[5, 300]])
    with pytest.raises(UsageError, match="2 prompts but 1"):
        tiny.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(UsageError, match="framing"):
        tiny.generate("a", framing="poem")
    with pytest.raises(CapacityError, match="600 tokens.*512 positions.*--allow-extrapolation"):
        tiny.generate([[5] * 600])


def test_extrapolation_is_allowed_when_asked_for(tiny_folder):
    llm = LLM(tiny_folder, weights="float32", allow_extrapolation=True)
    assert len(llm.generate([[5] * 600], SamplingParams(max_new_tokens=3, ignore_eos=True))[0][0].token_ids) == 3


def test_answers_end_at_the_last_position(tiny):
    answer = tiny.generate([[5] * 510], SamplingParams(max_new_tokens=50, ignore_eos=True))[0][0]
    assert len(answer.token_ids) == 3  # positions 510, 511, and one more token that needs none
    assert answer.finish_reason == "length"


def test_admission_by_budget(tiny_folder):
    size = LLM(tiny_folder, weights="float32").runner.layout.bytes_per_token
    llm = LLM(tiny_folder, weights="float32", kv_budget=100 * size)
    params = SamplingParams(max_new_tokens=11, ignore_eos=True)
    scheduler = llm.scheduler()
    for i in range(5):
        scheduler.add(Request(i, [5 + i] * 40, params))  # 50 rows each: two at a time
    most, answers = 0, {i: [] for i in range(5)}
    while scheduler.busy:
        for event in scheduler.step():
            answers[event.request].append(event.choice.token)
        live = scheduler.sequences()
        most = max(most, resident_bytes(live))
    assert most == 100 * size
    assert all(len(a) == 11 for a in answers.values())
    unlimited = LLM(tiny_folder, weights="float32").generate([[5 + i] * 40 for i in range(5)], params)
    assert [a[0].token_ids for a in unlimited] == list(answers.values())
    with pytest.raises(CapacityError, match="MiB of KV cache, the budget is .* --kv-budget"):
        llm.generate([[5] * 200], params)


def test_a_long_prompt_does_not_stall_running_answers(tiny):
    """While a prompt of many chunks is read, the running sample gets a token in every pass, and a pass takes no more
    of the prompt than its time allows."""
    scheduler = Scheduler(tiny.runner, memory=MemoryAccount(1 << 28), positions=512, pass_seconds=1e-9)
    scheduler.add(Request(0, [5, 6, 7], SamplingParams(max_new_tokens=60, ignore_eos=True)))
    scheduler.step()
    scheduler.add(Request(1, [9] * 400, SamplingParams(max_new_tokens=5, ignore_eos=True)))
    passes = 0
    while True:
        events = scheduler.step()
        assert any(e.request == 0 for e in events)
        passes += 1
        if any(e.request == 1 for e in events):
            break
    assert passes == 400 // 16


def run(scheduler):
    """Events of all passes, each with the number of its pass."""
    events, passes = [], 0
    while scheduler.busy:
        events += [(passes, event) for event in scheduler.step()]
        passes += 1
    return events


def test_short_prompts_overtake_long_ones_which_still_go_on(tiny):
    short = SamplingParams(max_new_tokens=1, ignore_eos=True)
    scheduler = Scheduler(tiny.runner, memory=MemoryAccount(1 << 28), positions=512, pass_seconds=1e-9)
    scheduler.add(Request(0, [9] * 320, short))
    scheduler.step()
    for i in range(1, 41):
        scheduler.add(Request(i, [5] * 12, short))
    ended = {event.request: passes for passes, event in run(scheduler) if event.finish_reason}
    assert ended[1] == 0  # in the very next pass
    # A quarter of each pass, 4 of its 16 tokens, is for the one that came first, until it is alone.
    assert ended[40] == 39 < ended[0] <= 39 + (304 - 40 * 4) // 16 + 1


def test_smaller_requests_pass_one_that_does_not_fit_but_not_for_ever(tiny):
    row = tiny.runner.layout.bytes_per_token
    params = SamplingParams(max_new_tokens=11, ignore_eos=True)
    scheduler = Scheduler(tiny.runner, memory=MemoryAccount(100 * row), positions=512)
    scheduler.add(Request(0, [9] * 40, params))  # 50 rows
    scheduler.add(Request(1, [9] * 70, params))  # 80: has to wait
    for i in range(2, 40):
        scheduler.add(Request(i, [5] * 10, params))  # 20 rows each
    ended = [event.request for _, event in run(scheduler) if event.finish_reason]
    assert ended.index(2) < ended.index(1) <= 1 + 8 + 2
    assert sorted(ended) == list(range(40))


def test_priority(tiny):
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    scheduler = Scheduler(tiny.runner, memory=MemoryAccount(60 * tiny.runner.layout.bytes_per_token), positions=512)
    for i in range(4):
        scheduler.add(Request(i, [9] * 50, params, priority=-i))
    assert [event.request for _, event in run(scheduler) if event.finish_reason] == [3, 2, 1, 0]


def test_cancel_frees_what_a_request_holds(tiny):
    memory = MemoryAccount(1 << 28)
    scheduler = Scheduler(tiny.runner, memory=memory, positions=512)
    for i in range(3):
        scheduler.add(Request(i, [9] * 50, SamplingParams(max_new_tokens=50, n=2, ignore_eos=True)))
    scheduler.step()
    scheduler.step()
    ended = scheduler.cancel(1)
    assert [(e.sample, e.finish_reason) for e in ended] == [(0, "cancelled"), (1, "cancelled")]
    assert {e.request for _, e in run(scheduler)} == {0, 2}
    assert memory.free == memory.budget


def damaged(llm):
    """A context whose keys are not numbers."""
    context = llm.read(TEXT)
    for data, used in context.sequence.segments():
        data[1, 0, :, : used // 2] = float("nan")
    return context


def test_one_that_fails_does_not_harm_the_others(tiny):
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    torch.manual_seed(1)
    good = [torch.randint(3, 259, (n,)).tolist() for n in range(20, 51)]
    alone = [tiny.generate([p], params)[0][0].token_ids for p in good]
    context = damaged(tiny)
    scheduler = tiny.scheduler()
    scheduler.add(Request(31, [5, 6], params, context.sequence))
    for i, ids in enumerate(good):
        scheduler.add(Request(i, ids, params))
    answers, errors = {i: [] for i in range(31)}, {}
    for _, event in run(scheduler):
        if event.error:
            errors[event.request] = event.error
        elif event.choice:
            answers[event.request].append(event.choice.token)
    assert list(answers.values()) == alone
    assert list(errors) == [31]
    assert "not numbers" in str(errors[31])


def test_a_pass_that_fails_is_made_again_one_by_one(tiny, monkeypatch):
    stock = tiny.runner.run

    def run_but(batch):
        if any(list(work.token_ids[:1]) == [13] for work in batch):
            raise RuntimeError("no memory")
        return stock(batch)

    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    expected = [a[0].token_ids for a in tiny.generate([[5] * 9, [6] * 9], params)]
    monkeypatch.setattr(tiny.runner, "run", run_but)
    first, failed, last = (a[0] for a in tiny.generate([[5] * 9, [13] * 9, [6] * 9], params))
    assert [first.token_ids, last.token_ids] == expected
    assert (failed.finish_reason, str(failed.error)) == ("error", "no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        tiny.generate([[13] * 9], params)


def test_many_threads_share_one_engine(tiny):
    alone = [tiny.generate([p], s)[0][0].token_ids for p, s in zip(prompts(), SAMPLED, strict=True)]
    with ThreadPoolExecutor(5) as pool:
        for _ in range(3):
            answers = pool.map(lambda ids, params: tiny.generate([ids], params)[0][0].token_ids, prompts(), SAMPLED)
            assert list(answers) == alone


def test_leaving_a_stream_ends_its_requests(tiny):
    events = tiny.stream([[9] * 50], SamplingParams(max_new_tokens=400, ignore_eos=True))
    next(events)
    events.close()
    assert not tiny.engine.alive or not tiny.engine._scheduler.busy
    assert tiny.memory.free == tiny.memory.budget - tiny.memory.held
    assert len(tiny.generate([[9] * 50], SamplingParams(max_new_tokens=3, ignore_eos=True))[0][0].token_ids) == 3


def test_contexts_and_requests_are_in_one_account(tiny_folder):
    size = LLM(tiny_folder, weights="float32").runner.layout.bytes_per_token
    llm = LLM(tiny_folder, weights="float32", kv_budget=800 * size)
    kept = [llm.read(TEXT)]
    kept.append(llm.read(TEXT))
    length = kept[0].length
    assert llm.memory.held == 2 * length * size
    with pytest.raises(CapacityError, match="open contexts hold .* --kv-budget"):
        llm.read(TEXT)
    kept.pop().close()
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    assert len(llm.ask(kept[0], ["who?", "what?"], params)) == 2  # its rows are shared, not counted again
    kept.append(llm.read(TEXT))


def test_prompts_of_one_call_draw_numbers_of_their_own(tiny):
    params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=3, ignore_eos=True)
    answers = [a[0].token_ids for a in tiny.generate([[9] * 20] * 4, params)]
    assert len({tuple(a) for a in answers}) == 4
    assert answers == [a[0].token_ids for a in tiny.generate([[9] * 20] * 4, params)]
    free = SamplingParams(max_new_tokens=20, temperature=1.0, ignore_eos=True)
    first, second = (tiny.generate([[9] * 20], free)[0][0] for _ in range(2))
    assert first.token_ids != second.token_ids
    again = SamplingParams(max_new_tokens=20, temperature=1.0, seed=first.seed, ignore_eos=True)
    assert tiny.generate([[9] * 20], again)[0][0].token_ids == first.token_ids


def test_a_completion_says_what_it_used(tiny):
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    answer = tiny.generate([9] * 20, params)[0][0]
    assert (answer.prompt_tokens, answer.cached_tokens, len(answer.token_ids)) == (20, 0, 4)
    context = tiny.read(TEXT)
    answer = tiny.ask(context, "who?", params)[0][0]
    assert (answer.prompt_tokens - answer.cached_tokens, answer.cached_tokens) == (
        len("\n\nwho?[assistant]"),
        context.length,
    )


def test_chat(tiny):
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    ids = byte_tokenizer().encode("[system]be brief[user]hello[assistant]", add_special_tokens=False)
    assert tiny.chat(messages, params)[0][0].token_ids == tiny.generate(ids, params)[0][0].token_ids
    assert len(tiny.chat([messages, messages[1:]], params)) == 2
    with pytest.raises(UsageError, match=r"LLM\.chat"):
        tiny.generate(messages)


def test_read_ask_save_open(tiny, tmp_path):
    path = tmp_path / "x.kv"
    context = tiny.read(TEXT, path, name="fox")
    assert context.framing == "chat"
    opened = tiny.open(path)
    assert opened.source.name == "fox"
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    questions = ["Who jumps?", "Over what?", "How?"]
    answers = [a[0].token_ids for a in tiny.ask(opened, questions, params)]
    assert answers == [a[0].token_ids for a in tiny.ask(context, questions, params)]
    assert answers == [tiny.ask(opened, q, params)[0][0].token_ids for q in questions]
    # The same as one prompt that holds document and question.
    ids = byte_tokenizer().encode(f"[user]{TEXT}\n\n{questions[0]}[assistant]", add_special_tokens=False)
    assert tiny.generate([ids], params)[0][0].token_ids == answers[0]
    tiny.save(opened, tmp_path / "copy.kv")
    assert (tmp_path / "copy.kv").read_bytes() == path.read_bytes()
    assert opened.length == context.length == len("[user]" + TEXT)


def test_a_file_of_another_model_or_dtype(tiny, tmp_path, tiny_folder):
    tiny.read(TEXT, tmp_path / "x.kv")
    other = tmp_path / "other"
    tiny_module("llama", seed=9).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(KVFileMismatchError, match="another model"):
        LLM(other, weights="float32").open(tmp_path / "x.kv")
    with pytest.raises(KVFileMismatchError, match="float32"):
        LLM(tiny_folder, weights="bf16").open(tmp_path / "x.kv")
    # bf16 and int8 weights share a cache format: the fingerprint is of the model, not of its rounding.
    LLM(tiny_folder, weights="bf16").read(TEXT, tmp_path / "y.kv")
    LLM(tiny_folder, weights="int8").open(tmp_path / "y.kv")


def test_read_goes_on_after_an_interruption(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHECKPOINT", 100)
    monkeypatch.setattr("thresher.cache.file.BLOCK", 100)
    monkeypatch.setattr("thresher.cache.format.BLOCK", 100)
    monkeypatch.setattr(tiny.engine._scheduler, "_chunk_size", 50)
    steps = []

    def interrupt(done, total):
        steps.append(done)
        if done >= 250:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.read(TEXT, tmp_path / "x.kv", progress=interrupt)
    assert not (tmp_path / "x.kv").exists()
    again = []
    tiny.read(TEXT, tmp_path / "x.kv", progress=lambda done, total: again.append(done))
    assert again[0] == 200
    whole = tiny.read(TEXT)
    opened = tiny.open(tmp_path / "x.kv")
    assert torch.equal(opened.sequence.rows(0, whole.length), whole.sequence.rows(0, whole.length))
    assert os.listdir(tmp_path) == ["x.kv"]


def test_killed_while_reading(tiny_folder, tmp_path):
    """SIGKILL in the middle of `read`: no half file; the next read goes on and gives the same file."""
    code = f"""
import time
from thresher.engine import documents as m
m.CHECKPOINT = 512
from thresher import LLM
llm = LLM({str(tiny_folder)!r}, weights="float32", chunk_size=64, allow_extrapolation=True)
llm.read({TEXT!r} * 20, {str(tmp_path / "x.kv")!r}, progress=lambda d, t: (print(d, flush=True), time.sleep(0.02)))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while int(child.stdout.readline()) < 2000:
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "x.kv").exists()
    llm = LLM(tiny_folder, weights="float32", chunk_size=64, allow_extrapolation=True)
    seen = []
    llm.read(TEXT * 20, tmp_path / "x.kv", progress=lambda d, t: seen.append(d))
    assert seen[0] >= 1024
    llm.read(TEXT * 20, tmp_path / "y.kv")
    assert (tmp_path / "x.kv").read_bytes() == (tmp_path / "y.kv").read_bytes()


def test_two_readers_of_one_file(tiny, tmp_path):
    def second(done, total):
        with pytest.raises(KVFileBusyError):
            tiny.read(TEXT, tmp_path / "x.kv")

    tiny.read(TEXT, tmp_path / "x.kv", progress=second)
    tiny.open(tmp_path / "x.kv")


def test_documents_that_do_not_fit(tiny, tiny_folder):
    with pytest.raises(CapacityError, match="positions"):
        tiny.read("x" * 600)
    with pytest.raises(UsageError, match="empty"):
        tiny.read(" \n ")
    with pytest.raises(CapacityError, match="--kv-budget"):
        LLM(tiny_folder, weights="float32", kv_budget=1000).read(TEXT)
    context = tiny.read(TEXT)
    with pytest.raises(UsageError, match="empty"):
        tiny.ask(context, " ")


def test_streaming_reads_less_and_only_for_generated_tokens(tiny_folder, tiny):
    llm = LLM(tiny_folder, weights="float32", attention="streaming:sinks=2,window=20")
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    ids = prompts()[-1]
    dense, sparse = (m.generate([ids], params)[0][0].token_ids for m in (tiny, llm))
    assert dense[0] == sparse[0]  # from the prompt, which is read densely
    assert dense != sparse


def test_unknown_settings(tiny_folder):
    for arguments, words in (
        ({"attention": "streamin"}, "did you mean 'streaming'"),
        ({"attention": "streaming:windw=3"}, "did you mean 'window'"),
        ({"attention": "streaming:window=x"}, "not a whole number"),
        ({"attention": "streaming:window=0"}, "window 1 or more"),
        ({"weights": "int3"}, "bf16, int8, float32"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"kv_budget": 0}, "kv_budget"),
    ):
        with pytest.raises(UsageError, match=words):
            LLM(tiny_folder, **arguments)


def test_scheduler_is_idle_after_all(tiny):
    scheduler = Scheduler(tiny.runner, memory=MemoryAccount(1 << 20), positions=512)
    assert not scheduler.busy
    assert scheduler.step() == []


def test_a_file_with_token_ids_beyond_the_vocabulary(tiny, tmp_path):
    context = tiny.read(TEXT)
    context.sequence.token_ids[5] = 300
    tiny.save(context, tmp_path / "x.kv")
    with pytest.raises(KVFileDamagedError, match="vocabulary"):
        tiny.open(tmp_path / "x.kv")
