"""What the contextual memories of a Memory Mosaic retrieved in a text: which pairs each token read, and how much.

Pair i is (k_i, v_i): what had been read when token i came, and what followed, token i + 1. A memory of delay m holds
it from token i + m on. Weights are those of the kernel regression, so a token's weights add up to one.
"""

import base64
import io
import json
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from thresher.errors import ModelError, UsageError
from thresher.models.mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM
from thresher.models.mosaic.memory import ContextualMemory
from thresher.models.states import StateBatch

TOP_PAIRS, TOP_TOKENS = 8, 5
MOST_WEIGHTS = 64_000_000  # squares of tokens over all heads: of more the page is too large for a browser
_LEVELS = 255  # steps of the square root of a weight, as the page's picture has it


@dataclass(frozen=True)
class Summary:
    """What a head read, as means over the tokens that read anything; None where there is no such token.

    strongest: weight of the pair that was read most. distance: how many tokens back pairs were. same: share of weight
    on pairs that came after the same token as the present one. right: share on pairs that were followed by what came
    next here.
    """

    strongest: float | None
    distance: float | None
    same: float | None
    right: float | None


@dataclass(frozen=True)
class Reading:
    """What one contextual memory was asked and gave in a text.

    weights: float32 `[heads, tokens, tokens]`, of pair i at token t; rows of tokens that found it empty are zeros.
    beta: bandwidth; decay: lambda of the leaky key; `[tokens, heads]` each, or `[1, heads]` if it is the same for all
    tokens. share: c `[heads]`, of token i in the value of pair i.
    uniform: what a head would have that reads all pairs alike.
    """

    layer: int
    memory: int
    name: str
    delay: int
    window: int
    weights: torch.Tensor
    beta: torch.Tensor
    decay: torch.Tensor
    share: torch.Tensor
    summaries: tuple[Summary, ...]
    uniform: Summary


@dataclass(frozen=True)
class Retrieval:
    """A text as a model read it.

    ids: `[tokens]`. readings: of every layer's memories, in order. top, top_ids: the most probable next tokens,
    `[tokens, TOP_TOKENS]`. loss: nats of the token that came next, `[tokens - 1]`.
    """

    ids: torch.Tensor
    readings: tuple[Reading, ...]
    top: torch.Tensor
    top_ids: torch.Tensor
    loss: torch.Tensor


def load_mosaic(folder: Path) -> tuple[Any, Any]:
    """The model in float32 and the tokenizer of a folder. Raises ModelError if it holds no whole Memory Mosaic."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type") if isinstance(config, dict) else None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no config.json that can be read; give the folder of a model") from error
    if kind != MemoryMosaicConfig.model_type:
        raise ModelError(f"{folder}: not a Memory Mosaic, but of type {kind!r}")
    try:
        with redirect_stderr(io.StringIO()):  # bars and warnings
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"{folder}: cannot be loaded: {reason}") from error
    for fault, keys in info.items():  # transformers fills what is missing with random numbers
        if keys:
            names = sorted(str(key if isinstance(key, str) else key[0]) for key in keys)
            raise ModelError(f"{folder}: {fault.replace('_', ' ')}: {', '.join(names[:4])}; its files are incomplete")
    return model.eval(), tokenizer


def read_weights(memory: ContextualMemory, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a memory does with its input x `[tokens, d]`: weights `[heads, tokens, tokens]` of pair i at token t, and
    bandwidths `[tokens, heads]` or `[1, heads]`, so that scores are beta k_t k_i of unit keys."""
    tokens = x.shape[0]
    batch = StateBatch.fresh((1, sum(memory.state_sizes)), [tokens])
    streams, _ = memory.recurrent(x, torch.arange(tokens), batch, batch.before[0])
    # Keys are late by the delay: the first rows are none of this text, and the last pairs are read by nobody in it.
    keys = F.pad(streams.keys[memory.delay :], (0, 0, 0, 0, 0, min(memory.delay, tokens)))
    held = held_pairs(tokens, memory.delay, memory.window)
    scores = torch.einsum("thd,ihd->hti", streams.queries, keys)
    weights = scores.masked_fill(~held, -torch.inf).softmax(-1)
    weights = torch.where(held.any(-1)[:, None], weights, 0.0)  # of no pairs there is no average: the answer is 0
    scale = streams.queries.norm(dim=-1)
    return weights, scale if memory.adaptive else scale[:1].square()  # fixed: a half in the query, a half in the key


def held_pairs(tokens: int, delay: int, window: int) -> torch.Tensor:
    """Whether pair i is in a memory when token t asks it, bool `[tokens, tokens]`."""
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :] - delay
    return (age >= 0) & (age < window) if window else age >= 0


@torch.no_grad()
def retrieve(model: MemoryMosaicForCausalLM, ids: torch.Tensor) -> Retrieval:
    """Read a text, int64 `[tokens]`. Raises UsageError if there are fewer than two tokens or too many for a page,
    ModelError if the model does not know them or computes no numbers."""
    config, blocks = model.config, model.model.blocks
    tokens, heads = len(ids), config.num_attention_heads
    if tokens < 2:
        raise UsageError("the text has fewer than 2 tokens: there is no pair to read; give a longer one")
    all_heads = len(blocks) * len(config.memories) * heads
    if all_heads * tokens**2 > MOST_WEIGHTS:
        raise UsageError(
            f"--tokens {tokens}: too many to show for {all_heads} heads; "
            f"at most {int((MOST_WEIGHTS / all_heads) ** 0.5)}"
        )
    if int(ids.max()) >= config.vocab_size:
        raise ModelError(f"token {int(ids.max())} is none of the model's {config.vocab_size}: not its tokenizer")
    inputs: list[torch.Tensor] = []
    hooks = [b.context_norm.register_forward_hook(lambda module, given, y: inputs.append(y[0])) for b in blocks]
    try:
        logits = model(ids[None], use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    if not logits.isfinite().all():
        raise ModelError("the model computes NaN or infinity; its files are damaged")
    log_p = logits.log_softmax(-1)
    top = log_p.topk(min(TOP_TOKENS, config.vocab_size))
    loss = -log_p[:-1].gather(1, ids[1:, None])[:, 0]
    readings = tuple(
        _reading(memory, layer, i, len(block.memories), x, ids)
        for layer, (block, x) in enumerate(zip(blocks, inputs, strict=True))
        for i, memory in enumerate(block.memories)
    )
    return Retrieval(ids, readings, top.values.exp(), top.indices, loss)


def _reading(memory: ContextualMemory, layer: int, number: int, of: int, x: torch.Tensor, ids: torch.Tensor) -> Reading:
    weights, beta = read_weights(memory, x)
    held = held_pairs(len(ids), memory.delay, memory.window).float()
    every = held / held.sum(-1, keepdim=True).clamp(min=1)
    return Reading(
        layer=layer,
        memory=number,
        name=("short-term", "long-term")[number] if of > 1 else "contextual",
        delay=memory.delay,
        window=memory.window,
        weights=weights,
        beta=beta,
        decay=memory.keys.contributions(x)[1].exp(),
        share=memory.present.detach(),
        summaries=tuple(summarize(w, ids) for w in weights),
        uniform=summarize(every, ids),
    )


def summarize(weights: torch.Tensor, ids: torch.Tensor) -> Summary:
    """Of one head's weights `[tokens, tokens]` in a text `[tokens]`."""
    at = torch.arange(len(ids))
    reads = weights.sum(-1) > 0
    follower = ids[1:]  # of pair i; the last token has none yet
    same = (weights * (ids[None, :] == ids[:, None])).sum(-1)
    right = (weights[:-1, :-1] * (follower[None, :] == follower[:, None])).sum(-1)
    return Summary(
        strongest=_mean(weights.amax(-1)[reads]),
        distance=_mean((weights * (at[:, None] - at[None, :])).sum(-1)[reads]),
        same=_mean(same[reads]),
        right=_mean(right[reads[:-1]]),
    )


def _mean(values: torch.Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def top_pairs(weights: torch.Tensor) -> list[list[tuple[int, float]]]:
    """Of one head's weights `[tokens, tokens]` the largest of each token, as (pair, weight), largest first."""
    found = weights.topk(min(TOP_PAIRS, weights.shape[1]))
    rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [[(i, w) for i, w in zip(*row, strict=True) if w > 0] for row in rows]


def reach(decay: float) -> float | None:
    """How many tokens back a leaky average looks, 1 / (1 - lambda); None: it forgets nothing."""
    return 1 / (1 - decay) if decay < 1 else None


def token_text(tokenizer: Any, token: int) -> str:
    """A token as a reader may see it: bytes that are a part of a character as \\xc3, and with its leading space."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if "\ufffd" in text:
        code = {character: byte for byte, character in bytes_to_unicode().items()}
        if all(c in code for c in piece):
            return "".join(chr(code[c]) if code[c] < 128 else f"\\x{code[c]:02x}" for c in piece)
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def table(found: Retrieval) -> list[dict[str, Any]]:
    """Every head with its numbers, means over tokens where they change with the token."""
    return [
        {"layer": r.layer, "memory": r.name, "head": head}
        | {"beta": float(r.beta[:, head].mean()), "decay": (decay := float(r.decay[:, head].mean()))}
        | {"reach": reach(decay), "share": float(r.share[head])}
        | asdict(summary)
        for r in found.readings
        for head, summary in enumerate(r.summaries)
    ]


def page(found: Retrieval, tokenizer: Any, about: str) -> str:
    """One HTML page that needs no network."""
    known: dict[int, str] = {}
    for token in [*found.ids.tolist(), *found.top_ids.flatten().tolist()]:
        if token not in known:
            known[token] = token_text(tokenizer, token)
    data = {
        "about": about,
        "ids": found.ids.tolist(),
        "texts": known,
        "loss": _rounded(found.loss),
        "top": [
            list(zip(ids, p, strict=True))
            for ids, p in zip(found.top_ids.tolist(), map(_rounded, found.top), strict=True)
        ],
        "memories": [_shown(r) for r in found.readings],
    }
    # Within a script only "<" could end it or begin a comment.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    template = files("thresher.mosaics").joinpath("retrieval.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", text)


def _shown(r: Reading) -> dict[str, Any]:
    tokens = r.weights.shape[1]
    below = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1)
    heads = [
        {
            "beta": _rounded(r.beta[:, head]),
            "decay": _rounded(r.decay[:, head]),
            "share": float(f"{float(r.share[head]):.4g}"),
            "summary": asdict(summary),
            "pairs": [[(i, float(f"{w:.4g}")) for i, w in row] for row in top_pairs(weights)],
            # Row by row what lies below the diagonal: a token reads no pair that it is a part of.
            "weights": base64.b64encode(_levels(weights[below])).decode(),
        }
        for head, (weights, summary) in enumerate(zip(r.weights, r.summaries, strict=True))
    ]
    shown = {"layer": r.layer, "memory": r.memory, "name": r.name, "delay": r.delay, "window": r.window}
    return shown | {"uniform": asdict(r.uniform), "heads": heads}


def _levels(weights: torch.Tensor) -> bytes:
    return (weights.sqrt() * _LEVELS).round().clamp(0, _LEVELS).to(torch.uint8).numpy().tobytes()


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{x:.4g}") for x in values.tolist()]
