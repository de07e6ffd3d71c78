"""Load a causal language model, check that we can run it, and put it on our kernels."""

import io
import math
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from thresher.errors import ModelError, ThresherError, UnsupportedModelError, UsageError
from thresher.kernels.attention import AttentionPlan, Heads
from thresher.machine.memory import available_memory
from thresher.models.check import (
    BOUND,
    SWAPPED_BOUND,
    Check,
    Referee,
    check_file,
    divergence,
    logits_in_pieces,
    own_logits,
    read_check,
    sample_tokens,
    write_check,
)
from thresher.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from thresher.models.fuse import fuse, weight_bytes
from thresher.models.interface import (
    Attend,
    check_config,
    forward,
    inspect_model,
    position_limit,
    use_our_attention,
)
from thresher.models.resolve import ModelSource, Progress
from thresher.models.stack import Stack, plain_stack
from thresher.models.states import state_shape_of

# What --weights says: the dtype of the packed weights. Activations and KV cache are float32 only for float32.
WEIGHTS = {"bf16": torch.bfloat16, "int8": torch.int8, "float32": torch.float32}


@dataclass(frozen=True)
class Model:
    """A model ready to run. `module` is transformers' own, with layers swapped for native ones."""

    name: str
    module: Any
    tokenizer: Any
    heads: Heads
    layers: int
    dtype: torch.dtype  # of activations and KV cache
    weights: str  # a key of WEIGHTS
    weight_bytes: int  # read by one decode step
    windows: tuple[int, ...]  # sliding window of each layer, 0: none
    positions: int  # the longest sequence it was trained for
    vocab_size: int
    eos_token_ids: frozenset[int]
    fingerprint: str
    tokenizer_fingerprint: str
    stock_modules: tuple[str, ...] = ()  # kinds of module that were not swapped
    stack: Stack | None = None  # the plain loop over native layers, if it gives the bits of `module`
    state_shape: tuple[int, int] = (0, 0)  # layers, and numbers of a layer, of a sequence's recurrent state
    trained_length: int = 0  # of a model without positions, to which any length may be given; 0: `positions`
    blank: int = 0  # most first rows of a layer's cache that hold nothing
    check: Check | None = None  # against transformers; None if it was prepared without

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, plan: Attend, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        """One pass over a flattened batch: int64 `[tokens]` each -> float32 logits `[logit_rows, vocab]`."""
        if self.stack and isinstance(plan, AttentionPlan):
            return self.stack.forward(token_ids, positions, plan, logit_rows)
        return forward(self.module, token_ids, positions, plan, logit_rows)


def load(
    source: ModelSource,
    weights: str = "bf16",
    trust_remote_code: bool = False,
    progress: Progress = lambda message: None,
) -> Model:
    """Load a resolved model, and check it once against transformers' own forward (`Model.check`).

    progress: told of what takes long, and if native layers had to be given up.
    Raises UsageError for unknown weights, ModelError if files are missing or broken, tensors missing or left over or
    weights not numbers, UnsupportedModelError if it asks of attention what we do not compute.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights '{weights}': choose one of {', '.join(WEIGHTS)}")
    from transformers import AutoModelForCausalLM

    import thresher.models.mosaic  # noqa: F401  (registers its class with the auto classes)

    def make() -> Any:
        with redirect_stderr(io.StringIO()), _ClearErrors(source):
            module, info = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=torch.float32 if weights == "float32" else torch.bfloat16,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
        _check_tensors(source.folder, info)
        return module.eval()

    with redirect_stderr(io.StringIO()), _ClearErrors(source):
        tokenizer = load_tokenizer(source, trust_remote_code)
    model = checked(make, tokenizer, source.name, weights, progress)
    return replace(model, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder. Of one converted from GGUF just what was written: transformers would go by the model's
    type, and for Qwen put text into Unicode's composed form before it is cut, which the file does not ask for."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source.gguf:
        return PreTrainedTokenizerFast.from_pretrained(source.folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code, local_files_only=True)


def checked(
    make: Callable[[], Any], tokenizer: Any, name: str, weights: str, progress: Progress = lambda message: None
) -> Model:
    """Prepare the module that `make` gives, and compare it with what it was: first on our attention, then on our
    layers. Where int8 loses too much native bf16 layers are tried, and stock ones if those are wrong. The module is
    made again for that, or if a float32 copy is needed to judge: keeping more than one would take the memory.

    Raises UnsupportedModelError if transformers' own layers on our attention give other answers, ModelError if weights
    are not numbers.
    """
    module = make()
    _check_numbers(module, name)
    config = module.config.get_text_config()
    check_config(config)
    fingerprint = model_fingerprint(module.config, module.state_dict())
    file = check_file(module, fingerprint, weights)
    stock = "float32" if weights == "float32" else "bf16"  # the format of transformers' own layers
    if known := read_check(file):
        return replace(prepare(module, tokenizer, name, known.packed or stock, bool(known.packed)), check=known)
    progress(f"checking {name} in {weights} against transformers (once)")
    token_ids = sample_tokens(tokenizer, config)
    kind = type(module).__name__
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    try:
        reference = own_logits(module, token_ids)
    except Exception as error:  # of a model's own code anything may come
        raise UnsupportedModelError(f"{kind} does not run on tokens alone: {type(error).__name__}: {error}") from error

    @cache
    def referee() -> Referee | None:
        # Loading, and a copy of twice the size beside it.
        return _referee(make, tokenizer, name, token_ids, reference) if 3 * size <= available_memory() else None

    def judged(model: Model, bound: dict[str, float]) -> tuple[float, bool]:
        """KL to transformers' own forward, and whether the model passes."""
        try:
            logits = _logits(model, token_ids)
        except UnsupportedModelError:
            raise
        except Exception:
            return math.inf, False
        kl = divergence(reference, logits)
        if kl <= bound[model.weights] or model.weights == "float32":
            return kl, kl <= bound[model.weights]
        judge = referee() if logits.isfinite().all() else None
        return kl, judge is not None and judge.accepts(logits, model.weights)

    model = prepare(module, tokenizer, name, weights, swap=False)
    attention, right = judged(model, BOUND)
    if not right:
        raise UnsupportedModelError(
            f"{kind}: on Thresher's attention its answers are not those of transformers (KL {attention:.2g})"
        )
    for packed in ("int8", "bf16") if weights == "int8" else (weights,):
        model = prepare(module, tokenizer, name, packed)
        layers, right = judged(model, SWAPPED_BOUND)
        check = Check(attention, layers, packed)
        if right:
            break
        progress(f"{name}: native {packed} layers give other answers (KL {layers:.2g}) and are not used")
        del model, module
        module = make()
    else:
        progress(f"{name}: runs on the layers of transformers")
        model = prepare(module, tokenizer, name, stock, swap=False)
        check = Check(attention, attention, packed=None)
    write_check(file, check)
    return replace(model, check=check)


def _logits(model: Model, token_ids: torch.Tensor) -> torch.Tensor:
    return logits_in_pieces(model.forward, model.heads, model.layers, model.dtype, token_ids, model.state_shape)


def _referee(
    make: Callable[[], Any], tokenizer: Any, name: str, token_ids: torch.Tensor, reference: torch.Tensor
) -> Referee:
    """The model in float32 as the judge."""
    module = make().float()
    logits = own_logits(module, token_ids)
    ours = []
    for swap in (False, True):
        model = prepare(module, tokenizer, name, "float32", swap)
        ours.append(divergence(logits, _logits(model, token_ids)))
    return Referee(logits, divergence(logits, reference), *ours)


def prepare(module: Any, tokenizer: Any, name: str, weights: str, swap: bool = True) -> Model:
    """Put a loaded transformers model on our attention and, if `swap`, on our layers, without `checked`'s check."""
    use_our_attention(module)
    seen = inspect_model(module)
    fingerprint = model_fingerprint(module.config, module.state_dict())
    stock = fuse(module, WEIGHTS[weights], seen.calls, seen.weights_read) if swap else []
    module.requires_grad_(False)
    config = module.config.get_text_config()
    first = seen.calls[0]
    heads = Heads(first.q_heads, first.kv_heads, first.head_dim)
    return Model(
        name=name,
        module=module,
        tokenizer=tokenizer,
        heads=heads,
        layers=len(seen.calls),
        dtype=torch.float32 if weights == "float32" else torch.bfloat16,
        weights=weights,
        weight_bytes=weight_bytes(module),
        windows=tuple(call.window for call in seen.calls),
        positions=position_limit(config),
        vocab_size=config.vocab_size,
        eos_token_ids=eos_token_ids(module, tokenizer),
        fingerprint=fingerprint,
        tokenizer_fingerprint="",
        stock_modules=tuple(stock),
        stack=plain_stack(module, heads) if swap else None,
        state_shape=state_shape_of(module),
        trained_length=int(getattr(config, "trained_length", 0)),
        blank=max(call.blank for call in seen.calls),
    )


def eos_token_ids(module: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer: the ids of generation_config, else of the config, else of the tokenizer; and the token that
    the chat template puts after an assistant's turn."""
    configs = (module.generation_config, module.config, module.config.get_text_config(), tokenizer)
    for source in configs:
        given = getattr(source, "eos_token_id", None)
        ids = [given] if isinstance(given, int) else list(given or [])
        if ids:
            break
    return frozenset(ids) | _end_of_turn(tokenizer)


def _end_of_turn(tokenizer: Any) -> frozenset[int]:
    """The special token that follows an assistant's words in the chat template, if there is one."""
    words = "Words of the assistant"
    messages = [{"role": "user", "content": "Words of the user"}, {"role": "assistant", "content": words}]
    try:
        after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(words)[2].lstrip()
    except Exception:  # no template, or one that does not take these messages
        return frozenset()
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = [i for i, content in special.items() if content and after.startswith(content)]
    return frozenset([max(found, key=lambda i: len(special[i]))] if found else [])


# Tensors of old checkpoints that transformers computes by itself today.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "attn.bias", "attn.masked_bias", "position_ids")


def _check_tensors(folder: Path, info: dict[str, Any]) -> None:
    """Transformers fills missing tensors with random numbers, and drops those it has no place for."""
    faults = {
        "missing": sorted(info["missing_keys"]),
        "of another shape": sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]),
        "left over": sorted(key for key in info["unexpected_keys"] if not key.endswith(_COMPUTED)),
        "not converted": sorted(map(str, info.get("error_msgs") or [])),
    }
    for fault, keys in faults.items():
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise ModelError(
                f"{folder}: tensors {fault}: {', '.join(keys[:4])}{more}; the model's files are incomplete"
            )


def _check_numbers(module: Any, name: str) -> None:
    for key, tensor in module.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name}: the weights of {key} contain NaN or infinity; the files are damaged")


class _ClearErrors:
    """Turn what transformers raises on missing or broken files into one line."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ThresherError):
            text = str(error).strip()
            reason = text.splitlines()[0][:160] if text else type(error).__name__
            raise ModelError(f"{self.source.folder}: cannot be loaded: {reason}") from error


def same_tokens(a: Model, b: Model) -> bool:
    """Whether token ids mean the same in both models, but for ids that only one of them has."""
    if a.tokenizer_fingerprint == b.tokenizer_fingerprint:
        return True
    first, second = a.tokenizer.get_vocab(), b.tokenizer.get_vocab()
    few, many = sorted((first, second), key=len)
    return all(many.get(token) == i for token, i in few.items())
