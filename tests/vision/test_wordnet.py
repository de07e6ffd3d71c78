"""Nouns of WordNet: found by stated rules, and as alike as nltk says where nltk does what it says."""

import itertools
import random
import re

import numpy as np
import pytest

from thresher.errors import StorageError, UsageError
from thresher.vision.data import FASHION_CLASSES
from thresher.vision.wordnet import (
    BUILT_IN,
    MEASURES,
    WORDNET,
    ancestors,
    depth,
    find_synsets,
    gloss,
    information,
    open_wordnet,
    read_synsets,
    similarity,
)

ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
needs_wordnet = pytest.mark.skipif(not (WORDNET / "data.noun").is_file(), reason="Debian's wordnet-base is not there")


@pytest.fixture(scope="module")
def wordnet():
    if not (WORDNET / "data.noun").is_file():
        pytest.skip("Debian's wordnet-base is not there")
    return open_wordnet()


@pytest.fixture(scope="module")
def pairs(wordnet):
    """50 of any nouns whatever, then 50 whose nouns lie near each other, as classes do."""
    drawn = random.Random(0)
    words = sorted(w for w in itertools.islice(wordnet.all_lemma_names("n"), 0, None, 40) if w.isalpha())
    nouns = [wordnet.synsets(w, "n")[0] for w in drawn.sample(words, 100)]
    shoes = sorted(wordnet.synset("footwear.n.02").closure(lambda s: s.hyponyms()))
    animals = sorted(wordnet.synset("carnivore.n.01").closure(lambda s: s.hyponyms()))
    near = [tuple(drawn.sample(kind, 2)) for kind in (shoes, animals) for _ in range(25)]
    return list(zip(nouns[::2], nouns[1::2], strict=True)), near


def names(synsets):
    return [s.name() for s in synsets]


def test_it_is_wordnet_3_0_without_a_search_of_nltks(wordnet):
    assert wordnet.get_version() == "3.0"
    assert wordnet.synset("dog.n.01").lexname() == "noun.animal"
    assert wordnet.synset("run.v.01").lexname() == "verb.motion"
    assert wordnet.synset("lunar.a.01").lexname() == "adj.pert"


def test_fashion_and_animals(wordnet):
    found = find_synsets(wordnet, FASHION_CLASSES + ANIMALS)
    assert names(found)[:10] == [BUILT_IN[name] for name in FASHION_CLASSES] == list(BUILT_IN.values())
    assert names(found)[10:] == [f"{name}.n.01" for name in ANIMALS]
    assert {s.lexname() for s in found[:10]} == {"noun.artifact"}
    assert {s.lexname() for s in found[10:]} == {"noun.animal"}
    assert "T-shirt" in found[0].lemma_names()
    assert "handbag" in found[8].lemma_names()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n04355338", "sundial.n.01"),
        ("tench, Tinca tinca", "tench.n.01"),
        ("no such fish, Tinca tinca", "tench.n.01"),
        ("Tibetan Mastiff", "tibetan_mastiff.n.01"),
        ("bag", "bag.n.01"),  # not "Bag"
        ("pants", "bloomers.n.01"),  # exactly this lemma, not pant's
    ],
)
def test_names_by_rule(wordnet, name, expected):
    assert names(find_synsets(wordnet, (name,))) == [expected]


@pytest.mark.parametrize("chosen", ["boot.n.01", "n02872752", "02872752", "BOOT.n.01", "boot.n.1"])
def test_what_is_chosen_wins(wordnet, chosen):
    assert names(find_synsets(wordnet, ("Bag", "n02084071"), {"Bag": chosen})) == ["boot.n.01", "dog.n.01"]
    assert names(find_synsets(wordnet, ("n02084071",), {"n02084071": chosen})) == ["boot.n.01"]


def test_all_that_are_unknown_are_named_at_once(wordnet):
    with pytest.raises(UsageError) as caught:
        find_synsets(wordnet, ("dog", "xyzzy", "dogs", "n00000001", "", "quickly"))
    message = str(caught.value)
    assert all(repr(name) in message for name in ("xyzzy", "dogs", "n00000001", "", "quickly"))
    assert "'dog'" not in message
    assert '"xyzzy" = "boot.n.01"' in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "chosen", ["run.v.01", "dog.n.00", "dog.n.99", "dog.n.-1", "dog", "n99999999", "n2872752", "", "nosuch.n.01"]
)
def test_chosen_that_are_no_nouns(wordnet, chosen):
    with pytest.raises(UsageError, match=re.escape(f'"Bag" = "{chosen}"')):
        find_synsets(wordnet, ("Bag",), {"Bag": chosen})


def test_two_of_the_same_and_choices_for_no_class(wordnet):
    with pytest.raises(UsageError, match=r"'car' and 'auto' are the same synset, car\.n\.01"):
        find_synsets(wordnet, ("dog", "car", "auto"))
    with pytest.raises(UsageError, match="same synset"):
        find_synsets(wordnet, ("dog", "dog"))
    with pytest.raises(UsageError, match="no class: 'ankle boot'"):
        find_synsets(wordnet, ("Ankle boot",), {"ankle boot": "boot.n.01"})


def test_files_of_synsets(tmp_path):
    path = tmp_path / "map.toml"
    path.write_text('"Ankle boot" = "boot.n.01"\nBag = "bag.n.04"\n')
    assert read_synsets(path) == {"Ankle boot": "boot.n.01", "Bag": "bag.n.04"}
    path.write_text("")
    assert read_synsets(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Bag = 4", "'Bag' is given no synset"),
        (b'[Bag]\nx = "y"', "'Bag' is given no synset"),
        (b"Ankle boot = x", "not TOML"),
        (b'Bag = "\xff"', "not TOML"),
        (b"a = " + b"[" * 5000, "not TOML"),
        (b"#" * (1 << 20) + b"##", "MiB"),
    ],
)
def test_files_of_synsets_that_are_not(tmp_path, content, message):
    path = tmp_path / "map.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_synsets(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(StorageError, match="cannot be read"):
        read_synsets(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="apt install wordnet-base"):
        open_wordnet(tmp_path)


@needs_wordnet
def test_a_damaged_wordnet(tmp_path):
    for name in ("data.noun", "data.adj", "index.adj", "index.adv", "index.noun", "index.verb"):
        (tmp_path / name).write_text("dog n 1 x\n")
    with pytest.raises(UsageError, match="cannot be read"):
        open_wordnet(tmp_path)


@pytest.mark.parametrize("measure", MEASURES)
def test_similarities_are_in_order(wordnet, pairs, measure):
    synsets = tuple(dict.fromkeys(s for pair in itertools.chain(*pairs) for s in pair))
    alike = similarity(wordnet, synsets, measure)
    assert alike.dtype == np.float64
    assert (alike == alike.T).all()
    assert (np.diag(alike) == 1).all()
    assert (alike >= 0).all()
    assert (alike[~np.eye(len(synsets), dtype=bool)] < 1).all()


def test_dogs_and_cats(wordnet):
    found = find_synsets(wordnet, ("dog", "cat"))
    assert similarity(wordnet, found)[0, 1] == pytest.approx(6 / 7)
    assert similarity(wordnet, found, "path")[0, 1] == pytest.approx(1 / 5)
    with pytest.raises(UsageError, match="choose one of wu-palmer, path, lin"):
        similarity(wordnet, found, "resnik")


def by_hand(a, b):
    """Over all pairs of paths from the root, from nltk's list of them."""
    best = 0.0
    for p, q in itertools.product(a.hypernym_paths(), b.hypernym_paths()):
        for s in set(p) & set(q):
            d = max(len(path) for path in s.hypernym_paths())
            best = max(best, 2 * d / (2 * d + len(p) - 1 - p.index(s) + len(q) - 1 - q.index(s)))
    return best


def test_wu_palmer_is_nltks_but_for_its_quirks(wordnet, pairs):
    """nltk takes one subsumer, that of the greatest *least* depth (of two breeds of dog the canine: a dog is a domestic
    animal too, which lies higher), where another may bring the two nearer; and the steps to it by the shortest way
    between them, which may lead past it and down to it again."""
    same = 0
    for a, b in itertools.chain(*pairs):
        ours, theirs = similarity(wordnet, (a, b))[0, 1], a.wup_similarity(b)
        assert ours == pytest.approx(by_hand(a, b), abs=1e-12)
        if abs(ours - theirs) < 1e-12:
            same += 1
            continue
        (subsumer, *_) = a.lowest_common_hypernyms(b, use_min_depth=True)
        up = [ancestors(s)[subsumer] for s in (a, b)]
        down = [s.shortest_path_distance(subsumer) for s in (a, b)]
        d = depth(subsumer)
        assert theirs == pytest.approx(2 * d / (2 * d + sum(down)))
        assert ours > theirs or down != up
        assert ours >= 2 * d / (2 * d + sum(up)) - 1e-12
    assert same >= 80
    pugs = tuple(wordnet.synset(name) for name in ("pug.n.01", "american_water_spaniel.n.01"))
    assert similarity(wordnet, pugs)[0, 1] == pytest.approx(28 / 34)  # dog
    assert pugs[0].wup_similarity(pugs[1]) == pytest.approx(26 / 34)  # canine


def test_path_is_nltks(wordnet, pairs):
    for a, b in itertools.chain(*pairs):
        assert similarity(wordnet, (a, b), "path")[0, 1] == pytest.approx(a.path_similarity(b))


def test_lin_is_nltks_with_the_same_information(wordnet, pairs):
    content = information(wordnet)
    table = {"n": {0: 1.0}}  # nltk holds counts, IC = -log(count / all): counts that give ours
    for a, b in itertools.chain(*pairs):
        for s in (*ancestors(a), *ancestors(b)):
            table["n"][s.offset()] = np.exp(-content(s))
    for a, b in itertools.chain(*pairs):
        assert similarity(wordnet, (a, b), "lin")[0, 1] == pytest.approx(a.lin_similarity(b, table), abs=1e-9)


def test_information_is_of_the_hyponyms(wordnet):
    content = information(wordnet)
    assert content(wordnet.synset("entity.n.01")) == pytest.approx(0, abs=1e-12)
    assert content(wordnet.synset("okapi.n.01")) == 1
    for name in ("dog.n.01", "shoe.n.01", "river.n.01"):
        synset = wordnet.synset(name)
        below = set(synset.closure(lambda s: s.hyponyms() + s.instance_hyponyms()))
        assert content(synset) == pytest.approx(1 - np.log(len(below) + 1) / np.log(82115))


def test_glosses_are_one_line(wordnet):
    assert gloss(wordnet.synset("gym_shoe.n.01")) == (
        "gym shoe, sneaker, tennis shoe: a canvas shoe with a pliable rubber sole"
    )
