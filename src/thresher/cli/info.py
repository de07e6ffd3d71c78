from pathlib import Path
from typing import Annotated, Any

import typer

from thresher.cli import options as o
from thresher.cli.terminal import one_line, progress_bar, write_json
from thresher.errors import UsageError


def info(
    what: Annotated[str, typer.Argument(help="A KV file, or a model as --model takes it.", metavar="FILE.kv|MODEL")],
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Read the whole KV file and compare its checksums.")] = False,
    weights: o.Weights = "bf16",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model, if you trust it.")
    ] = False,
    json: o.Json = None,
) -> None:
    """Show what a KV file holds, or how a model runs here.

    thresher info book.kv

    A KV file is described without its model; a model is loaded.
    """
    if is_kv_file(Path(what)):
        found = describe_file(Path(what), verify)
    elif verify:
        raise UsageError(f"--verify: {what} is not a KV file")
    else:
        found = describe_model(what, weights, trust_remote_code)
    if str(json) != "-":
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, box=None)
        for name, value in found.items():
            table.add_row(name.replace("_", " "), one_line(shown(value)))
        Console().print(table)
    write_json(json, found)


def is_kv_file(path: Path) -> bool:
    """Any file but a GGUF file: of one that is neither, the KV file's error says more."""
    if path.suffix == ".kv" or (path.exists() and not path.is_file() and not path.is_dir()):
        return True
    if not path.is_file() or path.suffix.lower() == ".gguf":
        return False
    with path.open("rb") as file:
        return file.read(4) != b"GGUF"


def describe_file(path: Path, verify: bool) -> dict[str, Any]:
    """What the file says of itself. Raises KVFileError if it is damaged."""
    header = o.kv_header(path)
    from thresher.cache.file import index_of

    with progress_bar(f"checking {path}") as bar:
        index = index_of(path, verify=verify, progress=bar)
    layout = header.layout
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "model": header.identity.model,
        "model_found_at": header.model or None,
        "weights": header.weights,
        "tokens": header.length,
        "layers": layout.layers,
        "kv_heads": layout.kv_heads,
        "head_dim": layout.head_dim,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "bytes_per_token": layout.bytes_per_token,
        "framing": header.framing,
        "source": header.source.name if header.source else None,
        "source_sha256": header.source.sha256 if header.source else None,
        "index": str(index[0].get("method")) if index else None,
        "index_bytes": sum(array.numel() * array.itemsize for array in index[1].values()) if index else 0,
        "model_fingerprint": header.identity.model_fingerprint,
        "tokenizer_fingerprint": header.identity.tokenizer_fingerprint,
        "checksums": "all match" if verify else "not compared; --verify does",
    }


def describe_model(name: str, weights: str, trust_remote_code: bool) -> dict[str, Any]:
    """How the model runs here. Raises ModelError."""
    llm = o.Running(trust_remote_code=trust_remote_code).load(name, weights, "dense")
    model = llm.model
    check = getattr(model, "check", None)
    ends = {i: str(model.tokenizer.convert_ids_to_tokens(i)) for i in sorted(model.eos_token_ids)}
    return {
        "model": model.name,
        "folder": str(llm.source.folder),
        "architecture": type(model.module).__name__,
        "weights": model.weights,
        "weight_bytes": model.weight_bytes,
        "layers": model.layers,
        "query_heads": model.heads.q_heads,
        "kv_heads": model.heads.kv_heads,
        "head_dim": model.heads.head_dim,
        "sliding_windows": list(model.windows) if any(model.windows) else None,
        "positions": model.positions,
        "trained_length": model.trained_length or model.positions,
        "state_bytes": llm.runner.layout.state_bytes,
        "vocabulary": model.vocab_size,
        "kv_dtype": str(model.dtype).removeprefix("torch."),
        "kv_bytes_per_token": llm.runner.layout.bytes_per_token,
        "stock_modules": list(model.stock_modules),
        "end_tokens": ends,
        "chat_template": bool(model.tokenizer.chat_template),
        "kl_to_transformers": None if check is None else vars(check),
        "model_fingerprint": model.fingerprint,
        "tokenizer_fingerprint": model.tokenizer_fingerprint,
    }


def shown(value: Any) -> str:
    """A value for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2g}"
    return "none" if value is None else str(value)
