"""The tokenizer of a GGUF file, cutting text as the program the file was made for does."""

from collections.abc import Callable
from typing import Any

from thresher.errors import ModelError, UnsupportedModelError
from thresher.models.gguf_config import refuse
from thresher.models.gguf_header import Counted, Header

# Text is cut by each pattern in turn; what lies between matches is a piece too.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{LINES}"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(end: str, digits: str) -> str:
    word = r"[^\r\n\p{L}\p{N}]?"
    words = f"{word}[{UPPER}]*[{LOWER}]+{end}|{word}[{UPPER}]+[{LOWER}]*{end}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES}"


LLAMA3 = (rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{REST}",)
QWEN2 = (rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{REST}",)
DIGITS = (r"\p{N}", GPT2)
GPT4O = (_cased(CONTRACTIONS + "?", r"\p{N}{1,3}"),)
CJK = "[\u4e00-\u9fa5\u3040-\u30ff]+"  # Chinese and Japanese
CJK_WIDE = "[\u0800-\u9fa5\uac00-\ud7ff]+"
CASED_LETTERS = "(?:(?![\U0001d400-\U0001d7ff])[\\p{Lu}\\p{Ll}\\p{Lt}])"  # but not those of mathematics
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    CJK,
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES}",
)
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "exaone4"), (GPT2,)),
    **dict.fromkeys(("trillion", "granite-docling"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), LLAMA3),
    **dict.fromkeys(("lfm2", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan"), QWEN2),
    **dict.fromkeys(("solar-open", "grok-2"), QWEN2),
    "qwen35": (
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{LINES}",
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), GPT4O),
    "tekken": (_cased("", r"\p{N}"),),
    "seed-coder": (rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LINES}",),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), DEEPSEEK_V3),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?{CASED_LETTERS}+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        CJK_WIDE,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK_WIDE, r"\p{N}"),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), (BLOOM,)),
    "viking": (BLOOM, r"\p{N}"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# A word that is a token is taken whole, before its merges are looked for.
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type

NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
END_TOKENS = ("eos", "eot", "eom")
READ = {"model", "pre", "tokens", "scores", "token_type", "merges"} | {
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
    *(f"{name}_token_id" for name in (*NAMED_TOKENS.values(), *END_TOKENS)),
}
# Tokens that only stand in a text if somebody puts them there, and what only other kinds of tokenizers read.
HARMLESS = {
    *(f"{name}_token_id" for name in ("seperator", "separator", "cls", "mask", "prefix", "suffix", "middle")),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    "precompiled_charsmap",
    "token_type_count",
}
NEUTRAL = {"add_sep_token": False, "remove_extra_whitespaces": False}


def check_tokenizer_keys(header: Header) -> None:
    """Refuse keys of the tokenizer that nothing reads, and lists that do not fit each other."""
    unread = []
    for key, value in header.values.items():
        name = key.removeprefix("tokenizer.ggml.")
        # Of several chat templates the one without a name is used; the JSON says the same once more.
        said = key == "tokenizer.huggingface.json" or key.startswith("tokenizer.chat_template")
        if key.startswith("tokenizer.") and not said:
            known = name != key and (name in READ or name in HARMLESS or NEUTRAL.get(name) is value)
            unread += [] if known else [key]
    refuse(unread)
    listed = {
        name: header.values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type", "merges")
    }
    count = _length(listed["tokens"])
    rows = next((tensor.dims[-1] for tensor in header.tensors if tensor.name == "token_embd.weight"), 0)
    if not 1 <= count <= rows:
        raise ModelError(f"tokenizer.ggml.tokens is no list of 1 to {rows} texts, as token_embd.weight has rows")
    for name in ("scores", "token_type"):
        if listed[name] is not None and _length(listed[name]) != count:
            raise ModelError(f"tokenizer.ggml.{name} is no list of {count} numbers")
    for name in (*NAMED_TOKENS.values(), *END_TOKENS):
        number = header.values.get(f"tokenizer.ggml.{name}_token_id", 0)
        if type(number) is not int or not 0 <= number < count:
            raise ModelError(f"tokenizer.ggml.{name}_token_id is {number!r:.40}, not one of {count} tokens")


def gguf_tokenizer(header: Header, warn: Callable[[str], None]) -> Any:
    """The tokenizer described by the file's keys, as transformers' generic fast one.

    Raises UnsupportedModelError for a kind of tokenizer, or a way of cutting text, that is not known.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.reader import read_gguf_metadata

    kind, cut = header.values.get("tokenizer.ggml.model"), header.values.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"a tokenizer of kind {kind!r:.40} is not converted (gpt2 and llama are)")
    names = ("tokens", "scores", "token_type", "merges")
    values, _ = read_gguf_metadata(str(header.path), {f"tokenizer.ggml.{name}" for name in names})
    lists = {name: values.get(f"tokenizer.ggml.{name}") or [] for name in names}
    prefix = header.values.get("tokenizer.ggml.add_space_prefix", kind == "llama")
    if kind == "llama":
        backend = _sentencepiece(str(header.values["general.architecture"]), lists, bool(prefix))
    else:
        if prefix:
            refuse(["tokenizer.ggml.add_space_prefix"])
        if not isinstance(cut, str) or cut not in PATTERNS:
            raise UnsupportedModelError(
                f"pre-tokenizer {cut!r:.40} (tokenizer.ggml.pre) is not known, and tokens would be wrong; "
                "give the model's Hugging Face folder"
            )
        if cut == "default":
            warn("it does not say how to cut text (tokenizer.ggml.pre); as in llama.cpp, some tokens may be wrong")
        backend = _byte_level(lists, PATTERNS[cut], cut in WHOLE_WORDS)
    special = {
        name: lists["tokens"][header.values[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in NAMED_TOKENS.items()
        if f"tokenizer.ggml.{key}_token_id" in header.values
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        add_bos_token=bool(header.values.get("tokenizer.ggml.add_bos_token", kind == "llama" or cut in WHOLE_WORDS)),
        add_eos_token=bool(header.values.get("tokenizer.ggml.add_eos_token", False)),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = values.get("tokenizer.chat_template")
    if len(tokenizer) > len(lists["tokens"]):
        raise ModelError("a special token is not one of tokenizer.ggml.tokens")
    return tokenizer


def end_tokens(header: Header) -> list[int]:
    """The ids that end an answer: end of sequence, of turn and of message. What the chat template puts there is found
    when the model is loaded."""
    ids = (header.values.get(f"tokenizer.ggml.{name}_token_id") for name in END_TOKENS)
    return sorted({number for number in ids if number is not None})


def _length(listed: Any) -> int:
    return listed.length if isinstance(listed, Counted) else len(listed) if isinstance(listed, tuple) else -1


def _byte_level(lists: dict[str, list[Any]], patterns: tuple[str, ...], whole_words: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(lists["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in lists["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    _add_whole_tokens(backend, lists)
    return backend


def _sentencepiece(architecture: str, lists: dict[str, list[Any]], prefix: bool) -> Any:
    """Every space becomes "▁", and with `prefix` one more goes before a text, also before one that begins with one."""
    from tokenizers import decoders, normalizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import select_tokenizer_builder

    parts = {name: listed for name, listed in lists.items() if listed}
    backend = select_tokenizer_builder(architecture, "llama")(parts).backend_tokenizer
    spaces = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _add_whole_tokens(backend, lists)
    return backend


def _add_whole_tokens(backend: Any, lists: dict[str, list[Any]]) -> None:
    """Tokens that are found in a text before it is cut: control tokens, and those that users defined."""
    from tokenizers import AddedToken

    control, defined = [], []
    for token, kind in zip(lists["tokens"], lists["token_type"], strict=False):
        if token and kind in (UNKNOWN, CONTROL):
            control.append(AddedToken(token, normalized=False, special=True))
        elif token and kind == USER_DEFINED:
            # Gemma's runs of spaces are spelled otherwise in its merges, and found after spaces have become that.
            spelled = token if backend.token_to_id(token) is not None else token.replace(" ", "▁")
            defined.append(AddedToken(spelled, normalized=spelled != token, special=False))
    backend.add_special_tokens(control)
    backend.add_tokens(defined)
