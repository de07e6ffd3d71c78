"""A GGUF file becomes a safetensors folder in the cache, once: a way to get a model here, not a format to run."""

import errno
import fcntl
import io
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import xxhash

from thresher.errors import ModelError, StorageError
from thresher.models.gguf_header import Header, check_header

FORMAT = 2  # raise it when the conversion changes: older folders are then left alone and made anew


def import_gguf(path: Path, name: str, cache: Path, progress: Callable[[str], None]) -> Path:
    """The folder with the converted model, made if it is not there.

    The folder appears whole or not at all; of two processes the second waits for the first.
    Raises ModelError if the file is broken or of an unknown architecture, StorageError if the cache cannot be written.
    """
    header = check_header(path)
    _check_complete(path, header)
    folder = cache / "models" / f"{name}-{_content_hash(path)}-{FORMAT}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                progress(f"converting {path.name} (once; kept in {folder.parent})")
                making = folder.with_name(folder.name + ".making")
                shutil.rmtree(making, ignore_errors=True)  # left by a process that was killed
                making.mkdir()
                try:
                    _convert(path, header, making, progress)
                    os.rename(making, folder)
                finally:
                    shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{cache}: {error.strerror or error}; set THRESHER_CACHE to a folder with space") from error
    return folder


def _content_hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # a network file system without locks: two conversions at once only waste work
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield


def _check_complete(path: Path, header: Header) -> None:
    parts = header.values.get("split.count", 0)
    if parts > 1:
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        last = f"{parts:05}-of-{parts:05}"
        raise ModelError(
            f"{path} is one part of {parts}: join {stem}-00001-of-{parts:05}.gguf to {stem}-{last}.gguf "
            "with llama-gguf-split --merge, and give the joined file"
        )


def _convert(path: Path, header: Header, folder: Path, progress: Callable[[str], None]) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # transformers goes by the suffix, and looks in the working directory first: the link's path settles both.
        with tempfile.TemporaryDirectory() as where, redirect_stderr(io.StringIO()):  # progress bars of its own
            link = Path(where) / "model.gguf"
            link.symlink_to(path.resolve())
            loaded, info = AutoModelForCausalLM.from_pretrained(
                where, gguf_file=str(link), dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=str(link))
        _check_all_used(loaded, header, info)
        # What came from a GGUF file refuses to be saved; a fresh model with its weights does not.
        config = loaded.config
        config._name_or_path = ""
        del config.quantization_config
        _set_rope_scaling(config, path, header)
        with torch.device("meta"):
            model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = loaded.generation_config
        _set_end_tokens(model, header)
        _set_pre_tokenizer(tokenizer, path, header, progress)
    except OSError as error:
        if error.errno is not None:  # the temporary folder; transformers' own have no number
            raise
        raise _not_convertible(path, error) from error
    except Exception as error:
        raise _not_convertible(path, error) from error
    try:
        with redirect_stderr(io.StringIO()):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # it wraps what the system said: no space left, file too large
        raise StorageError(f"{folder.parent}: {error}; set THRESHER_CACHE to a folder with space") from error


def _not_convertible(path: Path, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return ModelError(f"{path} is not a GGUF file that can be converted: {reason}")


def _check_all_used(loaded: Any, header: Header, info: dict[str, Any]) -> None:
    """Every weight of the model came from the file, and every tensor of the file went into the model."""
    absent = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if absent:
        raise ModelError(f"weights are missing: {_some(absent)}")
    architecture = str(header.values.get("general.architecture"))
    unused = _unused_tensors(loaded, architecture, [tensor.name for tensor in header.tensors])
    unused += [str(key) for key in info["unexpected_keys"]]
    if unused:
        raise ModelError(f"tensors of the file that {type(loaded).__name__} has no place for: {_some(sorted(unused))}")


def _unused_tensors(loaded: Any, architecture: str, names: list[str]) -> list[str]:
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if is_gguf_arch_supported(architecture):
        return []  # of these transformers itself reports what it did not use
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    places = get_gguf_hf_weights_map(loaded, processor)
    handled = {"rope_freqs.weight"} | ({"output.weight"} if architecture == "gpt2" else set())
    # Experts lie in one tensor, whose place is known without the suffix.
    return [n for n in names if n not in places and n.removesuffix(".weight") not in places and n not in handled]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# Keys of rope.scaling that change nothing here: what the file was trained with, or read below.
_ROPE_KEYS = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}


def _set_rope_scaling(config: Any, path: Path, header: Header) -> None:
    """Carry over the scaling of rotary positions, which transformers drops; refuse what has no equal there."""
    prefix = f"{header.values.get('general.architecture')}.rope."
    keys = {
        k.removeprefix(prefix + "scaling."): v for k, v in header.values.items() if k.startswith(prefix + "scaling.")
    }
    factor = float(keys.get("factor") or header.values.get(prefix + "scale_linear") or 1)
    kind = keys.get("type", "linear")  # llama.cpp's default
    strange = sorted(keys.keys() - _ROPE_KEYS - ({"attn_factor", "yarn_attn_factor"} if _ones(keys) else set()))
    scaling: dict[str, Any] = {}
    if kind == "none" or (kind == "linear" and factor == 1):
        pass
    elif strange:
        raise ModelError(f"{prefix}scaling.{strange[0]} is not known; RoPE scaling would be wrong")
    elif kind == "linear" and factor > 0:
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor >= 1:
        original = keys.get("original_context_length") or config.max_position_embeddings
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
        scaling |= {k.removeprefix("yarn_"): float(keys[k]) for k in ("yarn_beta_fast", "yarn_beta_slow") if k in keys}
    else:
        raise ModelError(f"{prefix}scaling.type '{kind}' with factor {factor:g} is not known")
    params = getattr(config, "rope_parameters", None)
    factors = _rope_factors(path, header)
    if any(abs(f - 1) > 1e-6 for f in factors):
        if scaling or not params or "rope_theta" not in params:
            raise ModelError("rope_freqs.weight together with other RoPE scaling is not known")
        scaling = _llama3(factors, float(params["rope_theta"]), config)
    if not scaling:
        return
    if params and "rope_theta" in params:
        config.rope_parameters = {**params, **scaling}
    elif params and "full_attention" in params and config.model_type == "gemma3_text" and kind == "linear":
        # As llama.cpp: layers with a window keep their positions.
        config.rope_parameters = {**params, "full_attention": {**params["full_attention"], **scaling}}
    else:
        raise ModelError(f"{prefix}scaling.type '{kind}' is not known for {config.model_type}")


def _ones(keys: dict[str, Any]) -> bool:
    return all(keys.get(k, 1) == 1 for k in ("attn_factor", "yarn_attn_factor"))


def _rope_factors(path: Path, header: Header) -> tuple[float, ...]:
    for tensor in header.tensors:
        if tensor.name == "rope_freqs.weight":
            if tensor.type != 0:
                raise ModelError("rope_freqs.weight is not of float32")
            with path.open("rb") as file:
                file.seek(tensor.begin)
                return struct.unpack(f"<{math.prod(tensor.dims)}f", file.read(tensor.bytes))
    return ()


def _llama3(factors: tuple[float, ...], theta: float, config: Any) -> dict[str, Any]:
    """The llama3 parameters that give exactly these divisors of the frequencies; ModelError if there are none."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factor, low, high, original = max(factors), 1.0, 4.0, 8192  # all but the factor are the same in every Llama 3
    for i, found in enumerate(factors):
        waves = original * theta ** (-2 * i / head_dim) / (2 * math.pi)
        smooth = min(1.0, max(0.0, (waves - low) / (high - low)))
        if len(factors) * 2 != head_dim or not math.isclose(found, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            raise ModelError("rope_freqs.weight is not what Llama 3's formula gives; RoPE scaling would be wrong")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _set_end_tokens(model: Any, header: Header) -> None:
    """A chat model ends its turn with a token of its own, which transformers does not read."""
    found = model.generation_config.eos_token_id
    ends = set(found if isinstance(found, list) else [] if found is None else [found])
    for name in ("eos", "eot", "eom"):
        token = header.values.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int) and 0 <= token < model.config.get_text_config().vocab_size:
            ends.add(token)
    if ends:
        model.generation_config.eos_token_id = sorted(ends)


# What llama.cpp does for a `tokenizer.ggml.pre`: each digit apart and then GPT-2's pattern, or that pattern alone.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "exaone4", "gigachat", "a.x-4.0", "mellum", "jais"}


def _set_pre_tokenizer(tokenizer: Any, path: Path, header: Header, progress: Callable[[str], None]) -> None:
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if header.values.get("tokenizer.ggml.model") != "gpt2":
        return  # SentencePiece does not split beforehand
    kind = header.values.get("tokenizer.ggml.pre")
    if kind in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind not in _AS_GPT2 and kind not in GGUF_PRE_TOKENIZER_SPLITS:
        progress(f"{path.name}: pre-tokenizer '{kind}' is not known; GPT-2's is taken, and some tokens may be wrong")
