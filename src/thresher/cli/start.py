"""One call of the command line. However it ends, it says so in one line and by its exit code."""

import sys
import traceback
from collections.abc import Sequence

import typer
from rich.text import Text

from thresher.cli.streams import ReaderGoneError, release_stdout
from thresher.cli.terminal import one_line, stderr
from thresher.errors import CapacityError, StorageError, ThresherError, UsageError

INTERRUPTED = 130  # as shells have it: 128 and the signal's number
READER_GONE = 141
UNEXPECTED = 70

# click's own; typer brings click along under a name that changes.
_CommandError = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run a command and return its exit code.

    Not by `app()`: that ends the process in its own way on Ctrl-C, on a pipe without a reader and on wrong options.
    """
    command = typer.main.get_command(app)
    code = 0
    try:
        try:
            with command.make_context("thresher", list(arguments)) as context:
                command.invoke(context)
        except typer.Exit as end:
            code = end.exit_code
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        release_stdout()
        if "--debug" in arguments:
            traceback.print_exception(error)
        code = _explain(error)
    return code


def _explain(error: BaseException) -> int:
    """One line on stderr, and the exit code."""
    if isinstance(error, ReaderGoneError):
        return READER_GONE
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        stderr.print("interrupted")
        return INTERRUPTED
    code, text = UNEXPECTED, ""
    if isinstance(error, _CommandError):
        context = getattr(error, "ctx", None)
        known = f"; see {context.command_path} --help" if context else ""
        said = error.format_message()  # type: ignore[attr-defined]
        if not said:  # no command was given, and the help has been shown
            return UsageError.exit_code
        code, text = UsageError.exit_code, f"{said.rstrip('.')}{known}"
    elif isinstance(error, ThresherError):
        code, text = error.exit_code, str(error)
    elif isinstance(error, MemoryError):
        code, text = CapacityError.exit_code, "not enough memory"
    elif isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        code, text = StorageError.exit_code, named + error.strerror
    else:
        said = str(error).strip().partition("\n")[0]
        text = (
            f"unexpected {type(error).__name__}: {said}; this is a fault of Thresher, --debug shows where it came from"
        )
    stderr.print(Text.assemble(("error: ", "bold red"), one_line(text)), soft_wrap=True)
    return code
