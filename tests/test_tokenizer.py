"""Both tokenizers: the bundled one, and Grok-1's where ../shared has it."""

import pytest
from conftest import shared
from hypothesis import given
from hypothesis import strategies as st

from grokscope.run.engine import bundled_checkpoint
from grokscope.tokenizer import Tokenizer

MINI = Tokenizer(bundled_checkpoint() / "tokenizer.model")


@pytest.fixture(scope="module")
def grok_1():
    return Tokenizer(shared("data/grok-1/tokenizer.model"))


def test_published_ids(grok_1):
    text = "The answer to life the universe and everything is of course"
    assert grok_1.encode(text) == [422, 3033, 356, 1180, 333, 9072, 360, 2175, 391, 359, 1805]
    assert grok_1.encode("I believe the meaning of life is") == [372, 2246, 333, 4071, 359, 1180, 391]
    assert grok_1.vocab_size == 131072
    assert grok_1.pieces[:5] == ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "\n"]
    assert grok_1.bytes[69] == b"\0"
    assert grok_1.bytes[324] == b"\xff"


TEXTS = ["", " ", "  two  spaces ", "\n\n\n\t tabs", "héllo 日本語 🎉", "12,345", "a\0b", "\r\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(grok_1, text):
    for tokenizer in (MINI, grok_1):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    assert MINI.decode(MINI.encode(text)) == text


@given(st.lists(st.integers(0, MINI.vocab_size - 1), max_size=40), st.integers(0, 40))
def test_a_stream_gives_the_same_text(ids, cut):
    """In pieces or at once, and control tokens have no text."""
    stream = MINI.stream()
    assert "".join([*(stream(i) for i in ids), stream(None)]) == MINI.decode(ids)
    data = b"".join(MINI.bytes[i] for i in ids)
    assert data.decode("utf-8", "replace") == MINI.decode(ids)
    assert MINI.bytes[1] == MINI.bytes[2] == b""


def test_the_text_agrees_with_sentencepiece(grok_1):
    text = "In 1969, men walked on the Moon — “one small step”. 日本"
    for tokenizer in (MINI, grok_1):
        ids = tokenizer.encode(text)
        assert tokenizer._model.DecodeIds(ids) == tokenizer.decode(ids) == text


def test_ids_beyond_the_tokenizer():
    path = bundled_checkpoint() / "tokenizer.model"
    assert Tokenizer(path, MINI.vocab_size + 2).decode([MINI.vocab_size + 1, 562]) == "<8193>The"
    for wrong in (-1, 8192):
        with pytest.raises(ValueError, match=f"token id {wrong}: expected 0 to 8191"):
            MINI.decode([wrong])
    with pytest.raises(ValueError, match="8192 pieces, more than the 100 ids"):
        Tokenizer(path, 100)


def test_what_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_text("hello")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model")
