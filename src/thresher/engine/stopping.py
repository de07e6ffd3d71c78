"""Text as it comes: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> Any: ...


class TextStream:
    """Decodes a sequence token by token. `text` is all that was given out; `matched` the stop string that ended it.

    Special tokens are not given out, but stop strings see them by their text. The work is proportional to the number of
    tokens: each step decodes only the tokens since the last one that decoded cleanly, in the context of the piece
    before (tokenizers drop or add a leading space without it).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        context: Sequence[int] = (),
        include_stop: bool = False,
    ) -> None:
        """context: the last tokens before the first one, for their effect on it. include_stop: give out the stop
        string, too."""
        self.text = ""
        self.matched: str | None = None
        self._tokenizer = tokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._special = _special_texts(tokenizer) if stop else {}
        self._ids: list[int] = list(context)
        if self._decode(0, len(self._ids)).endswith("\ufffd"):  # it ends inside of a character
            self._ids = []
        self._before = 0  # tokens [before, given) are decoded again as context of those after
        self._given = len(self._ids)
        self._held: list[tuple[str, bool]] = []  # pieces that may begin a stop string, and whether they are given out

    @property
    def stopped(self) -> bool:
        return self.matched is not None

    def push(self, token_id: int) -> str:
        """The text that is certain now."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        pieces = []
        context = self._decode(self._before, self._given)
        text = self._decode(self._before, len(self._ids))
        if not text.endswith("\ufffd") and len(text) > len(context):
            self._before, self._given = self._given, len(self._ids)
            pieces.append((text[len(context) :], True))
        if token_id in self._special:
            pieces.append((self._special[token_id], False))
        return self._emit(pieces, last=False)

    def finish(self) -> str:
        """What was held back; no more tokens come. A stop string may still be found in it."""
        if self.stopped:
            return ""
        rest = self._decode(self._before, len(self._ids))[len(self._decode(self._before, self._given)) :]
        self._before = self._given = len(self._ids)
        return self._emit([(rest, True)], last=True)

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True)) if end > begin else ""

    def _emit(self, pieces: list[tuple[str, bool]], last: bool) -> str:
        self._held += [piece for piece in pieces if piece[0]]
        text = "".join(piece for piece, _ in self._held)
        found = [(at, -len(s), s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            at, _, self.matched = min(found)
            certain = self._take(at + (len(self.matched) if self._include_stop else 0))
            self._held = []
        else:
            hold = 0 if last else max((_overlap(text, s) for s in self._stop), default=0)
            certain = self._take(len(text) - hold)
        self.text += certain
        return certain

    def _take(self, count: int) -> str:
        """The first `count` characters that are held, less special tokens."""
        taken, kept = "", []
        for piece, given_out in self._held:
            taken += piece[:count] if given_out else ""
            if piece[count:]:
                kept.append((piece[count:], given_out))
            count = max(0, count - len(piece))
        self._held = kept
        return taken


def _special_texts(tokenizer: Any) -> dict[int, str]:
    """Special tokens that decoding leaves out, by id."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {i: token.content for i, token in added.items() if token.special}


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
