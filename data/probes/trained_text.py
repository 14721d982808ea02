"""What a run was pre-trained on, as a fingerprint that tells whether another text was a part of it.

Texts are compared by their letters and digits alone, whatever their case and Unicode form: layout, punctuation and
marks that Unicode does not join with a letter do not hide a text. Every run of `WINDOW` letters is hashed, and one of
`KEPT` hashes is kept, chosen by its own value, so that the same run is kept in every text (Manber, "Finding Similar
Files in a Large File System", USENIX 1994).
"""

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_testbed.data.sources.fetch import file_sha256
from moe_testbed.data.splits import TRAIN
from moe_testbed.data.tokens.permutation import UInt64
from moe_testbed.data.tokens.store import HEADER, Store
from moe_testbed.data.tokens.tokenizer import load_tokenizer, piece_bytes

WINDOW = 32
"""Letters: about seven English words. A power of 2."""

KEPT = 8
MOST_TRAINED_ON = 0.1
"""The share of a text's runs that may stand in training text; a text with more of them was trained on."""

FORMAT = 1
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)

Letters = npt.NDArray[np.uint32]


class TrainedText:
    """Tells how much of a text stands in the training split of a store.

    hashes: of the runs kept, sorted.
    """

    def __init__(self, hashes: UInt64) -> None:
        self._hashes = hashes

    @classmethod
    def of(cls, store: Store, cache_dir: Path) -> "TrainedText":
        """Returns that of a store: from the cache, or made once, which takes a second for each 15 MB of text."""
        name = f"{store.path.name}-{file_sha256(store.path / HEADER)[:16]}-{FORMAT}.npy"
        path = cache_dir / "trained_text" / name
        try:
            return cls(np.load(path))
        except (OSError, ValueError, EOFError):
            pass
        trained = cls.of_texts(_training_texts(store))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}.{name}")
        np.save(temporary, trained._hashes)
        os.replace(temporary, path)
        return trained

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> "TrainedText":
        """Returns that of texts in memory."""
        # Sorting takes a fiftieth of the time of np.unique, which makes a table of hashes first.
        return cls(np.sort(_hashes_of(texts)))

    def share(self, texts: Iterable[str]) -> float:
        """Returns which share of the texts' runs stands in the training text, by those runs that are kept.

        It is nan for texts that are too short to tell: they have no run, or none that is kept.
        """
        hashes = _hashes_of(texts)
        if not len(hashes):
            return float("nan")
        places = np.searchsorted(self._hashes, hashes)
        known = places < len(self._hashes)
        known[known] = self._hashes[places[known]] == hashes[known]
        return float(known.mean())


def letters(text: str) -> Letters:
    """Returns the letters and digits of a text alone, as code points without case."""
    codes = np.frombuffer(unicodedata.normalize("NFKC", text).encode("utf-32-le", "replace"), dtype=np.uint32)
    found = _letter_of()[codes]
    return found[found > 0]


@cache
def _letter_of() -> Letters:
    """Returns for each code point the letter or digit that it counts as, the first where it folds to several; 0 if it
    is none."""
    table = np.zeros(sys.maxunicode + 1, dtype=np.uint32)
    for code in range(len(table)):
        if chr(code).isalnum():
            table[code] = ord(chr(code).casefold()[0])
    return table


def run_hashes(of_letters: Letters) -> UInt64:
    """Returns the hashes that are kept of all runs of WINDOW letters, in their order.

    The hash is a polynomial modulo 2**64: that of twice as many letters follows from two of half of them.
    """
    hashes, power, length = of_letters.astype(np.uint64), _HASH_BASE, 1
    with np.errstate(over="ignore"):
        while length < WINDOW:
            if len(hashes) <= length:
                return np.zeros(0, dtype=np.uint64)
            hashes = hashes[:-length] * power + hashes[length:]
            power, length = power * power, 2 * length
    # The upper bits depend on all letters, the lower ones only on the lower bits of these.
    kept: UInt64 = hashes[hashes <= np.uint64(2**64 // KEPT - 1)]
    return kept


def _hashes_of(texts: Iterable[str]) -> UInt64:
    return np.concatenate([np.zeros(0, dtype=np.uint64), *(run_hashes(letters(text)) for text in texts)])


def _training_texts(store: Store) -> Iterator[str]:
    """Yields the texts of the documents. Putting pieces together is some times faster than the tokenizer's decoding."""
    written = np.array(piece_bytes(load_tokenizer(store.tokenizer_path)), dtype=object)
    for region in store.regions[TRAIN]:
        starts = store.document_starts[region.first_document : region.end_document + 1].tolist()
        for start, end in pairwise(starts):
            yield b"".join(written[store.tokens[start : end - 1]].tolist()).decode()
