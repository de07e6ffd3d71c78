"""Text as it comes: whole characters only, and nothing that may turn out to be a stop string."""

from typing import Any, Protocol


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> Any: ...


class TextStream:
    """Decodes a sequence token by token. `text` is all that was given out; `stopped` says that a stop string came.

    The work is proportional to the number of tokens: each step decodes only the tokens since the last one that decoded
    cleanly, in the context of the piece before (tokenizers drop or add a leading space without it).
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._before = 0  # tokens [before, given) are decoded again as context of those after
        self._given = 0
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def push(self, token_id: int) -> str:
        """The text that is certain now."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        context = self._decode(self._before, self._given)
        text = self._decode(self._before, len(self._ids))
        if text.endswith("\ufffd") or len(text) <= len(context):
            return ""
        self._before, self._given = self._given, len(self._ids)
        return self._emit(text[len(context) :], last=False)

    def finish(self) -> str:
        """What was held back; no more tokens come."""
        if self.stopped:
            return ""
        rest = self._decode(self._before, len(self._ids))[len(self._decode(self._before, self._given)) :]
        self._before = self._given = len(self._ids)
        return self._emit(rest, last=True)

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True))

    def _emit(self, text: str, last: bool) -> str:
        text = self._held + text
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = text[: min(found)], ""
        else:
            hold = 0 if last else max((_overlap(text, s) for s in self._stop), default=0)
            certain, self._held = text[: len(text) - hold], text[len(text) - hold :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
