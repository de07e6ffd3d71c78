"""WordNet 3.0: which noun a class is, and how alike two are. nltk reads it, from where Debian's package puts it.

The numbers are those of its noun hierarchy, hypernyms and instance hypernyms alike; a depth counts synsets from the
root, which has depth 1, by the longest way.
"""

import io
import math
import re
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from thresher.errors import StorageError, UsageError

WORDNET = Path("/usr/share/wordnet")  # where Debian's package puts it
MEASURES = ("wu-palmer", "path", "lin")
BUILT_IN = {  # classes of Fashion-MNIST, whose own words have no entry or mean something else first
    "T-shirt/top": "jersey.n.03",
    "Trouser": "trouser.n.01",
    "Pullover": "pullover.n.01",
    "Dress": "dress.n.01",
    "Coat": "coat.n.01",
    "Sandal": "sandal.n.01",
    "Shirt": "shirt.n.01",
    "Sneaker": "gym_shoe.n.01",
    "Bag": "bag.n.04",
    "Ankle boot": "boot.n.01",
}
# The lexicographer files in the order of their numbers, lexnames(5WN): nltk wants a file of them, Debian has none.
_LEXNAMES = (
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute"),
    *("noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group"),
    *("noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant"),
    *("noun.possession", "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state"),
    *("noun.substance", "noun.time", "verb.body", "verb.change", "verb.cognition", "verb.communication"),
    *("verb.competition", "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion"),
    *("verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather", "adj.ppl"),
)
_PARTS = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
_MOST_BYTES = 1 << 20  # of a file of synsets


@lru_cache(maxsize=4)
def open_wordnet(folder: Path = WORDNET) -> Any:
    """nltk's WordNetCorpusReader of a folder with WordNet's database files, the same one each time. Raises UsageError.

    The folder is appended to nltk.data.path, outside of which nltk reads nothing (nor through links that lead out of
    it); `lexnames` is made up here where the folder has none.
    """
    try:
        import nltk.data
        from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError
    except ImportError as error:
        raise UsageError("nltk is not installed: pip install 'thresher[vision]'") from error
    if not (folder / "data.noun").is_file():
        hint = "apt install wordnet-base (make vision-data)"
        raise UsageError(f"{folder}: WordNet is not installed there: {hint}")
    made_up = "" if (folder / "lexnames").is_file() else _lexnames()

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        def open(self, file: str) -> Any:
            return io.StringIO(made_up) if made_up and file == "lexnames" else super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Onto the version that translations are of: this one, and none are read."""

    root = str(folder.resolve())
    if root not in nltk.data.path:
        nltk.data.path.append(root)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The multilingual functions")
            return Reader(root, None)
    except (OSError, ValueError, LookupError, AssertionError, StopIteration, WordNetError) as error:
        raise UsageError(f"{folder}: WordNet cannot be read: {error!r}; install wordnet-base again") from error


def _lexnames() -> str:
    return "".join(f"{i:02}\t{name}\t{_PARTS[name.split('.')[0]]}\n" for i, name in enumerate(_LEXNAMES))


def read_synsets(path: Path) -> dict[str, str]:
    """Class names and their synsets from a TOML file, `"Ankle boot" = "boot.n.01"` on a line each. Raises
    StorageError, UsageError."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{path}: more than {_MOST_BYTES >> 20} MiB are no file of synsets")
    try:
        chosen = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{path}: not TOML like "Ankle boot" = "boot.n.01", a line each: {error}') from error
    for name, synset in chosen.items():
        if not isinstance(synset, str):
            hint = f'"{name}" = "boot.n.01"'
            raise UsageError(f"{path}: {name!r} is given no synset in quotes; a line is like {hint}")
    return chosen


def find_synsets(wordnet: Any, classes: tuple[str, ...], chosen: dict[str, str] | None = None) -> tuple[Any, ...]:
    """The synset of each class, in order: the first of these that there is.

    1. What `chosen` says: a synset's name ("gym_shoe.n.01"), or a WordNet id ("n04355338", or the digits alone).
    2. BUILT_IN, for exactly these names.
    3. A name that is a WordNet id (n and 8 digits, as ImageNet's): the noun at this offset.
    4. The first sense of the noun that the name is, spaces being underscores and letters of any case; of a name with
       commas ("tench, Tinca tinca") its first part that is one. No plurals or other forms.

    Raises UsageError, which names all classes that are no noun, or two of the same synset, or what `chosen` says of
    none of the classes.
    """
    given = BUILT_IN | (chosen or {})
    strange = sorted(set(chosen or {}) - set(classes))
    if strange:
        named = ", ".join(map(repr, strange))
        raise UsageError(f"synsets are given of what is no class: {named}; correct these lines or take them out")
    found = [_by_name(wordnet, given[name]) if name in given else _by_rule(wordnet, name) for name in classes]
    missing = [name for name, synset in zip(classes, found, strict=True) if synset is None]
    wrong = ", ".join(f'"{name}" = "{given[name]}"' for name in missing if name in given)
    if wrong:
        raise UsageError(f"no nouns of WordNet: {wrong}; a synset is like boot.n.01 or n02872752")
    if missing:
        hint = f'write a file (--synsets map.toml) with a line for each, like "{missing[0]}" = "boot.n.01"'
        raise UsageError(f"WordNet has no noun {', '.join(map(repr, missing))}: {hint}")
    first: dict[str, int] = {}
    for i, synset in enumerate(found):
        j = first.setdefault(synset.name(), i)
        if j != i:
            hint = "give one of them another (--synsets map.toml)"
            raise UsageError(f"classes {classes[j]!r} and {classes[i]!r} are the same synset, {synset.name()}: {hint}")
    return tuple(found)


def _by_name(wordnet: Any, name: str) -> Any:
    """A noun by its synset's name or its id; None if there is none."""
    if re.fullmatch(r"n?\d{8}", name, re.ASCII):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is none
            return wordnet.synset_from_pos_and_offset("n", int(name[-8:]))
    lemma, _, sense = name.lower().rpartition(".n.")
    if not re.fullmatch(r"\d{1,3}", sense, re.ASCII):
        return None
    senses = _senses(wordnet, lemma)
    return senses[int(sense) - 1] if 1 <= int(sense) <= len(senses) else None


def _by_rule(wordnet: Any, name: str) -> Any:
    if re.fullmatch(r"n\d{8}", name, re.ASCII):
        return _by_name(wordnet, name)
    senses = (_senses(wordnet, part.strip().replace(" ", "_")) for part in name.split(","))
    return next((found[0] for found in senses if found), None)


def _senses(wordnet: Any, lemma: str) -> list[Any]:
    """Nouns of exactly this lemma: nltk also finds those of its singular."""
    return [s for s in wordnet.synsets(lemma, "n") if lemma.lower() in (name.lower() for name in s.lemma_names())]


def gloss(synset: Any) -> str:
    """Its words and what they mean, on one line."""
    words = ", ".join(name.replace("_", " ") for name in synset.lemma_names())
    return " ".join(f"{words}: {synset.definition()}".split())


def parents(synset: Any) -> list[Any]:
    """Its hypernyms, of an instance those that it is one of; by name."""
    return sorted(synset.hypernyms() + synset.instance_hypernyms(), key=lambda s: str(s.name()))


def depth(synset: Any) -> int:
    """Synsets on the longest way from the root, both ends counted."""
    return int(synset.max_depth()) + 1


def ancestors(synset: Any) -> dict[Any, int]:
    """All that subsume it, itself too, and the least number of steps to each."""
    steps: dict[Any, int] = {}
    latest = [synset]
    while latest:
        steps |= dict.fromkeys(latest, 1 + max(steps.values(), default=-1))
        latest = list(dict.fromkeys(p for s in latest for p in parents(s) if p not in steps))
    return steps


def similarity(wordnet: Any, synsets: tuple[Any, ...], measure: str = "wu-palmer") -> np.ndarray:
    """How alike nouns are, [C, C] float64 in [0, 1], symmetric, 1 on the diagonal; each the greatest over all common
    subsumers s, with a and b steps from the two to s by the shortest ways:

    wu-palmer: 2 d / (2 d + a + b), with d the depth of s (Wu & Palmer 1994); path: 1 / (1 + a + b); lin:
    2 IC(s) / (IC(first) + IC(second)) (Lin 1998), with the intrinsic IC of `information`.

    nltk's wup_similarity takes one subsumer alone, by its *least* depth, so that two breeds of dog meet in the canine
    (a dog is a domestic animal too, which lies higher); and a or b may lead past it and down again.

    Raises UsageError for an unknown measure.
    """
    if measure not in MEASURES:
        raise UsageError(f"unknown similarity {measure}: choose one of {', '.join(MEASURES)}")
    below: dict[Any, tuple[list[int], list[int]]] = {}
    for i, synset in enumerate(synsets):
        for subsumer, steps in ancestors(synset).items():
            indices, distances = below.setdefault(subsumer, ([], []))
            indices.append(i)
            distances.append(steps)
    content = information(wordnet) if measure == "lin" else None
    best = np.zeros((len(synsets), len(synsets)))
    for subsumer, (indices, distances) in below.items():
        apart = np.add.outer(np.array(distances, dtype=np.float64), np.array(distances, dtype=np.float64))
        if content is not None:
            own = np.array([content(synsets[i]) for i in indices])
            value = 2 * content(subsumer) / np.maximum(np.add.outer(own, own), 1e-300)
        elif measure == "path":
            value = 1 / (1 + apart)
        else:
            value = 2 * depth(subsumer) / (2 * depth(subsumer) + apart)
        at = np.ix_(indices, indices)
        best[at] = np.maximum(best[at], value)
    np.fill_diagonal(best, 1.0)
    return np.minimum(best, 1.0)


def information(wordnet: Any) -> Callable[[Any], float]:
    """The intrinsic information content of a noun (Seco et al. 2004), 0 of the root and 1 of one without hyponyms:
    1 - log(hyponyms + 1) / log(nouns), hyponyms those of all levels, each once, instances among them."""
    hyponyms, nouns = _count_hyponyms(wordnet)

    def content(synset: Any) -> float:
        return 1 - math.log(hyponyms[synset] + 1) / math.log(nouns)

    return content


@lru_cache(maxsize=1)
def _count_hyponyms(wordnet: Any) -> tuple[Counter[Any], int]:
    """Of every noun, and how many nouns there are. All are read, once: some seconds."""
    known: dict[Any, frozenset[Any]] = {}
    hyponyms: Counter[Any] = Counter()
    for noun in wordnet.all_synsets("n"):
        hyponyms.update(_above(noun, known))
    return hyponyms, len(known)


def _above(synset: Any, known: dict[Any, frozenset[Any]]) -> frozenset[Any]:
    if synset not in known:
        known[synset] = frozenset().union(*(_above(p, known) | {p} for p in parents(synset)))
    return known[synset]
