from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli.options import Json, Threads, utf8, writable
from thresher.cli.terminal import read_text, say, stderr, write_json, write_text
from thresher.errors import UsageError

if TYPE_CHECKING:
    from thresher.mosaics.retrieval import Retrieval

_MOST_BYTES = 1 << 28
_CHARACTERS = 64  # for each wanted token: more of a long text is not tokenized


def inspect(
    model: Annotated[Path, typer.Argument(help="The folder of a trained Memory Mosaic.")],
    out: Annotated[Path, typer.Option(help="The page to write, a name that ends with .html.", callback=writable)],
    text: Annotated[Path | None, typer.Option(help="A text file to read; - for standard input.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text itself.")] = None,
    tokens: Annotated[int, typer.Option(help="So many tokens of the text, its first ones, are shown.", min=2)] = 256,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Show what each memory of a Memory Mosaic retrieved in a text: one page that needs no network.

    thresher mosaic inspect model --text book.txt --out page.html
    """
    if out.suffix != ".html":
        raise UsageError(f"--out {out}: the page is HTML; give a name that ends with .html")
    if (text is None) == (prompt is None):
        raise UsageError("give a text, either by --text FILE or by --prompt")
    words = read_text(text, _MOST_BYTES) if text is not None else utf8("--prompt", prompt or "")
    if not words.strip():
        raise UsageError("--prompt is empty; give a text with at least one word")
    with stderr.status("loading the model"):
        import torch

        from thresher.mosaics.corpus import token_ids
        from thresher.mosaics.retrieval import load_mosaic, page, retrieve, table

        if threads:
            torch.set_num_threads(threads)
        module, tokenizer = load_mosaic(model)
    found = retrieve(module, token_ids(tokenizer, words[: _CHARACTERS * tokens])[:tokens].long())
    loss = float(found.loss.mean())
    about = f"{model.resolve().name}, {len(found.ids)} tokens, loss {loss:.3f} nats a token"
    write_text(out, page(found, tokenizer, about))
    say(about)
    if str(json) != "-":
        _show(found)
    say(f"{out} written")
    write_json(json, {"page": str(out), "tokens": len(found.ids), "loss": loss, "heads": table(found)})


def _show(found: "Retrieval") -> None:
    """The head of each memory whose pairs were followed by what came next most often."""
    for reading in found.readings:
        shares = [summary.right or 0.0 for summary in reading.summaries]
        best = max(range(len(shares)), key=shares.__getitem__)
        say(
            f"layer {reading.layer}, {reading.name} memory: head {best} has most of its weight on right answers, "
            f"{shares[best]:.3f}; all pairs alike {reading.uniform.right or 0.0:.3f}"
        )
