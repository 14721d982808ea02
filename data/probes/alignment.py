"""Which piece of a text stands for which word: the first of its own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_testbed.data.tokens.tokenizer import SPACE_SIGN, load_tokenizer, piece_bytes

Int64 = npt.NDArray[np.int64]

NO_PIECE = -1


class PieceFinder:
    """Tokenises texts as a store does, and knows where their pieces stand."""

    def __init__(self, tokenizer_path: Path) -> None:
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._bytes = np.array([len(written) for written in piece_bytes(self._tokenizer)])

    def token_ids(self, text: str) -> Int64:
        """Returns the pieces of a text."""
        return np.array(self._tokenizer.encode(text), dtype=np.int64)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of pieces."""
        return str(self._tokenizer.decode(list(token_ids)))

    def first_pieces(self, text: str, words: Sequence[tuple[int, int]]) -> tuple[Int64, Int64]:
        """Tokenises a text, and finds the first piece of each word.

        A piece that begins with white space is that of the word behind it. A word whose beginning lies in a piece that
        an earlier word has begun, or a sign between the words, has no piece of its own.

        words: [start, end) in characters, in the order of the text and without overlap.

        Returns:
            The pieces, and for each word the place of its first piece, or NO_PIECE.
        """
        text = text.replace(SPACE_SIGN, " ")
        token_ids = self.token_ids(text)
        content = text.encode()
        sizes = self._bytes[token_ids]
        ends = np.cumsum(sizes)
        assert len(content) == sizes.sum(), "the pieces of a text are the text"
        bytes_before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
        starts = bytes_before[[start for start, _ in words]].astype(np.int64)
        places = np.searchsorted(ends, starts, side="right").astype(np.int64)
        begins = (ends - sizes)[places]
        # Only the white space before it stands between the beginning of its own piece and a word.
        between = [content[begin:start] for begin, start in zip(begins.tolist(), starts.tolist(), strict=True)]
        own = [not written.decode(errors="replace").strip() for written in between]
        return token_ids, np.where(own, places, NO_PIECE)
