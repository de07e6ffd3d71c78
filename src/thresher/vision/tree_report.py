"""A network taken apart, on one page: its tree, what each leaf costs and is right about, and how its groups follow
WordNet."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from thresher.errors import ModelError
from thresher.vision.dissected import PARTS, TREE
from thresher.vision.hierarchy import draw_tree, newick, read_tree
from thresher.vision.models import read_description
from thresher.vision.report import image, interval, table, write_page

_KINDS = {
    "taxonomy": "WordNet's own tree",
    "before": "impact, before tuning",
    "impact": "impact",
    "confusion": "confusion",
    "weights": "weights of the last layer",
}
_USES = {
    "whole": "the whole network",
    "tuned": "tuned to the taxonomy",
    "all": "all leaves side by side",
    "soft": "all leaves, weighted by the routers",
    "likely": "leaves with a chance of 2 %",
    "hard": "the likeliest leaf alone",
}


def is_tree(folder: Path) -> bool:
    """Whether `make_hierarchy` wrote this folder."""
    return (folder / PARTS).is_file()


def write_tree_report(folder: Path, page: Path) -> dict[str, Any]:
    """Write a page (.html), the tree as a picture (.png) and the leaves (.csv); returns all numbers. Raises ModelError,
    StorageError."""
    about = read_description(folder)
    tree = read_tree(folder / TREE, about.classes)
    try:
        made: dict[str, Any] = about.history["hierarchy"]
        settings = made["settings"]
        glosses = dict(zip(settings["synsets"], settings["glosses"], strict=True))
        draw_tree(tree, about.classes, page.with_suffix(".png"))
        words = zip(about.classes, settings["synsets"], settings["glosses"], strict=True) if glosses else ()
        body = [
            image(page.with_suffix(".png"), "The tree of classes"),
            "<h2>Accuracy and FLOPs</h2>",
            table(("", "test images right, %", "FLOPs, % of the whole", "parameters, %"), _uses(made)),
            "<p>95 % intervals. Where not all leaves are run: multiply-adds of an image on average, with routers.</p>",
            "<h2>Leaves</h2>",
            table(
                ("leaf", "classes", "right, %", "the whole among these, %", "FLOPs", "parameters", "time"),
                _leaves(made),
            ),
            f"<p>Time: share of the whole's, by batch size, {made['device']}, both folded.</p>",
        ]
        if made["coherence"]:
            body += [
                "<h2>Do groups follow their meaning?</h2>",
                table(("groups by", "Wu-Palmer", "of random", "p", "Lin", "of random", "p", "Rand", "cophenetic"),
                      _coherence(made)),
                "<p>Mean similarity of two classes of a group in WordNet, beside the mean and 95 % of random groups of "
                "the same sizes; Rand: agreement with WordNet's tree cut to as many groups; cophenetic: correlation of "
                "the whole tree with WordNet.</p>",
                "<h2>What the classes are</h2>",
                table(("class", "synset", ""), [list(row) for row in words], "words"),
            ]  # fmt: skip
        body += ["<h2>Newick</h2>", table(("",), [[newick(tree, about.classes)]], "words")]
        said, rows = _about(about.source, about.classes, settings), _csv(made)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(f"{folder}: its description is damaged: {error!r:.200}") from error
    write_page(page, folder.resolve().name, "a CNN taken apart", said, body, rows)
    return made


def _about(source: str, classes: tuple[str, ...], settings: dict[str, Any]) -> str:
    follow, cut = settings["follow"], settings["dissect"]
    how = (
        f"tuned to WordNet by {follow['method']} (weight {follow['weight']:g})" if follow else "not tuned to a taxonomy"
    )
    return (
        f"{source}, {len(classes)} classes; {how}; groups by {settings['tree']}; leaves of at most "
        f"{100 * cut['flops']:.0f} % of the FLOPs and {100 * cut['parameters']:.0f} % of the parameters; trained for "
        f"{settings['finetune']['epochs']} epochs from the whole."
    )


def _uses(made: dict[str, Any]) -> list[list[str]]:
    rows = []
    costs = {"tuned": "whole", "soft": "all"}
    for name, share in made["accuracy"].items():
        row = [_USES.get(name, name), interval(share)]
        for cost in ("macs", "parameters"):
            value = made["costs"][cost].get(costs.get(name, name))
            row.append(f"{100 * value / made['costs'][cost]['whole']:.0f}" if value is not None else "")
        rows.append(row)
    return rows


def _leaves(made: dict[str, Any]) -> list[list[str]]:
    rows = []
    for leaf in made["leaves"]:
        times = ", ".join(f"{100 * less / whole:.0f} % ({b})" for b, (whole, less) in leaf["seconds"].items())
        shares = (f"{100 * leaf[name]:.0f} %" for name in ("flops", "parameters"))
        right = interval(leaf["accuracy"]), interval(leaf["whole"])
        rows.append([leaf["name"], ", ".join(leaf["classes"]), *right, *shares, times])
    return rows


def _coherence(made: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, found in made["coherence"].items():
        row = [_KINDS.get(name, name)]
        for measure in ("wu_palmer", "lin"):
            t = found[measure]
            row += [f"{t['value']:.3f}", f"{t['mean']:.3f} ({t['low']:.3f} to {t['high']:.3f})", f"{t['p']:.2g}"]
        rows.append([*row, f"{found['rand']:.2f}", f"{found['cophenetic']:.2f}"])
    return rows


def _csv(made: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("leaf", "classes", "accuracy", "whole", "flops", "parameters", "seconds"))
    for leaf in made["leaves"]:
        right = leaf["accuracy"]["mean"], leaf["whole"]["mean"]
        classes, seconds = "; ".join(leaf["classes"]), json.dumps(leaf["seconds"])
        writer.writerow((leaf["name"], classes, *right, leaf["flops"], leaf["parameters"], seconds))
    return out.getvalue()
