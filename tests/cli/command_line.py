"""Two ways to call the command line: within this process, or, where the process itself matters, in one of its own."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest.mock import patch

from thresher.cli import app, start

COMMAND = (sys.executable, "-c", "from thresher.cli import main; main()")


def run(*arguments, **kwargs):
    """In a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, **kwargs
    )


def call(*arguments, stdin=b""):
    """The same within this process: returncode, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin))):
        code = start.run(app, [str(a) for a in arguments])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def fails(code, words, *arguments, stdin=b""):
    """One line that names what was wrong, and the exit code of its kind."""
    done = call(*arguments, stdin=stdin)
    assert done.returncode == code, done.stderr
    assert_one_error(done.stderr, words)
    assert done.stdout == ""
    return done


def assert_one_error(stderr, words):
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert words in errors[0]
    assert "Traceback" not in stderr
