"""Text to train on: files, cut into training and validation, and tokenizers that are made from nothing or given."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from thresher.errors import ModelError, UsageError

VALIDATION = 0.1  # of each file, its end
PLAIN = ("bytes", "chars")  # tokenizers that need no file
END, UNKNOWN = "<end>", "<unknown>"
_MOST_BYTES = 1 << 31
_PIECE = 1 << 20  # characters that are tokenized together


@dataclass(frozen=True)
class Corpus:
    """Token ids int32 of the training text and of the validation text, in which no part of the other is."""

    training: torch.Tensor
    validation: torch.Tensor


def text_files(path: Path) -> list[Path]:
    """The file, or all .txt files below a folder, by name. Raises UsageError if there are none."""
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.txt")) if path.is_dir() else []
    if not found:
        raise UsageError(f"{path}: give a text file, or a folder with .txt files")
    return found


def read_texts(path: Path) -> list[str]:
    """Each file's text. Raises UsageError if one is not UTF-8 text, or all are more than memory should hold."""
    files = text_files(path)
    if sum(file.stat().st_size for file in files) > _MOST_BYTES:
        raise UsageError(f"{path}: more than {_MOST_BYTES >> 30} GiB of text; give a part of it")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise UsageError(f"{file} is not UTF-8 text") from None
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}") from error
    return texts


def make_tokenizer(name: str, texts: list[str]) -> Any:
    """`bytes` (every byte a token), `chars` (every character of the texts), or a folder or hub id with a tokenizer.

    Raises ModelError if there is none.
    """
    if name == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={END: 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    if name == "chars":
        characters = sorted(set().union(*map(set, texts)))
        vocab = {END: 0, UNKNOWN: 1} | {c: i + 2 for i, c in enumerate(characters)}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise ModelError(f"--tokenizer {name}: neither bytes, chars nor a tokenizer to load: {reason}") from error


def token_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """int32 ids, without tokens of the tokenizer's own; a text is cut at line ends where it is long."""
    parts = [
        tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for piece in _pieces(text)
    ]
    return torch.from_numpy(np.concatenate([np.asarray(p, dtype=np.int32) for p in parts] or [np.empty(0, np.int32)]))


def _pieces(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        end = text.find("\n", at + _PIECE) + 1 or len(text)
        yield text[at:end]
        at = end


def corpus(texts: list[str], tokenizer: Any, block: int) -> Corpus:
    """The last tenth of each text is for validation; texts end with the tokenizer's end token.

    Raises UsageError if either part is shorter than a block of `block` tokens and one more.
    """
    training: list[torch.Tensor] = []
    validation: list[torch.Tensor] = []
    end = torch.tensor([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=torch.int32)
    for text in texts:
        cut = text.rfind("\n", 0, int(len(text) * (1 - VALIDATION))) + 1 or int(len(text) * (1 - VALIDATION))
        for part, into in ((text[:cut], training), (text[cut:], validation)):
            into.append(torch.cat([token_ids(tokenizer, part), end]))
    found = Corpus(torch.cat(training), torch.cat(validation))
    for name, ids in (("training", found.training), ("validation", found.validation)):
        if len(ids) <= block:
            raise UsageError(
                f"{len(ids)} tokens of {name} text for blocks of {block}: give more text or a lower --block"
            )
    return found
