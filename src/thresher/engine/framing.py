"""How text becomes a prompt: as it is, or wrapped by the model's chat template; a document and its questions apart."""

from functools import lru_cache
from typing import Any

from thresher.errors import ModelError, UsageError

FRAMINGS = ("chat", "plain")

_DOCUMENT = "\u27e6document\u27e7"
_QUESTION = "\u27e6question\u27e7"


def default_framing(tokenizer: Any) -> str:
    return "chat" if tokenizer.chat_template else "plain"


def prompt_tokens(tokenizer: Any, text: str, framing: str) -> list[int]:
    """Token ids of a whole prompt: a user message (chat), or the text itself (plain)."""
    if not text:
        raise UsageError("the prompt is empty; give it some text")
    if framing == "plain":
        return _encode(tokenizer, text, special=True)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return _encode(tokenizer, rendered)


def document_tokens(tokenizer: Any, text: str, framing: str) -> list[int]:
    """Token ids of a document, up to where a question will follow."""
    if not text.strip():
        raise UsageError("the document is empty; give a text with at least one word")
    if framing == "plain":
        return _encode(tokenizer, text, special=True)
    return _encode(tokenizer, _parts(tokenizer)[0] + text)


def question_tokens(tokenizer: Any, question: str, framing: str) -> list[int]:
    """Token ids that follow a document of the same framing: the question, and the turn to answer."""
    if not question.strip():
        raise UsageError("the question is empty; ask something")
    if framing == "plain":
        return _encode(tokenizer, question)
    _, between, after = _parts(tokenizer)
    return _encode(tokenizer, between + question + after)


@lru_cache(maxsize=8)
def _parts(tokenizer: Any) -> tuple[str, str, str]:
    """The chat template around a document and a question, cut at both."""
    if not tokenizer.chat_template:
        raise ModelError("this model has no chat template; use the plain framing")
    content = f"{_DOCUMENT}\n\n{_QUESTION}"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, found, rest = rendered.partition(_DOCUMENT)
    between, found_too, after = rest.partition(_QUESTION)
    if not found or not found_too:
        raise ModelError("the model's chat template does not keep the user's text as it is; use the plain framing")
    return before, between, after


def _encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=special, verbose=False)
    return ids
