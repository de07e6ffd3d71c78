"""Files that are there whole or not at all."""

import pytest

from thresher.files import replaced, replaced_text


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")

    def write(part):
        assert part.suffix == ".png"
        part.write_text("new")
        assert path.read_text() == "old"
        return 7

    assert replaced(path, write) == 7
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_what_fails_leaves_what_was_there(error, tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def write(part):
        part.write_text("ha")
        raise error

    with pytest.raises(error):
        replaced(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_it_is(tmp_path):
    replaced_text(tmp_path / "a", "é\r\n\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\r\n\n"


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "a"

    def outer(part):
        part.write_text("outer")
        replaced_text(path, "inner")
        assert part.read_text() == "outer"

    replaced(path, outer)
    assert path.read_text() == "outer"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        replaced_text(tmp_path / "none" / "a", "x")
