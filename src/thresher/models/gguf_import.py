"""A GGUF file becomes a safetensors folder in the cache, once: a way to get a model here, not a format to run."""

import fcntl
import io
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import xxhash

from thresher.errors import ModelError, StorageError

FORMAT = 1  # raise it when the conversion changes: older folders are then left alone and made anew


def import_gguf(path: Path, name: str, cache: Path, progress: Callable[[str], None]) -> Path:
    """The folder with the converted model, made if it is not there.

    The folder appears whole or not at all; of two processes the second waits for the first.
    Raises ModelError if the file is broken or of an unknown architecture, StorageError if the cache cannot be written.
    """
    check_header(path)
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
                    _convert(path, making)
                    os.rename(making, folder)
                finally:
                    shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{cache}: {error.strerror or error}; set THRESHER_CACHE to a folder with space") from error
    return folder


def check_header(path: Path) -> None:
    """Refuse what is not a GGUF file before a library trusts its counts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file")
    version, tensors, entries = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3):
        raise ModelError(f"{path}: GGUF version {version} is not known (2 and 3 are)")
    if tensors > 1 << 20 or entries > 1 << 20 or (tensors + entries) * 12 > size:
        raise ModelError(f"{path} is not a readable GGUF file: {tensors} tensors, {entries} entries in {size} bytes")


def _content_hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, file = str(path.parent), path.name
    try:
        with redirect_stderr(io.StringIO()):  # progress bars of its own
            loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
        # What came from a GGUF file refuses to be saved; a fresh model with its weights does not.
        config = loaded.config
        config._name_or_path = ""
        del config.quantization_config
        with torch.device("meta"):
            model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = loaded.generation_config
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path} is not a GGUF file that can be converted: {reason}") from error
    with redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
