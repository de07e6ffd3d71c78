import pytest

from thresher.errors import StorageError, UsageError
from thresher.evaluation.journal import Journal, ResultKey

SETTINGS = {"haystack": "a1", "weights": "bf16"}
KEYS = [ResultKey("vt", 4096, i, 0, "dense", "f") for i in range(3)]


@pytest.fixture
def path(tmp_path):
    with Journal(tmp_path / "j", SETTINGS) as journal:
        for i, key in enumerate(KEYS):
            journal.put(key, {"score": i, "answer": "日\n"})
    return tmp_path / "j"


def test_results_are_there_again(path):
    with Journal(path, SETTINGS) as journal:
        assert [journal.get(key)["score"] for key in KEYS] == [0, 1, 2]
        assert journal.get(KEYS[0])["answer"] == "日\n"
        for other in (
            ResultKey("cwe", 4096, 0, 0, "dense", "f"),
            ResultKey("vt", 4096, 0, 1, "dense", "f"),
            ResultKey("vt", 4096, 0, 0, "streaming:sinks=1,window=2", "f"),
            ResultKey("vt", 4096, 0, 0, "dense", "g"),
        ):
            assert journal.get(other) is None


def test_cut_anywhere_it_goes_on(path):
    """Whatever byte a kill leaves as the last, whole results are kept and new ones follow."""
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with Journal(path, SETTINGS) as journal:
            kept = sum(end <= cut for end in ends[1:])
            assert [journal.get(key) is not None for key in KEYS] == [i < kept for i in range(3)]
            for i, key in enumerate(KEYS[kept:], kept):
                journal.put(key, {"score": i, "answer": "日\n"})
        assert path.read_bytes() == whole


def test_other_settings_are_refused(path):
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"other settings \(weights 'bf16' and now 'int8'\)"):
        Journal(path, SETTINGS | {"weights": "int8"})
    assert path.read_bytes() == before


def test_other_files_are_refused_and_left_alone(tmp_path):
    for content in (b"a book\n", b"a book", b'{"a": 1}\n', b"[1]\n"):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UsageError):
            Journal(tmp_path / "x", SETTINGS)
        assert (tmp_path / "x").read_bytes() == content
    with pytest.raises(StorageError, match="cannot be written"):
        Journal(tmp_path / "no" / "x", SETTINGS)


def test_a_damaged_line_is_named(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{}\n" + lines[2])
    with pytest.raises(UsageError, match="line 2"):
        Journal(path, SETTINGS)


def test_one_writer_at_a_time(path):
    with Journal(path, SETTINGS), pytest.raises(StorageError, match="another run"):
        Journal(path, SETTINGS)
    with Journal(path, SETTINGS):
        pass


def test_in_memory():
    journal = Journal(None, {})
    journal.put(KEYS[0], {"score": 1})
    assert journal.get(KEYS[0]) == {"score": 1}
    journal.close()
