"""The whole model against transformers' own forward, once a model: what no proof of a part can see."""

import inspect
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import xxhash

from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads
from thresher.kernels.native import kernel_set
from thresher.models.interface import forward
from thresher.models.resolve import cache_folder

# Mean KL, nats a token, beyond which a model on our attention is refused. A wrong one in float32 is far above; in bf16
# rounding alone can come to a tenth where it flips the choice of experts. And beyond which native layers
# are undone; int8 layers lose more than bf16 ones do.
BOUND = {"float32": 1e-3, "bf16": 0.3, "int8": 0.3}
SWAPPED_BOUND = {"float32": 1e-3, "bf16": 0.03, "int8": 0.15}

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

    attention: stock layers on our attention. layers: what runs, native layers or (`swapped` is False) stock ones.
    """

    attention: float
    layers: float
    swapped: bool


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


def logits_in_pieces(module: Any, heads: Heads, layers: int, token_ids: torch.Tensor) -> torch.Tensor:
    """The same on our attention, in pieces that each read the cache of those before: float32 `[tokens, vocab]`."""
    dtype = next(module.parameters()).dtype
    count = len(token_ids)
    rows = torch.zeros(layers, 2, heads.kv_heads, count, heads.head_dim, dtype=dtype)
    workspace = _native.Workspace()
    cuts = sorted({0, count // 3, count // 3 + 1, count // 3 + 2, 2 * count // 3, count})
    logits = []
    with torch.inference_mode():
        for begin, end in pairwise(cuts):
            plan = AttentionPlan(heads, dtype, workspace)
            plan.add(end - begin, begin, [(rows, end)])
            every = torch.arange(end - begin)
            logits.append(forward(module, token_ids[begin:end], torch.arange(begin, end), plan, every))
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
        check = Check(float(found["attention"]), float(found["layers"]), found["swapped"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return check if isinstance(check.swapped, bool) and math.isfinite(check.attention + check.layers) else None


def write_check(file: Path, check: Check) -> None:
    """Keep a result. A cache that cannot be written costs the next load a few seconds, no more."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
            out.write(json.dumps(asdict(check)))
        os.replace(out.name, file)
    except OSError:
        pass
