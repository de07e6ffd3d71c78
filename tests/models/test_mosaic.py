"""Memory Mosaics: the memory's mathematics, and one model in its parallel and its recurrent form."""

import copy
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import byte_tokenizer
from thresher.models.load import checked
from thresher.models.mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM, MosaicCache, decay_groups
from thresher.models.mosaic.leaky import leaky_loop, leaky_scan
from thresher.models.mosaic.memory import gaussian_memory

VOCABULARY = 97


def mosaic(version: int = 1, seed: int = 0, **changed) -> MemoryMosaicForCausalLM:
    """A small model whose learned scales, shares and decays are all different from each other."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "dropout": 0.0,
    }
    short = {"short_window": 50, "long_delay": 16, "long_delay_train": (16, 32)}
    config = MemoryMosaicConfig(**sizes | changed) if version == 1 else MemoryMosaicConfig.v2(**sizes | short | changed)
    model = MemoryMosaicForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2 and name.endswith(("decay", "present", "scale")):
                p.add_(torch.rand_like(p) * 0.05)
    return model


@pytest.fixture(scope="module", params=[1, 2], ids=["v1", "v2"])
def model(request):
    return mosaic(request.param)


def text(n: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, n), generator=torch.Generator().manual_seed(seed))


def whole(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# The memory ----------------------------------------------------------------------------------------------------------


def pairs(n=20, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(n + 1, dim, generator=g, dtype=torch.float64)
    values = torch.randn(n, 3, generator=g, dtype=torch.float64)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    return keys[0], keys[1:], values


def test_on_unit_keys_kernel_regression_is_softmax_attention():
    query, keys, values = pairs()
    for beta in (0.1, 3.7, 50.0):
        softmax = (2 * beta * keys @ query).softmax(0) @ values
        assert torch.allclose(gaussian_memory(query, keys, values, beta), softmax, rtol=1e-12, atol=1e-12)


def test_a_memory_is_a_set():
    query, keys, values = pairs()
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(3))
    moved = gaussian_memory(query, keys[order], values[order], 5.0)
    assert torch.allclose(moved, gaussian_memory(query, keys, values, 5.0), rtol=1e-12, atol=1e-14)


def test_limits_of_the_bandwidth():
    query, keys, values = pairs()
    nearest = (keys @ query).argmax()
    assert torch.allclose(gaussian_memory(query, keys, values, 1e6), values[nearest], atol=1e-12)
    assert torch.allclose(gaussian_memory(query, keys, values, 0.0), values.mean(0), atol=1e-12)


# The leaky average ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
@pytest.mark.parametrize("steps", [1, 2, 31, 32, 33, 64, 700, 1100])
def test_scan_is_the_loop(decay, steps):
    torch.manual_seed(steps)
    x = torch.randn(2, steps, 3, 4, dtype=torch.float64)
    log_decay = torch.full((1, steps, 3), math.log(decay) if decay else -math.inf, dtype=torch.float64)
    y = leaky_scan(x, log_decay)
    assert torch.allclose(y, leaky_loop(x, log_decay), rtol=1e-10, atol=1e-10)
    assert not leaky_scan(torch.zeros_like(x), log_decay).any()


def test_scan_with_decays_of_each_token():
    torch.manual_seed(0)
    x = torch.randn(2, 150, 3, 4, dtype=torch.float64)
    log_decay = -torch.rand(2, 150, 3, dtype=torch.float64) * 4
    log_decay[0, 70] = -torch.inf  # all before is forgotten
    assert torch.allclose(leaky_scan(x, log_decay), leaky_loop(x, log_decay), rtol=1e-10, atol=1e-10)


def test_gradients_of_the_scan():
    torch.manual_seed(0)
    x = torch.randn(1, 70, 2, 2, dtype=torch.float64, requires_grad=True)
    log_decay = (-torch.rand(1, 70, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(leaky_scan, (x, log_decay), fast_mode=True)
    weights = torch.randn(1, 70, 2, 2, dtype=torch.float64)
    by_scan = torch.autograd.grad((leaky_scan(x, log_decay) * weights).sum(), (x, log_decay))
    by_loop = torch.autograd.grad((leaky_loop(x, log_decay) * weights).sum(), (x, log_decay))
    for a, b in zip(by_scan, by_loop, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


# The model -----------------------------------------------------------------------------------------------------------


def test_nothing_leaks(model):
    """An output depends on all tokens up to its own and on none after it."""
    ids = text(120)
    logits = whole(model, ids)
    for t in (1, 20, 60, 119):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % VOCABULARY
        moved = whole(model, changed)
        assert torch.equal(moved[0, :t], logits[0, :t])
        assert not torch.equal(moved[0, t], logits[0, t])


def test_an_early_token_is_remembered(model):
    """Far beyond what the leaky average carries: by the memory alone."""
    ids = text(120)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % VOCABULARY
    assert (whole(model, changed)[0, -1] - whole(model, ids)[0, -1]).abs().max() > 1e-6


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_parallel_and_recurrent_are_one_model(model, chunk):
    """To rounding: the scores of v2 grow with the number of pairs, to 60 here, and their rounding with them."""
    ids = text(2000 if chunk == 512 else 300, rows=2)
    reference = whole(model, ids)
    cache, parts = None, []
    with torch.no_grad():
        for piece in ids.split(chunk, dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert (torch.cat(parts, dim=1) - reference).abs().max() < (5e-5 if len(model.config.memories) > 1 else 1e-5)
    assert isinstance(cache, MosaicCache)


def test_generate_with_and_without_cache(model):
    ids = text(40, rows=2)
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert torch.equal(model.generate(ids, num_beams=3, **settings)[:, :40], ids)


def test_beams_with_and_without_cache(model):
    settings = {"max_new_tokens": 20, "num_beams": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = text(30)
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_a_saved_model_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["model_type"] == "memory_mosaic"
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(whole(again, text(70)), whole(model, text(70)))


def test_scales_stay_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {n.rpartition(".")[2] for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert "value_scale" in kept
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert whole(half.eval(), text(70)).isfinite().all()


def test_gradient_checkpointing_and_compile_change_nothing():
    ids = text(60, rows=2)

    def losses(prepare):
        model = mosaic().train()
        run = prepare(model)
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), model.model.embed_tokens.weight.grad

    def checkpointed(model):
        model.gradient_checkpointing_enable()
        return model

    plain = losses(lambda model: model)
    for prepare in (checkpointed, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")):
        for a, b in zip(plain, losses(prepare), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_what_decays():
    for version in (1, 2):
        model = mosaic(version)
        matrices, rest = decay_groups(model, 0.1)
        assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
        free = {id(p) for p in rest["params"]}
        for name, p in model.named_parameters():
            last = name.rpartition(".")[2]
            assert (id(p) in free) == (
                last in ("decay", "present", "key_scale", "value_scale", "theta") or "norm" in name
            )
        assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_published_starts():
    fresh = MemoryMosaicForCausalLM(mosaic(initializer="library").config)
    memory = fresh.model.blocks[0].memories[0]
    decay = (-10 * memory.keys.decay.abs()).exp()
    assert decay[0].item() == pytest.approx(math.exp(-0.5))
    assert decay[-1].item() == pytest.approx(math.exp(-5))
    assert (20 * memory.key_scale[0]).exp().item() == pytest.approx(7.39, abs=0.01)
    assert 0 <= memory.present.min() < memory.present.max() <= 1
    assert fresh.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.05)
    out = fresh.model.blocks[0].context_out.weight
    assert out.std().item() == pytest.approx(1 / math.sqrt(64 * 3), rel=0.05)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    nano = MemoryMosaicForCausalLM(mosaic().config)
    assert nano.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert nano.model.blocks[0].context_out.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    loss = nano.train()(input_ids=text(64, 4), labels=text(64, 4)).loss.item()
    assert loss == pytest.approx(math.log(VOCABULARY), abs=0.1)  # it begins by knowing nothing


def test_a_block_is_as_large_as_that_of_gpt2():
    d = 64
    blocks = sum(p.numel() for p in mosaic().model.blocks.parameters())
    assert blocks == pytest.approx(3 * 12 * d * d, rel=0.01)


def test_the_delay_is_drawn_in_training():
    model = mosaic(2).train()
    torch.manual_seed(0)
    drawn = {model.model._drawn_delay() for _ in range(200)}
    assert drawn == set(range(16, 33))
    assert model.eval().model._drawn_delay() is None


@pytest.mark.parametrize("tokens", [1, 2])
def test_short_sequences(model, tokens):
    assert whole(model, text(tokens)).isfinite().all()


def test_padding(model):
    ids = text(20, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with pytest.raises(ValueError, match="left"):
        model(ids, attention_mask=mask)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(padded, whole(model, ids))


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 30, "num_attention_heads": 4},
        {"keys": "lossy"},
        {"short_window": -1},
        {"long_delay_train": (9, 3)},
    ],
)
def test_configurations_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match="heads|keys|short_window"):
        MemoryMosaicConfig(**wrong)


@pytest.mark.parametrize("weights", ["float32", "bf16", "int8"])
def test_the_engine_runs_it(model, weights):
    """The check of every model that is loaded: against its own parallel form."""
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    loaded = checked(lambda: copy.deepcopy(model).to(dtype), byte_tokenizer(), "mosaic", weights)
    assert loaded.check is not None
    assert loaded.check.packed == weights
    assert loaded.state_shape == model.state_shape
    assert loaded.blank == (1 if len(model.config.memories) == 1 else 16)
