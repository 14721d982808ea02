"""Where words stand among pieces, against a walk over the pieces character by character."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from moe_testbed.data.probes.alignment import NO_PIECE, PieceFinder
from moe_testbed.data.tokens.tokenizer import load_tokenizer, piece_bytes, train_tokenizer

WORDS = [
    "the",
    "The",
    "routers'",
    "naïve",
    "über",
    "Їжак",
    "дім",
    "中文",
    "قال",
    "قَالَ",
    "x_1",
    "🙂",
    "𝔘",
    "e\u0301",
    "1234",
    "\u2581a",
]
GAPS = ["", " ", "  ", "\n", "\n\n", "\t", ", ", "(", "-", "\u00a0", " \u2581 "]


def random_text(generator: random.Random, words: int) -> str:
    return "".join(generator.choice(WORDS) + generator.choice(GAPS) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(1)
    # Fewer characters than there are have pieces: the rarest are spelt in bytes.
    texts = [random_text(generator, 30).replace("🙂", "").replace("中", "") for _ in range(400)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer({"a": texts}, 512, 200_000, 0.1))
    return path


def first_pieces_by_character(path: Path, text: str, starts: list[int]) -> list[int]:
    """Walks over the pieces and gives each character to the piece in which it begins."""
    tokenizer = load_tokenizer(path)
    owner: list[int] = []
    waiting = b""
    for place, piece in enumerate(tokenizer.encode(text)):
        name = tokenizer.id_to_piece(piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            if not waiting:
                owner.append(place)
            waiting += bytes([int(name[1:-1], 16)])
            try:
                waiting.decode()
            except UnicodeDecodeError:
                continue
            waiting = b""
        else:
            owner += [place] * len(name)
    assert len(owner) == len(text)
    found = []
    for start in starts:
        place = owner[start]
        before = start
        while before > 0 and owner[before - 1] == place:
            before -= 1
        found.append(place if text[before:start].strip() == "" else NO_PIECE)
    return found


@pytest.mark.parametrize("seed", range(30))
def test_first_pieces_are_those_of_a_walk_over_characters(tokenizer_path: Path, seed: int):
    generator = random.Random(seed)
    text = random_text(generator, 40)
    plain = text.replace("\u2581", " ")
    words = [found.span() for found in re.finditer(r"[\w'\u0300-\u036f]+|[^\w\s]", plain)]
    token_ids, places = PieceFinder(tokenizer_path).first_pieces(text, words)
    assert token_ids.tolist() == load_tokenizer(tokenizer_path).encode(text)
    assert places.tolist() == first_pieces_by_character(tokenizer_path, plain, [start for start, _ in words])
    own = [place for place in places.tolist() if place != NO_PIECE]
    assert len(set(own)) == len(own), "no two words have the same first piece"


def test_pieces_put_together_are_the_text(tokenizer_path: Path):
    tokenizer = load_tokenizer(tokenizer_path)
    written = piece_bytes(tokenizer)
    for seed in range(20):
        text = random_text(random.Random(seed), 40)
        assert b"".join(written[piece] for piece in tokenizer.encode(text)).decode() == text.replace("\u2581", " ")


def test_a_text_without_words_has_pieces(tokenizer_path: Path):
    finder = PieceFinder(tokenizer_path)
    token_ids, places = finder.first_pieces("the über", [])
    assert len(token_ids) > 0 and len(places) == 0
    assert finder.decode(token_ids.tolist()) == "the über"
    token_ids, places = finder.first_pieces("", [])
    assert len(token_ids) == len(places) == 0
