"""A GGUF file becomes a safetensors folder in the cache, once: a way to get a model here, not a format to run."""

import errno
import fcntl
import glob
import io
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import xxhash

from thresher.errors import CapacityError, ModelError, StorageError
from thresher.machine.memory import available_memory
from thresher.models.gguf_config import ROPE_TENSORS, architecture_of, model_config, refuse, some, unknown_groups
from thresher.models.gguf_header import Header, TensorInfo, check_header
from thresher.models.gguf_tokenizer import check_tokenizer_keys, end_tokens, gguf_tokenizer

FORMAT = 3  # raise it when the conversion changes: older folders are then left alone and made anew


def import_gguf(path: Path, name: str, cache: Path, progress: Callable[[str], None]) -> Path:
    """The folder with the converted model, made if it is not there.

    The folder appears whole or not at all; of two processes the second waits for the first. The parts of a split
    file are found beside each other, whichever of them is given.
    Raises ModelError if the file is broken, UnsupportedModelError naming what would be lost in the conversion,
    CapacityError if memory is too small for it, StorageError if the cache cannot be written.
    """
    header = _joined_header(path)
    folder = cache / "models" / f"{name[:60]}-{_content_hash(header)}-{FORMAT}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")) as alone:
            if not folder.is_dir():
                progress(f"converting {path.name} (once; kept in {folder.parent})")
                for left in folder.parent.glob(f"{glob.escape(folder.name)}.*.making") if alone else ():
                    shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
                making = folder.with_name(f"{folder.name}.{os.getpid()}-{threading.get_ident()}.making")
                making.mkdir()
                try:
                    _convert(header, making, lambda message: progress(f"{path.name}: {message}"))
                    _rename(making, folder)
                finally:
                    shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{cache}: {error.strerror or error}; set THRESHER_CACHE to a folder with space") from error
    return folder


def _joined_header(path: Path) -> Header:
    """The header of a file, or of all the parts of a split one."""
    header = check_header(path)
    count = header.values.get("split.count", 0)
    if type(count) is not int or count <= 1:
        return header
    here = header.values.get("split.no")
    match = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", path.name, re.IGNORECASE)
    part = f"{path} is part {here + 1 if type(here) is int else '?'} of {count}"
    if not match or count > 9999:
        raise ModelError(f"{part}: give it the name it was made with, NAME-00001-of-{count:05}.gguf, beside the others")
    paths = [path.with_name(f"{match[1]}{number:05}{match[2]}") for number in range(1, count + 1)]
    missing = [str(number) for number, other in enumerate(paths, 1) if not other.is_file()]
    if missing:
        listed = f"parts {', '.join(missing[:-1])} and {missing[-1]} are" if missing[1:] else f"part {missing[0]} is"
        raise ModelError(f"{part}: {listed} missing beside it")
    headers = [check_header(other) for other in paths]
    tensors: dict[str, TensorInfo] = {}
    for number, other in enumerate(headers):
        said = [other.values.get(key) for key in ("split.no", "split.count")]
        if said != [number, count] or any(tensor.name in tensors for tensor in other.tensors):
            raise ModelError(f"{other.path} is not part {number + 1} of {count} of the same model as {path.name}")
        tensors |= {tensor.name: tensor for tensor in other.tensors}
    if headers[0].values.get("split.tensors.count", len(tensors)) != len(tensors):
        raise ModelError(f"{path}: its {count} parts have {len(tensors)} tensors, not as many as they say")
    return Header(headers[0].path, headers[0].values, tuple(tensors.values()))


def _content_hash(header: Header) -> str:
    digest = xxhash.xxh3_64()
    for path in dict.fromkeys([header.path, *(tensor.path for tensor in header.tensors)]):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock file; False where the file system has no locks, and two conversions at once only waste work."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            yield False
        else:
            yield True


def _rename(making: Path, folder: Path) -> None:
    try:
        os.rename(making, folder)
    except OSError:
        if not folder.is_dir():  # else another process, which no lock could hold back, was faster
            raise


def _convert(header: Header, folder: Path, warn: Callable[[str], None]) -> None:
    from transformers import GenerationConfig

    _check_memory(header)
    try:
        architecture_of(header)
        check_tokenizer_keys(header)
        config = model_config(header)
        tokenizer = gguf_tokenizer(header, warn)
        model = _load(header, config)
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            pad_token_id=config.pad_token_id,
            eos_token_id=end_tokens(header) or None,
        )
        if unknown := unknown_groups(header):
            warn(f"keys that no reader asks for: {some(unknown)}")
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        kind = type(error) if isinstance(error, ModelError) else ModelError
        raise kind(f"{header.path} is not a GGUF file that can be converted: {reason}") from error
    try:
        with redirect_stderr(io.StringIO()):  # progress bars of its own
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # the libraries in Rust raise types of their own for a full disk
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise StorageError(f"{folder.parent}: {reason}; set THRESHER_CACHE to a folder with space") from error


def _check_memory(header: Header) -> None:
    """The whole model is held in float32."""
    needed = sum(4 * math.prod(info.dims) for info in header.tensors)
    if needed > (free := available_memory()):
        raise CapacityError(
            f"{header.path}: converting it takes {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free; "
            "give the model's Hugging Face folder"
        )


def _load(header: Header, config: Any) -> Any:
    """The model with the file's tensors as float32; every tensor is used, and none of the model's is missing."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    architecture = header.values["general.architecture"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    places = get_gguf_hf_weights_map(model, processor)
    # Experts lie in one tensor, whose place is known without the suffix; GPT-2's output goes to a place of its own.
    known = places.keys() | {f"{name}.weight" for name in places} | set(ROPE_TENSORS)
    known |= {"output.weight"} if architecture == "gpt2" else set()
    refuse(info.name for info in header.tensors if info.name not in known)

    parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
    tensors = parsed["tensors"]
    for info in header.tensors:
        if info.name not in ROPE_TENSORS:
            done = processor.process(_dequantized(info), info.name, tensor_key_mapping=places, parsed_parameters=parsed)
            if done.name is not None:  # else it is among the tensors already
                tensors[places[done.name]] = torch.from_numpy(done.weights.copy())
    expected = model.state_dict()
    for name, wanted in expected.items():
        # The flag for biases of q, k and v asks for one of the output too.
        if name.endswith(".o_proj.bias") and not any(n.endswith(".o_proj.bias") for n in tensors):
            tensors |= {n: torch.zeros(wanted.shape) for n in expected if n.endswith(".o_proj.bias")}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if missing := sorted(expected.keys() - tensors.keys() - tied):
        raise ModelError(f"weights are missing: {some(missing)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model


def _dequantized(info: TensorInfo) -> Any:
    """The numbers of a tensor as float32, numpy; the dimension that moves fastest comes last."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(info.type)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    shape = info.dims[::-1]
    stored = np.memmap(info.path, np.uint8, "r", info.begin, info.bytes)
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        number = "<f4" if kind == GGMLQuantizationType.F32 else "<f2"
        return np.array(stored).view(number).astype(np.float32).reshape(shape)
    return dequantize(stored.reshape(*shape[:-1], shape[-1] // block * block_bytes), kind).reshape(shape)
