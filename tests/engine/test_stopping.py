import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer
from thresher.engine.stopping import TextStream


def metaspace_tokenizer():
    pieces = ["▁", "▁the", "▁sun", "s", "un", "a", "b", "é", "▁a"]
    vocab = {"<unk>": 0} | {p: i + 1 for i, p in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BYTES, WORDS = byte_tokenizer(), metaspace_tokenizer()


def stream_all(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(i) for i in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return stream, pieces


@settings(max_examples=200)
@given(st.text(max_size=30))
def test_pieces_add_up_and_hold_whole_characters(text):
    ids = BYTES.encode(text, add_special_tokens=False)
    stream, pieces = stream_all(BYTES, ids)
    assert stream.text == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


@settings(max_examples=200)
@given(st.lists(st.integers(1, 9), max_size=20))
def test_spaces_before_words(ids):
    stream, _ = stream_all(WORDS, ids)
    assert stream.text == WORDS.decode(ids, skip_special_tokens=True)


@settings(max_examples=100)
@given(st.lists(st.integers(3, 258), max_size=20))
def test_invalid_bytes_come_out_at_the_end(ids):
    stream, _ = stream_all(BYTES, ids)
    assert stream.text.replace("\ufffd", "") == BYTES.decode(ids).replace("\ufffd", "")


@settings(max_examples=300)
@given(
    st.text(alphabet="abé", max_size=25),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_against_plain_search(text, stops):
    """The text ends where the stop string that ends first begins."""
    stream, _ = stream_all(BYTES, BYTES.encode(text, add_special_tokens=False), tuple(stops))
    ends = [(text.find(s) + len(s), s) for s in stops if s in text]
    assert stream.stopped == bool(ends)
    if not ends:
        assert stream.text == text
    else:
        first = min(end for end, _ in ends)
        assert stream.text == text[: min(end - len(s) for end, s in ends if end == first)]


def test_nothing_of_a_stop_string_is_shown_early():
    stream = TextStream(BYTES, ("END",))
    shown = [stream.push(i) for i in BYTES.encode("xENyEND", add_special_tokens=False)]
    assert shown == ["x", "", "", "ENy", "", "", ""]
    assert stream.stopped
    assert stream.push(5) == stream.finish() == ""


@pytest.mark.parametrize("special", [0, 1, 2])
def test_special_tokens_are_not_shown(special):
    stream = TextStream(BYTES)
    ids = [*BYTES.encode("ab", add_special_tokens=False), special, *BYTES.encode("c", add_special_tokens=False)]
    assert "".join(stream.push(i) for i in ids) + stream.finish() == "abc"


def test_the_space_before_the_first_word_is_kept():
    """SentencePiece drops it at the beginning of a text, which an answer is not."""
    ids = WORDS.encode("the sun", add_special_tokens=False)
    stream = TextStream(WORDS, context=ids[:1])
    assert stream.push(ids[1]) == " sun"
    assert TextStream(WORDS).push(ids[1]) == "sun"


def test_a_context_that_ends_inside_of_a_character():
    first, second = BYTES.encode("é", add_special_tokens=False)
    stream = TextStream(BYTES, context=[first])
    assert (
        stream.push(second) + stream.push(BYTES.encode("a", add_special_tokens=False)[0]) + stream.finish() == "\ufffda"
    )


def test_special_tokens_can_be_stop_strings():
    ids = [
        *BYTES.encode("ab", add_special_tokens=False),
        BYTES.eos_token_id,
        *BYTES.encode("cd", add_special_tokens=False),
    ]
    free, _ = stream_all(BYTES, ids)
    assert free.text == "abcd"
    for stop in (("</s>",), ("b</s>c",), ("zz", "</s>c")):
        stream, _ = stream_all(BYTES, ids, stop)
        assert stream.matched == stop[-1]
        assert stream.text == ("a" if stop[-1].startswith("b") else "ab")
    held, _ = stream_all(BYTES, ids, ("</s>x",))  # what looked like the beginning of a stop string
    assert held.text == "abcd"
    assert held.matched is None


def test_stop_strings_may_be_included():
    stream = TextStream(BYTES, ("cd",), include_stop=True)
    text = "".join(stream.push(i) for i in BYTES.encode("abcdef", add_special_tokens=False))
    assert text == stream.text == "abcd"


def test_finish_tells_of_a_stop_string():
    """The last character was not whole when it came, and a longer stop string was still possible."""
    stream = TextStream(BYTES, ("b", "é"))
    first = BYTES.encode("é", add_special_tokens=False)[0]
    assert stream.push(first) == ""
    assert (stream.finish(), stream.matched) == ("\ufffd", None)
