"""Every error a user can meet. The message is one line: what was wrong and what to do about it."""


class ThresherError(Exception):
    """Base of all expected errors. `exit_code` is what the command line exits with."""

    exit_code = 1


class UsageError(ThresherError):
    """What was asked for makes no sense: an empty prompt, a negative temperature, an unknown method."""

    exit_code = 2


class ModelError(ThresherError):
    """A model that cannot be found, read or converted."""

    exit_code = 3


class UnsupportedModelError(ModelError):
    """A model that asks of attention what Thresher does not compute. The message names it."""


class KVFileError(ThresherError):
    """A KV-cache file that cannot be used."""

    exit_code = 4


class NotAKVFileError(KVFileError):
    """The file is something else, or was cut before its header ended."""


class KVFileVersionError(KVFileError):
    """The file was written in a format this version does not read."""


class KVFileDamagedError(KVFileError):
    """The file was cut or altered: a size or a checksum does not match."""


class KVFileMismatchError(KVFileError):
    """The file belongs to another model, tokenizer or number format."""


class KVFileBusyError(KVFileError):
    """Another process is writing the same file."""


class CapacityError(ThresherError):
    """More tokens or memory than the model, the machine or the given budget has."""

    exit_code = 5


class StorageError(ThresherError):
    """The disk is full, or a folder cannot be written."""

    exit_code = 6


class TraceError(UsageError):
    """A file of traces that is not what it says. The message names the file and the line."""
