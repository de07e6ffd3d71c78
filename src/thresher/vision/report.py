"""A compressed model on one page: what it costs, what it is right about, under attack too, and every layer's ranks."""

import base64
import csv
import io
import json
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from thresher.errors import ModelError, StorageError
from thresher.evaluation.plots import load_pyplot, save_figure
from thresher.files import replaced_text
from thresher.vision.models import DESCRIPTION
from thresher.vision.robustness import KEPT


@dataclass(frozen=True)
class Folder:
    """What a folder says: of its model (`about`), of how it was made (`made`) and of attacks on it, if there were
    any."""

    name: str
    about: dict[str, Any]
    made: dict[str, Any]
    tuned: dict[str, Any] | None
    attacks: dict[str, Any] | None

    def raw(self) -> dict[str, Any]:
        """For JSON."""
        return {"tucker": self.made, "finetune": self.tuned, "attacks": self.attacks}


def read_folder(folder: Path) -> Folder:
    """Raises ModelError for a folder that `tucker` did not write."""
    try:
        about = json.loads((folder / DESCRIPTION).read_text())
        history = about["history"]
        attacks = json.loads((folder / KEPT).read_text()) if (folder / KEPT).is_file() else None
        return Folder(folder.name, about, history["tucker"], history["finetune"], attacks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: holds no result of `thresher vision tucker` or `hierarchy`") from error


def write_report(folder: Path, page: Path) -> Folder:
    """Write a page (.html), and beside it a picture (.png) and the layers (.csv), of what `tucker` wrote to a folder
    and `robustness.keep` added. Raises ModelError, StorageError."""
    found = read_folder(folder)
    picture = page.with_suffix(".png")
    try:
        _draw(found, picture)
        body = [
            image(picture, "What is left of costs, of each layer, and of accuracy under attack"),
            "<h2>Costs</h2>",
            table(("", "before", "after", "left"), _cost_rows(found)),
            "<h2>Accuracy</h2>",
            table(("", "test images right"), _accuracy_rows(found)),
            "<h2>Robust accuracy</h2>",
            _robust(found),
            _checks(found),
            "<h2>Layers</h2>",
            table(("layer", "how", "channels", "ranks", "error", "FLOPs left", "parameters left"), _layers(found)),
        ]
        about, rows = _about(found), _csv(found)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(f"{found.name}: its {DESCRIPTION} or {KEPT} is damaged: {error!r}") from error
    write_page(page, found.name, "a decomposed CNN", about, body, rows)
    return found


def write_page(page: Path, title: str, kind: str, about: str, body: list[str], rows: str) -> None:
    """The page of these parts of HTML, and its numbers (.csv) beside it. Raises StorageError."""
    template = Template(files("thresher.vision").joinpath("report.html").read_text(encoding="utf-8"))
    text = template.substitute(title=escape(title), kind=kind, about=escape(about), body="\n".join(body))
    try:
        for path, content in ((page, text), (page.with_suffix(".csv"), rows)):
            replaced_text(path, content)
    except OSError as error:
        raise StorageError(f"{page}: cannot be written: {error.strerror}") from error


def image(picture: Path, alt: str) -> str:
    """A PNG as part of the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'


def _about(found: Folder) -> str:
    settings, tuned = found.made["settings"], found.tuned
    target = settings["target"]
    how = f"target {target['share']:g} of {target['cost']}, ranks by {settings['method']}" if target else "ranks given"
    if tuned:
        how += f"; fine-tuned with {tuned['objective']}, {tuned['epochs']} epochs, learning rate {tuned['lr']:g}"
    shape = " x ".join(map(str, found.about["shape"]))
    return f"{found.about['source']}, {len(found.about['classes'])} classes, images of {shape}; {how}."


def _cost_rows(found: Folder) -> list[list[str]]:
    rows = []
    for name, (before, after) in found.made["costs"].items():
        label = {"macs": "multiply-adds of an image", "parameters": "parameters"}[name]
        rows.append([label, f"{before:,}", f"{after:,}", f"{100 * after / before:.1f} %"])
    for batch, (before, after) in found.made["seconds"].items():
        label = f"time of a batch of {batch}, {found.made['device']}, both folded"
        rows.append([label, f"{1000 * before:.2f} ms", f"{1000 * after:.2f} ms", f"{100 * after / before:.0f} %"])
    return rows


def _accuracy_rows(found: Folder) -> list[list[str]]:
    return [[name, f"{100 * share:.2f} %"] for name, share in found.made["accuracy"].items()]


def _robust(found: Folder) -> str:
    if not found.attacks:
        return "<p>Not attacked yet: <code>thresher vision attack</code> adds this part.</p>"
    rival = any(row["rival"] for row in found.attacks["rows"])
    rows = []
    for row in found.attacks["rows"]:
        cells = [row["attack"], f"{row['epsilon']:.3g}", interval(row["accuracy"])]
        if rival:
            cells += [interval(row["rival"]), interval(row["difference"], "+"), f"{row['p']:.2g}"]
        rows.append(cells)
    head = ("attack", "epsilon", "this model") + (("the other", "difference", "p") if rival else ())
    text = f"<p>{found.attacks['images']} test images; % still right, 95 % interval; p: McNemar's exact test.</p>"
    text += table(head, rows)
    for d in found.attacks["distances"]:
        median = "none" if d["median"] is None else f"{d['median']:.3f}"
        said = f"{d['model']}, {d['attack']}: median L2 distance {median}"
        text += f"<p>{escape(said)}, {d['failed']:d} of {d['attacked']:d} failed</p>"
    return text


def _checks(found: Folder) -> str:
    if not found.attacks or not found.attacks["checks"]:
        return ""
    rows = []
    for c in found.attacks["checks"]:
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in c["numbers"].items())
        rows.append(["passed" if c["passed"] else "FAILED", c["name"], c["rule"], numbers])
    return "<h2>Are gradients masked?</h2>" + table(("", "check", "rule", "numbers"), rows, "words")


def _layers(found: Folder) -> list[list[str]]:
    rows = []
    for r in found.made["layers"]:
        ranks = {"tucker": f"{r['ranks'][0]}, {r['ranks'][1]}", "svd": str(r["ranks"][0])}.get(r["kind"], "")
        how = r["kind"] if r["kind"] != "kept" else f"kept: {r['reason']}"
        shares = (f"{100 * r[k][1] / r[k][0]:.0f} %" for k in ("macs", "parameters"))
        error = f"{r['error']:.3f}" if r["kind"] != "kept" else ""
        rows.append([r["name"], how, f"{r['channels'][0]}, {r['channels'][1]}", ranks, error, *shares])
    return rows


def interval(value: dict[str, float], sign: str = "") -> str:
    """An interval of shares in %."""
    return f"{100 * value['mean']:{sign}.1f} ({100 * value['low']:{sign}.1f} to {100 * value['high']:{sign}.1f})"


def table(head: tuple[str, ...], rows: list[list[str]], kind: str = "numbers") -> str:
    """HTML; kind: of the columns, numbers or words."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _csv(found: Folder) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(
        ("layer", "kind", "reason", "outputs", "inputs", "rank_outputs", "rank_inputs", "error", "macs_before",
         "macs_after", "parameters_before", "parameters_after")
    )  # fmt: skip
    for r in found.made["layers"]:
        pairs = (*r["channels"], *r["ranks"], r["error"], *r["macs"], *r["parameters"])
        writer.writerow((r["name"], r["kind"], r["reason"], *pairs))
    return out.getvalue()


def _draw(found: Folder, path: Path) -> None:
    """What is left of costs; robust accuracy over epsilon; FLOPs of each layer before and after."""
    pyplot = load_pyplot()
    attacked = [r for r in (found.attacks or {}).get("rows", []) if r["attack"] != "clean"]
    figure, axes = pyplot.subplots(1, 3 if attacked else 2, figsize=(16 if attacked else 11, 4.2))
    names = ["FLOPs", "parameters", *(f"time, batch {b}" for b in found.made["seconds"])]
    pairs = [*found.made["costs"].values(), *found.made["seconds"].values()]
    shares = [100 * after / before for before, after in pairs]
    bars = axes[0].barh(names, shares, color="#2468c8")
    axes[0].bar_label(bars, fmt="%.0f %%", padding=3)
    axes[0].axvline(100, color="#888", lw=1, ls="--")
    axes[0].set(xlabel="% of the whole model's", xlim=(0, max(110, *shares) * 1.1))
    axes[0].invert_yaxis()
    layers = found.made["layers"]
    places = range(len(layers))
    axes[1].bar(places, [r["macs"][0] / 1e6 for r in layers], color="#c9d6ea", label="before")
    axes[1].bar(places, [r["macs"][1] / 1e6 for r in layers], color="#2468c8", width=0.5, label="after")
    axes[1].set(xlabel="convolution, in the order they run", ylabel="million multiply-adds")
    axes[1].legend()
    if attacked:
        clean = next(r for r in found.attacks["rows"] if r["attack"] == "clean")  # type: ignore[index]
        for i, name in enumerate(dict.fromkeys(r["attack"] for r in attacked)):
            own = [clean, *sorted((r for r in attacked if r["attack"] == name), key=lambda r: r["epsilon"])]
            x = [r["epsilon"] for r in own]
            for key, style, label in (("accuracy", "-", name), ("rival", "--", f"{name}, the other")):
                if own[-1][key]:
                    y = [100 * r[key]["mean"] for r in own]
                    axes[2].plot(x, y, style, marker="osD^vP*X"[i % 8], color=f"C{i}", label=label)
        axes[2].set(xlabel="epsilon (Linf)", ylabel="% still right", ylim=(0, 100))
        axes[2].legend(fontsize=7)
        axes[2].grid(alpha=0.3)
    figure.tight_layout()
    save_figure(pyplot, figure, path)
