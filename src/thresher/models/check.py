"""The whole model against transformers' own forward, once a model: what no proof of a part can see."""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import xxhash

from thresher.files import replaced_text
from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads
from thresher.kernels.native import kernel_set
from thresher.models.resolve import cache_folder
from thresher.models.states import StateBatch

# Mean KL, nats a token, up to which stock layers on our attention, and native layers, count as right without more ado.
# Trained models are at 0.001 in bf16. Some amplify rounding (they choose experts by it): if all is right in float32,
# JUDGED counts as right, or a few times what rounding does to transformers' own forward.
BOUND = {"float32": 1e-3, "bf16": 0.03, "int8": 0.03}
SWAPPED_BOUND = {"float32": 1e-3, "bf16": 0.03, "int8": 0.15}
JUDGED = {"bf16": 0.03, "int8": 0.3}
AMPLIFIED = 4

TOKENS = 48
LONGEST = 512  # for a model whose window is small enough to be looked beyond
TEXT = (
    "In the year 1667 a book was sold for ten pounds; its author was blind. He had dictated twenty lines a day, "
    "mostly before dawn, and (as he told a friend) slept badly: the verses would not wait. Who bought it? Nobody "
    "knows, but 1,300 copies were gone within eighteen months."
)


@dataclass(frozen=True)
class Check:
    """Mean KL (nats a token) of transformers' own forward over ours, both in the loaded dtype, on a short text.

    attention: stock layers on our attention. layers: what runs, native layers with their weights in the format
    `packed` (bf16 where int8 loses too much), or stock ones if that is None.
    """

    attention: float
    layers: float
    packed: str | None


@dataclass(frozen=True)
class Referee:
    """The model in float32: where rounding is amplified, two right forwards in bf16 are far from each other.

    logits: of transformers' own forward, float32 `[tokens, vocab]`. Mean KL of them over those of
    rounding: the same forward in the loaded dtype; attention: stock float32 layers on our attention; layers: native
    float32 layers.
    """

    logits: torch.Tensor
    rounding: float
    attention: float
    layers: float

    def accepts(self, logits: torch.Tensor, weights: str) -> bool:
        """Whether our computation is right in float32, and these logits are as far from it as rounding can explain."""
        return max(self.attention, self.layers) <= BOUND["float32"] and (
            divergence(self.logits, logits) <= max(JUDGED[weights], AMPLIFIED * self.rounding)
        )


def sample_tokens(tokenizer: Any, config: Any) -> torch.Tensor:
    """int64 `[tokens]`: a short text, repeated until it goes beyond a small sliding window."""
    window = getattr(config, "sliding_window", None) or 0
    count = max(TOKENS, window + TOKENS // 2) if window + TOKENS // 2 <= LONGEST else TOKENS
    try:
        ids = [i for i in tokenizer.encode(TEXT, add_special_tokens=False) if 0 <= i < config.vocab_size]
    except Exception:  # a tokenizer without text: any tokens will do
        ids = []
    if len(set(ids)) < 8:
        ids = torch.randint(config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    count = min(count, int(getattr(config, "max_position_embeddings", None) or count))
    return torch.tensor((ids * (count // len(ids) + 1))[:count])


def own_logits(module: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """transformers' forward on its own attention, in one piece: float32 `[tokens, vocab]`."""
    with torch.inference_mode():
        logits: torch.Tensor = module(input_ids=token_ids[None], use_cache=False).logits[0]
    return logits.float()


def logits_in_pieces(
    run: Callable[..., torch.Tensor],
    heads: Heads,
    layers: int,
    dtype: torch.dtype,
    token_ids: torch.Tensor,
    state_shape: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """The same by `run` (Model.forward) on our attention, in pieces that each read the cache of those before and go on
    from their recurrent state."""
    count = len(token_ids)
    rows = torch.zeros(layers, 2, heads.kv_heads, count, heads.head_dim, dtype=dtype)
    workspace = _native.Workspace()
    cuts = sorted({0, count // 3, count // 3 + 1, count // 3 + 2, 2 * count // 3, count})
    logits = []
    states = torch.zeros(state_shape[0], 1, state_shape[1])
    with torch.inference_mode():
        for begin, end in pairwise(cuts):
            plan = AttentionPlan(heads, dtype, workspace)
            plan.states = StateBatch.fresh(state_shape, [end - begin])
            plan.states.before = states
            plan.add(end - begin, begin, [(rows, end)])
            every = torch.arange(end - begin)
            logits.append(run(token_ids[begin:end], torch.arange(begin, end), plan, every))
            states = plan.states.after
    return torch.cat(logits)


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL of `reference` over `logits` `[tokens, vocab]`, nats a token; infinite if either has NaN."""
    if reference.shape != logits.shape:
        return math.inf
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    mean = (p.exp() * (p - q)).sum(-1).mean().item()
    return max(0.0, mean) if math.isfinite(mean) else math.inf


def check_file(module: Any, fingerprint: str, weights: str) -> Path:
    """Where the result for this model lies: it holds for these weights, this code, and these kernels only."""
    digest = xxhash.xxh3_64(f"{fingerprint} {weights} {kernel_set().name} {next(module.parameters()).dtype}".encode())
    for package in ("torch", "transformers"):
        digest.update(version(package).encode())
    sources = {_native.__file__, inspect.getfile(type(module)), *map(str, Path(__file__).parent.glob("*.py"))}
    for source in sorted(sources):
        digest.update(Path(source).read_bytes())
    return cache_folder() / "checks" / f"{fingerprint[:16]}-{digest.hexdigest()}.json"


def read_check(file: Path) -> Check | None:
    """The result of an earlier load, or None. A file that cannot be read or understood is none."""
    try:
        found = json.loads(file.read_text())
        check = Check(float(found["attention"]), float(found["layers"]), found["packed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = check.packed is None or check.packed in BOUND
    return check if known and math.isfinite(check.attention + check.layers) else None


def write_check(file: Path, check: Check) -> None:
    """Keep a result. A cache that cannot be written costs the next load a few seconds, no more."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replaced_text(file, json.dumps(asdict(check)))
    except OSError:
        pass
