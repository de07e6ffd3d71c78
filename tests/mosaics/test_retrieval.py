"""What memories retrieved: the numbers against the model, the page, and the command."""

import base64
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
import typer

from conftest import byte_tokenizer
from thresher.cli import start
from thresher.cli.mosaic_inspect import inspect
from thresher.cli.options import with_options
from thresher.errors import ModelError, UsageError
from thresher.models.mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM
from thresher.mosaics import retrieval
from thresher.mosaics.retrieval import (
    TOP_PAIRS,
    Summary,
    held_pairs,
    page,
    read_weights,
    retrieve,
    summarize,
    top_pairs,
)

VOCABULARY, HEADS, TOKENS = 259, 4, 40
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script> /*DATA*/null \u2028 \u202e &amp; \x07é"


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


def mosaic(version):
    """A small model whose scales, shares and decays are all different from each other."""
    torch.manual_seed(version)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    if version == 1:
        model = MemoryMosaicForCausalLM(MemoryMosaicConfig(**sizes))
    else:
        model = MemoryMosaicForCausalLM(MemoryMosaicConfig.v2(**sizes, short_window=6, long_delay=9))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("decay", "present", "scale", "theta")):
                p.add_(torch.rand_like(p) * 0.05)
    return model.eval()


@pytest.fixture(scope="module", params=[1, 2], ids=["v1", "v2"])
def model(request):
    return mosaic(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "mosaic"
    mosaic(2).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def some_ids(tokens=TOKENS):
    """Few different ones, so that the same tokens come again."""
    return torch.randint(3, 9, (tokens,), generator=torch.Generator().manual_seed(7))


def memories(model):
    return [memory for block in model.model.blocks for memory in block.memories]


def answers(memory, weights, x):
    """Of weights `[heads, tokens, tokens]` and the memory's input `[tokens, d]`, from the definition of a value."""
    out = torch.zeros(len(x), HEADS, memory.head_dim)
    raw = (x @ memory.values.weight.T).view(len(x), HEADS, -1)
    for head in range(HEADS):
        c = memory.present[head]
        values = (1 - c) * raw[1:, head] + c * raw[:-1, head]
        values = values / values.norm(dim=-1, keepdim=True) * (10 * memory.value_scale[head]).exp()
        out[:, head] = weights[head][:, :-1] @ values
    return out.flatten(1)


# The numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 5, 9, 10, TOKENS])
@torch.no_grad()
def test_the_answers_of_memories_come_out_of_the_weights(model, tokens):
    x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(3))
    for memory in memories(model):
        weights, _ = read_weights(memory, x)
        expected = memory.parallel(x[None])[0]
        assert torch.allclose(answers(memory, weights, x), expected, atol=1e-5)
        assert (expected.abs().amax(-1) > 0.1).tolist() == [t >= memory.delay for t in range(tokens)]


@torch.no_grad()
def test_weights_are_kernel_regression_on_the_pairs_that_are_held(model):
    x = torch.randn(TOKENS, 48, generator=torch.Generator().manual_seed(4))
    for memory in memories(model):
        weights, beta = read_weights(memory, x)
        beta, keys = beta.expand(TOKENS, -1), memory.keys.parallel(x[None])[0]
        for t in range(TOKENS):
            held = range(max(0, t - memory.delay - memory.window + 1) if memory.window else 0, t - memory.delay + 1)
            for head in range(HEADS):
                expected = torch.zeros(TOKENS)
                if held:
                    distance = (keys[t, head] - keys[held.start : held.stop, head]).square().sum(-1)
                    expected[held.start : held.stop] = (-beta[t, head] / 2 * distance).softmax(-1)
                assert torch.allclose(weights[head, t], expected, atol=1e-5)
                assert (weights[head, t] > 0).nonzero().flatten().tolist() == list(held)


def test_retrieved_weights_give_the_predictions_of_the_model(model):
    """Layer by layer, with every memory's answer replaced by what its weights say."""
    ids = some_ids()
    found = retrieve(model, ids)
    with torch.no_grad():
        x, readings = model.model.embed_tokens(ids), iter(found.readings)
        for layer, block in enumerate(model.model.blocks):
            y = block.context_norm(x)
            parts = []
            for number, memory in enumerate(block.memories):
                reading = next(readings)
                assert (reading.layer, reading.memory, reading.delay) == (layer, number, memory.delay)
                parts.append(answers(memory, reading.weights, y))
                assert torch.equal(reading.share, memory.present)
                if not memory.keys.gated:
                    assert torch.allclose(reading.decay, (-10 * memory.keys.decay.abs()).exp())
                else:
                    leak = (y @ memory.keys.gates.weight.T)[:, HEADS:].abs()
                    assert torch.allclose(reading.decay, (-leak).exp(), atol=1e-5)
            x = x + block.context_out(torch.cat(parts, -1))
            y = block.persistent_norm(x)
            x = x + (
                block.persistent_out(block.persistent.parallel(y[None])[0]) if block.remembers else block.persistent(y)
            )
        scale = 48**-0.5 if model.config.initializer == "library" else 1.0
        p = model.lm_head(model.model.norm(x) * scale).softmax(-1)
    assert torch.allclose(found.top, p.topk(5).values, atol=1e-5)
    assert torch.allclose(p.gather(1, found.top_ids), found.top, atol=1e-5)
    assert torch.allclose(found.loss, -p[:-1].gather(1, ids[1:, None])[:, 0].log(), atol=1e-4)
    assert not any(block.context_norm._forward_hooks for block in model.model.blocks)


def test_summaries_by_hand():
    ids = torch.tensor([1, 2, 1, 2, 3])
    weights = torch.zeros(5, 5)
    weights[1, 0] = 1.0  # after 2 reads 1 → 2; 1 comes
    weights[2, :2] = torch.tensor([0.75, 0.25])  # after 1 reads 1 → 2 and 2 → 1; 2 comes
    weights[3, :3] = torch.tensor([0.25, 0.5, 0.25])  # after 2 reads 1 → 2, 2 → 1 and 1 → 2; 3 comes
    weights[4, 3] = 1.0  # after 3 reads 2 → 3; nothing comes
    found = summarize(weights, ids)
    assert found.strongest == pytest.approx((1 + 0.75 + 0.5 + 1) / 4)
    assert found.distance == pytest.approx((1 + (0.75 * 2 + 0.25) + (0.25 * 3 + 0.5 * 2 + 0.25) + 1) / 4)
    assert found.same == pytest.approx((0 + 0.75 + 0.5 + 0) / 4)
    assert found.right == pytest.approx((0 + 0.75 + 0) / 3)
    assert summarize(torch.zeros(5, 5), ids) == Summary(None, None, None, None)
    assert summarize(weights[:2, :2], ids[:2]) == Summary(1.0, 1.0, 0.0, None)


def test_what_all_pairs_alike_would_be(model):
    ids = some_ids()
    for reading in retrieve(model, ids).readings:
        held = held_pairs(TOKENS, reading.delay, reading.window)
        rows = [t for t in range(TOKENS - 1) if held[t].any()]
        right = [sum(ids[i + 1] == ids[t + 1] for i in range(t) if held[t, i]) / held[t].sum() for t in rows]
        assert reading.uniform.right == pytest.approx(float(sum(right)) / len(rows), abs=1e-5)
        assert 0 < reading.uniform.strongest < 1


def test_a_memory_that_only_knows_the_last_token_reads_pairs_after_it():
    """Keys without a past and a narrow kernel: induction, as the summary has it."""
    model = mosaic(1)
    with torch.no_grad():
        for memory in memories(model):
            memory.keys.decay.fill_(10)
            memory.key_scale.fill_(0.5)
    first = retrieve(model, torch.tensor([5, 6, 7, 8] * 6)).readings[0]
    for summary in first.summaries:
        # Until a token comes again, three of 23 rows, there is none to find.
        assert summary.same == pytest.approx(20 / 23, abs=0.01)
        assert summary.right == pytest.approx(19 / 22, abs=0.01)
    assert first.uniform.same < 0.4


def test_top_pairs():
    weights = torch.rand(20, 20, generator=torch.Generator().manual_seed(1)).tril(-1)
    for t, row in enumerate(top_pairs(weights)):
        order = sorted(range(t), key=lambda i: -weights[t, i])[:TOP_PAIRS]
        assert [i for i, _ in row] == order
        assert [w for _, w in row] == weights[t, order].tolist()


def test_what_cannot_be_read(model, monkeypatch):
    with pytest.raises(UsageError, match="fewer than 2 tokens"):
        retrieve(model, torch.tensor([3]))
    with pytest.raises(ModelError, match=f"token {VOCABULARY}"):
        retrieve(model, torch.tensor([3, VOCABULARY]))
    heads = HEADS * len(memories(model))
    monkeypatch.setattr(retrieval, "MOST_WEIGHTS", heads * TOKENS**2)
    assert len(retrieve(model, some_ids()).loss) == TOKENS - 1
    with pytest.raises(UsageError, match=f"at most {TOKENS}"):
        retrieve(model, some_ids(TOKENS + 1))
    broken = mosaic(1)
    with torch.no_grad():
        broken.model.blocks[1].context_out.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        retrieve(broken, some_ids())


# The page ------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """What a browser would make elements of."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


def written(text):
    """The data in a page, as it stands there."""
    begin = text.index("const D = ") + len("const D = ")
    return text[begin : text.index(";\n", begin)]


def data_of(text):
    return json.loads(written(text))


def template():
    return files("thresher.mosaics").joinpath("retrieval.html").read_text(encoding="utf-8")


def test_the_page_says_what_was_found(model):
    found = retrieve(model, some_ids())
    data = data_of(page(found, byte_tokenizer(), "about"))
    assert data["ids"] == found.ids.tolist()
    assert data["loss"] == pytest.approx(found.loss.tolist(), rel=1e-3)
    assert [[i for i, _ in row] for row in data["top"]] == found.top_ids.tolist()
    for shown, reading in zip(data["memories"], found.readings, strict=True):
        for head, of_head in enumerate(shown["heads"]):
            levels = base64.b64decode(of_head["weights"])
            assert len(levels) == TOKENS * (TOKENS - 1) // 2
            for t in range(TOKENS):
                for i in range(t):
                    level = levels[t * (t - 1) // 2 + i] / 255  # as the page has it
                    assert level == pytest.approx(float(reading.weights[head, t, i]) ** 0.5, abs=0.5 / 255 + 1e-6)
                assert [i for i, _ in of_head["pairs"][t]] == [i for i, _ in top_pairs(reading.weights[head])[t]]
            assert of_head["beta"][-1] == pytest.approx(float(reading.beta[-1, head]), rel=1e-3)
            assert len(of_head["beta"]) == (TOKENS if model.config.bandwidth == "adaptive" else 1)


def test_text_of_strangers_stays_text(model):
    tokenizer = byte_tokenizer()
    # As one token, as in a large vocabulary: single bytes could not end a script.
    tokenizer.add_tokens([HOSTILE])
    hostile = tokenizer.convert_tokens_to_ids(HOSTILE)
    found = retrieve(model, some_ids(4))
    found.ids[1] = found.top_ids[0, 0] = hostile
    text = page(found, tokenizer, HOSTILE)
    assert Tags(text).tags == Tags(template()).tags
    assert "<" not in written(text)  # nor begins a comment, within which a script does not end
    assert data_of(text)["texts"][str(hostile)] == HOSTILE
    assert data_of(text)["about"] == HOSTILE
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:"):
        assert way not in template()
    assert "default-src 'none'" in template()  # nothing is fetched, whatever gets in


def test_tokens_as_a_reader_sees_them():
    tokenizer = byte_tokenizer()

    def shown(text):
        return [retrieval.token_text(tokenizer, i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

    assert shown("a é\n") == ["a", " ", "\\xc3", "\\xa9", "\n"]
    assert retrieval.token_text(tokenizer, tokenizer.eos_token_id) == "</s>"
    pieces = SimpleNamespace(decode=lambda ids, **_: "fox", convert_ids_to_tokens=lambda i: "▁fox")
    assert retrieval.token_text(pieces, 0) == " fox"


# The command ---------------------------------------------------------------------------------------------------------


def call(*arguments):
    app = typer.Typer()
    app.command("inspect")(with_options(inspect))
    app.command("other")(lambda: None)  # with one command alone there would be no name
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = start.run(app, ["inspect", *map(str, arguments)])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_the_command(folder, tmp_path):
    (tmp_path / "text.txt").write_text("the fox and the dog and the fox " * 1000)
    done = call(folder, "--text", tmp_path / "text.txt", "--out", tmp_path / "p.html", "--tokens", 30, "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    data = data_of((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert "".join(data["texts"][str(i)] for i in data["ids"]) == "the fox and the dog and the fo"
    assert found["tokens"] == 30
    assert found["loss"] == pytest.approx(sum(data["loss"]) / 29, rel=1e-3)
    assert [(h["layer"], h["memory"], h["head"]) for h in found["heads"]] == [
        (layer, memory, head) for layer in (0, 1) for memory in ("short-term", "long-term") for head in range(HEADS)
    ]
    for head, shown in zip(found["heads"], (h for m in data["memories"] for h in m["heads"]), strict=True):
        assert head["right"] == shown["summary"]["right"]
        assert head["reach"] == pytest.approx(1 / (1 - head["decay"]))
    said = call(folder, "--prompt", "ab", "--out", tmp_path / "p.html")
    assert said.returncode == 0, said.stderr
    assert "layer 1, long-term memory" in said.stderr
    assert data_of((tmp_path / "p.html").read_text(encoding="utf-8"))["memories"][1]["heads"][0]["pairs"] == [[], []]


def test_what_cannot_be_shown(folder, tiny_folder, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("before")

    def fails(code, words, *arguments):
        done = call(*arguments)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == code, done.stderr
        assert len(errors) == 1
        assert words in errors[0]
        assert out.read_text() == "before"
        assert list(tmp_path.glob("*.html")) == [out]

    given = ("--prompt", "a text", "--out", out)
    fails(3, "not a Memory Mosaic, but of type 'llama'", tiny_folder, *given)
    fails(3, "no such folder", tmp_path / "none", *given)
    fails(3, "no config.json", tmp_path, *given)
    fails(2, "ends with .html", folder, "--prompt", "a text", "--out", tmp_path / "page.txt")
    fails(2, "either by --text FILE or by --prompt", folder, "--out", out)
    fails(2, "either by --text FILE or by --prompt", folder, *given, "--text", out)
    fails(2, "--prompt is empty", folder, "--prompt", " \n", "--out", out)
    fails(2, "fewer than 2 tokens", folder, "--prompt", "a", "--out", out)
    (tmp_path / "empty.txt").touch()
    fails(2, "is empty", folder, "--text", tmp_path / "empty.txt", "--out", out)
    fails(2, "--tokens 9999: too many", folder, "--prompt", "a " * 9999, "--out", out, "--tokens", 9999)


def test_folders_that_are_not_whole(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = "model.blocks.0.memories.1.present"
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"missing keys: {name}; its files are incomplete"):
        retrieval.load_mosaic(tmp_path)
    save_file(weights | {name: weights[name][:2]}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"mismatched keys: {name}"):
        retrieval.load_mosaic(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ModelError, match="cannot be loaded: "):
        retrieval.load_mosaic(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="not a Memory Mosaic"):
        retrieval.load_mosaic(tmp_path)
