"""Text <-> token ids <-> pieces, with SentencePiece.

The text of a sequence is the bytes of its pieces in order, so it can be cut and streamed at any token. Control tokens
([PAD], [BOS], [EOS]) have no text; the space that SentencePiece puts in front of a text is not part of it.
"""

import codecs
import functools
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

SPACE = "\u2581"


class Tokenizer:
    """A SentencePiece model.

    Attributes:
      vocab_size: number of pieces.
      pieces: each id's piece as shown to people: a leading space is a space, bytes read `<0x0A>`.
      bytes: each id's UTF-8 text; empty for control tokens.
    """

    def __init__(self, path: Path | str, num_ids: int | None = None):
        """`num_ids`: ids of the model, where it has more than the tokenizer; those in excess read `<8200>`.

        Raises ValueError if the file is not a SentencePiece model, or has more pieces than `num_ids`.
        """
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromFile(str(path))
        except (RuntimeError, OSError) as err:
            raise ValueError(f"{path} is not a SentencePiece model: {err}") from err
        self.vocab_size: int = self._model.GetPieceSize()
        self._num_ids = self.vocab_size if num_ids is None else num_ids
        if self.vocab_size > self._num_ids:
            raise ValueError(f"{path} has {self.vocab_size} pieces, more than the {num_ids} ids of the model")
        self._adds_space = self._model.EncodeAsPieces("a")[0] != "a"

    def encode(self, text: str) -> list[int]:
        """Ids of a text. No BOS is added. Raises ValueError for a lone surrogate, which no UTF-8 text has."""
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise ValueError(f"the text is not Unicode at character {err.start}: {err.reason}") from err
        return self._model.EncodeAsIds(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; byte sequences that are not UTF-8 read as U+FFFD. Raises ValueError for what is no id."""
        if not isinstance(ids, Iterable):
            raise TypeError(f"expected a sequence of ids; got {ids!r:.60}")
        stream = self.stream()
        return "".join(stream(i) for i in ids) + stream(None)

    def stream(self, following: bool = False):
        """A function id -> the characters that id completes; None flushes. `following`: more text stands before."""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        strip = self._adds_space and not following

        def characters(token: int | None) -> str:
            nonlocal strip
            if token is not None and not (hasattr(token, "__index__") and 0 <= token < self._num_ids):
                raise ValueError(f"token id {token}: expected 0 to {self._num_ids - 1}")
            text = utf8.decode(b"" if token is None else self.bytes[token], final=token is None)
            if text and strip:
                strip, text = False, text.removeprefix(" ")
            return text

        return characters

    @functools.cached_property
    def pieces(self) -> list[str]:
        own = [self._model.IdToPiece(i).replace(SPACE, " ") for i in range(self.vocab_size)]
        return own + [f"<{i}>" for i in range(self.vocab_size, self._num_ids)]

    @functools.cached_property
    def bytes(self) -> list[bytes]:
        model = self._model

        def of(i: int) -> bytes:
            if model.IsControl(i):
                return b""
            if model.IsByte(i):
                return bytes([int(model.IdToPiece(i)[3:5], 16)])
            if model.IsUnknown(i):
                return model.DecodeIds([i]).encode()
            return model.IdToPiece(i).replace(SPACE, " ").encode()

        return [of(i) for i in range(self.vocab_size)] + [p.encode() for p in self.pieces[self.vocab_size :]]
