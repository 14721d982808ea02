"""The mix's own tokenizer: sentencepiece BPE, byte fallback, nothing normalised.

decode(encode(text)) == text, but that U+2581, sentencepiece's own sign for a space, comes back as a space.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from moe_testbed.data.errors import DataError

END_OF_DOCUMENT = 1
SPACE_SIGN = "\u2581"
"""What sentencepiece writes for a space in its pieces; one that stands in a text comes back as a space."""

SENTENCE_CHARACTERS = 1_000
DOCUMENT_SAMPLE_CHARACTERS = 20_000


def train_tokenizer(
    texts: Mapping[str, Sequence[str]], vocab_size: int, bytes_per_domain: int, character_share: float
) -> bytes:
    """Returns the model file of a tokenizer fitted to equally much text of every domain.

    texts: domain -> training documents, in an order that has nothing to do with their content.
    Piece 0 is the unknown piece (never used: bytes stand in), piece 1 ends a document.
    Raises DataError if the text is too poor for vocab_size pieces.
    """
    sample = [text for documents in texts.values() for text in take_bytes(documents, bytes_per_domain)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(sample, rare_characters(sample, int(vocab_size * character_share))),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            unk_id=0,
            eos_id=END_OF_DOCUMENT,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"a value <= (\d+)", str(error))
        reason = f"it yields at most {most.group(1)}" if most else str(error).strip()[-200:]
        raise DataError(
            f"vocab_size {vocab_size} is too large for {sum(map(len, sample)):,} characters of text: {reason}; "
            "lower vocab_size or add text"
        ) from error
    return model.getvalue()


def take_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Yields the beginnings of the first documents, up to `limit` bytes: no long document fills the sample."""
    taken = 0
    for text in documents:
        if taken >= limit:
            return
        text = text[:DOCUMENT_SAMPLE_CHARACTERS]
        taken += len(text.encode())
        yield text


def rare_characters(documents: Iterable[str], kept: int) -> set[str]:
    """Returns all but the `kept` most frequent characters (ties to the smaller code point).

    Chinese alone has more characters than a small vocabulary has pieces; the rare ones are spelt in bytes.
    """
    counts: Counter[str] = Counter()
    for text in documents:
        counts.update(text)
    return set(sorted(counts, key=lambda character: (-counts[character], character))[kept:])


def sentences(documents: Iterable[str], rare: set[str]) -> Iterator[str]:
    """Pieces for the trainer: cut at rare characters, which no merge crosses, and with their line ends, which can be
    part of a piece."""
    cut = {ord(character): "\0" for character in rare}
    for text in documents:
        for start in range(0, len(text), SENTENCE_CHARACTERS):
            yield from filter(None, text[start : start + SENTENCE_CHARACTERS].translate(cut).split("\0"))


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Raises DataError if the file is no sentencepiece model."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path} is no tokenizer ({error}): delete its folder and build the mix again") from error


def piece_bytes(tokenizer: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    """Returns for each piece what it stands for: the UTF-8 of a text is that of its pieces, one behind the other."""
    pieces = []
    for number in range(tokenizer.get_piece_size()):
        name = tokenizer.id_to_piece(number)
        if tokenizer.is_byte(number):  # "<0x0A>"
            pieces.append(bytes.fromhex(name[3:5]))
        elif tokenizer.is_control(number) or tokenizer.is_unknown(number):
            pieces.append(b"")
        else:
            pieces.append(name.replace(SPACE_SIGN, " ").encode())
    return pieces


def encode_batch(batch: Mapping[str, list[str]], tokenizer_path: str) -> dict[str, Any]:
    """Turns column `text` into column `tokens`, as `datasets.map` asks; END_OF_DOCUMENT closes each document."""
    documents = _cached_tokenizer(tokenizer_path).encode(batch["text"], add_eos=True, num_threads=1)
    return {"tokens": [np.array(document, dtype=np.uint32) for document in documents]}


@lru_cache(maxsize=1)
def _cached_tokenizer(path: str) -> sentencepiece.SentencePieceProcessor:
    return load_tokenizer(Path(path))
