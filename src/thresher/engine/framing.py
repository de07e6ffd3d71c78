"""How text becomes a prompt: as it is, or wrapped by the model's chat template; a document and its questions apart.

What people wrote never becomes a control token. Text is encoded together with the template, as the model knows it; only
where that would give other control tokens than the template has, the parts are encoded apart.
"""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from thresher.errors import ModelError, UsageError

FRAMINGS = ("chat", "plain")

_DOCUMENT = "\u27e6document\u27e7"
_QUESTION = "\u27e6question\u27e7"

_encoding = threading.Lock()  # transformers keeps `split_special_tokens` in the tokenizer while it encodes

Parts = list[tuple[str, bool]]  # text, and whether it is the template's


def default_framing(tokenizer: Any) -> str:
    return "chat" if tokenizer.chat_template else "plain"


def prompt_tokens(tokenizer: Any, text: str, framing: str) -> list[int]:
    """Token ids of a whole prompt: a user message (chat), or the text itself (plain)."""
    if not text:
        raise UsageError("the prompt is empty; give it some text")
    if framing == "plain":
        return _encode(tokenizer, _checked(text), first=True, written=True)
    return conversation_tokens(tokenizer, [{"role": "user", "content": text}])


def conversation_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, `[{"role": ..., "content": ...}, ...]`, up to where the model answers."""
    if not messages:
        raise UsageError("the conversation is empty; give at least one message")
    for message in messages:
        known = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        if not known or not all(isinstance(message[key], str) for key in ("role", "content")):
            raise UsageError(f"a message is a role and a content, both texts, not {message!r:.80}")
        _checked(message["content"])
    if not any(message["content"].strip() for message in messages):
        raise UsageError("the conversation is empty; give at least one message with text")
    marks = [f"\u27e6message {i}\u27e7" for i in range(len(messages))]
    rendered = _render(tokenizer, messages)
    marked = _render(tokenizer, [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
    ids = _encode(tokenizer, rendered)
    if _controls(tokenizer, ids) == _controls(tokenizer, _encode(tokenizer, marked)):
        return ids
    parts: Parts = []
    for message, mark in zip(messages, marks, strict=True):
        before, found, marked = marked.partition(mark)
        if not found or mark in marked:
            raise ModelError("a message holds a control token, and the model's chat template does not keep texts apart")
        parts += [(before, True), (message["content"], False)]
    return _encode_apart(tokenizer, [*parts, (marked, True)])


def document_tokens(tokenizer: Any, text: str, framing: str) -> list[int]:
    """Token ids of a document, up to where a question will follow."""
    text = _checked(text).removeprefix("\ufeff")
    if not text.strip():
        raise UsageError("the document is empty; give a text with at least one word")
    if framing == "plain":
        return _encode(tokenizer, text, first=True, written=True)
    return _joined(tokenizer, [(_parts(tokenizer)[0], True), (text, False)])


def question_tokens(tokenizer: Any, question: str, framing: str) -> list[int]:
    """Token ids that follow a document of the same framing: the question, and the turn to answer."""
    if not _checked(question).strip():
        raise UsageError("the question is empty; ask something")
    if framing == "plain":
        return _continued(tokenizer, question, written=True)
    _, between, after = _parts(tokenizer)
    return _joined(tokenizer, [(between, True), (question, False), (after, True)], go_on=True)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is not valid Unicode (character {error.start}); give UTF-8") from None
    return text


@lru_cache(maxsize=8)
def _parts(tokenizer: Any) -> tuple[str, str, str]:
    """The chat template around a document and a question, cut at both."""
    if not tokenizer.chat_template:
        raise ModelError("this model has no chat template; use the plain framing")
    rendered = _render(tokenizer, [{"role": "user", "content": f"{_DOCUMENT}\n\n{_QUESTION}"}])
    before, found, rest = rendered.partition(_DOCUMENT)
    between, found_too, after = rest.partition(_QUESTION)
    if not found or not found_too or _DOCUMENT in rest or _QUESTION in after:
        raise ModelError("the model's chat template does not keep the user's text as it is; use the plain framing")
    return before, between, after


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    if not tokenizer.chat_template:
        raise ModelError("this model has no chat template; use the plain framing")
    try:
        rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and its errors are of any kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"the model's chat template fails: {reason}; use the plain framing") from error
    return str(rendered)


def _joined(tokenizer: Any, parts: Parts, go_on: bool = False) -> list[int]:
    """Template and text encoded together, if that makes no control token of the text, else apart. go_on: what is
    encoded follows other text."""
    text = "".join(part for part, _ in parts)
    ids = _continued(tokenizer, text) if go_on else _encode(tokenizer, text)
    expected: Counter[int] = Counter()
    for part, is_template in parts:
        if is_template:
            expected += _controls(tokenizer, _encode(tokenizer, part))
    return ids if _controls(tokenizer, ids) == expected else _encode_apart(tokenizer, parts, go_on)


def _encode_apart(tokenizer: Any, parts: Parts, go_on: bool = False) -> list[int]:
    ids: list[int] = []
    for text, is_template in parts:
        if text:
            follows = go_on or bool(ids)
            ids += (_continued if follows else _encode)(tokenizer, text, written=not is_template)
    return ids


def _continued(tokenizer: Any, text: str, written: bool = False) -> list[int]:
    """Token ids of text that follows other text: without the space that SentencePiece puts before a beginning."""
    for anchor in ("\u241e", ".", "0"):
        alone = _encode(tokenizer, anchor, written=written)
        together = _encode(tokenizer, anchor + text, written=written)
        if together[: len(alone)] == alone and _begins_with_space(tokenizer, alone):
            return together[len(alone) :]
    return _encode(tokenizer, text, written=written)


def _begins_with_space(tokenizer: Any, ids: list[int]) -> bool:
    return bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("\u2581")


def _controls(tokenizer: Any, ids: list[int]) -> Counter[int]:
    special = _special_ids(tokenizer)
    return Counter(i for i in ids if i in special)


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _encode(tokenizer: Any, text: str, first: bool = False, written: bool = False) -> list[int]:
    """first: with what the tokenizer puts before a text. written: by people, so that control tokens are mere text."""
    with _encoding:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=first, split_special_tokens=written, verbose=False)
    return ids
