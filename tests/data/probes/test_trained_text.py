"""What was trained on, against a search for shared substrings."""

from __future__ import annotations

import math
import random
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_testbed.data.build import build_store
from moe_testbed.data.config import MixConfig
from moe_testbed.data.inspect import decoded_documents
from moe_testbed.data.probes import trained_text
from moe_testbed.data.probes.trained_text import MOST_TRAINED_ON, WINDOW, TrainedText
from moe_testbed.data.tokens.store import Store

ALPHABETS = ["abcdefghijklmnop", "абвгґдеєжз", "حدثنازسمعى", "一丁七万丈三上下不与丐丑"]


def plain(text: str) -> str:
    """Letters and digits without case, one character after another."""
    kept = ""
    for character in unicodedata.normalize("NFKC", text):
        if character.isalnum():
            kept += character.casefold()[0]
    return kept


def substrings(text: str) -> list[str]:
    letters = plain(text)
    return [letters[at : at + WINDOW] for at in range(len(letters) - WINDOW + 1)]


def shared(known: set[str], text: str) -> float:
    """Which share of a text's substrings of WINDOW letters is known."""
    found = [substring in known for substring in substrings(text)]
    return sum(found) / len(found) if found else math.nan


def random_text(generator: random.Random, words: int, alphabet: str | None = None) -> str:
    alphabet = alphabet or generator.choice(ALPHABETS)
    return " ".join("".join(generator.choices(alphabet, k=generator.randint(1, 9))) for _ in range(words))


def with_known(generator: random.Random, training: list[str], known: int, new: int) -> str:
    """A text with some words from a training text, in their order, among new ones."""
    words = generator.choice(training).split()[:known]
    return f"{random_text(generator, new // 2)} {' '.join(words)} {random_text(generator, new - new // 2)}"


@pytest.fixture
def training() -> list[str]:
    generator = random.Random(1)
    return [random_text(generator, generator.randint(20, 200)) for _ in range(40)]


def texts_to_judge(training: list[str]) -> list[str]:
    generator = random.Random(2)
    amounts = [(known, new) for known in (0, 5, 10, 50, 200) for new in (0, 5, 50, 200)]
    return [with_known(generator, training, known, new) for known, new in amounts]


def test_with_all_hashes_the_share_is_that_of_shared_substrings(training: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trained_text, "KEPT", 1)
    trained = TrainedText.of_texts(training)
    known = {substring for text in training for substring in substrings(text)}
    expected = [shared(known, text) for text in texts_to_judge(training)]
    assert [trained.share([text]) for text in texts_to_judge(training)] == pytest.approx(expected, nan_ok=True)
    assert any(map(math.isnan, expected)) and 0.0 in expected and 1.0 in expected


def test_with_some_hashes_texts_are_judged_alike(training: list[str]):
    """Half of a text of 2,000 letters has 125 hashes that are kept: five standard deviations are .22."""
    generator, trained = random.Random(3), TrainedText.of_texts(training)
    known = {substring for text in training for substring in substrings(text)}
    long = [random_text(generator, 300, alphabet) for alphabet in ALPHABETS]
    for text in texts_to_judge(training) + long + training:
        expected = shared(known, text)
        if expected in (0.0, 1.0) and len(plain(text)) > 300:
            assert trained.share([text]) == expected
    for old, new in zip(long, [random_text(generator, 300, alphabet) for alphabet in ALPHABETS], strict=True):
        half = TrainedText.of_texts([old])
        assert half.share([old, new]) == pytest.approx(0.5, abs=0.22)


def test_the_order_of_documents_does_not_matter(training: list[str]):
    one, other = TrainedText.of_texts(training), TrainedText.of_texts(reversed(training))
    for text in texts_to_judge(training):
        assert one.share([text]) == pytest.approx(other.share([text]), nan_ok=True)
    assert one.share(training) == 1.0 == one.share(reversed(training))


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda text: text.replace(" ", "\n\n"),
        lambda text: text.replace(" ", ""),
        lambda text: "".join(f"{letter}-" for letter in text),
        lambda text: unicodedata.normalize("NFD", text),
        lambda text: "".join(letter + "\u0301" if letter in "bf" else letter for letter in text),
        lambda text: "".join(chr(ord(letter) + 0xFEE0) if "a" <= letter <= "z" else letter for letter in text),
    ],
    ids=["upper case", "lines", "no spaces", "punctuation", "decomposed", "combining marks", "full width"],
)
def test_layout_case_and_unicode_form_do_not_hide_a_text(change: Callable[[str], str]):
    texts = [random_text(random.Random(4), 200, alphabet) for alphabet in ("abcdefghé", "абвгґїйё")]
    assert TrainedText.of_texts(texts).share(map(change, texts)) == 1.0


def test_short_texts_tell_nothing(training: list[str]):
    trained = TrainedText.of_texts(training)
    assert math.isnan(trained.share([]))
    assert math.isnan(trained.share(["", training[0][:20]]))
    short = [training[0][at : at + 20] for at in range(0, 100, 20)]
    assert math.isnan(trained.share(short)), "runs do not go from one text into the next"
    assert math.isnan(trained.share(["a" * (WINDOW - 1)]))


def test_without_training_text_everything_is_new(training: list[str]):
    nothing = TrainedText.of_texts([])
    assert nothing.share(training) == 0.0


def test_a_store_gives_its_training_documents(store: Store, tmp_path: Path):
    trained = TrainedText.of(store, tmp_path)
    documents = {
        split: [text for name in store.domains for text in decoded_documents(store, split, name)]
        for split in ("train", "validation", "tuning")
    }
    expected = TrainedText.of_texts(documents["train"])
    assert np.array_equal(trained._hashes, expected._hashes) and len(trained._hashes) > 1_000
    assert trained.share(documents["train"]) == 1.0
    for split in ("validation", "tuning"):
        assert max(trained.share([text]) for text in documents[split]) <= MOST_TRAINED_ON


def test_the_fingerprint_is_made_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = TrainedText.of(store, tmp_path)
    (path,) = (tmp_path / "trained_text").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(TrainedText, "of_texts", lambda *_: pytest.fail("it is in the cache"))
        assert np.array_equal(TrainedText.of(store, tmp_path)._hashes, first._hashes)
    path.write_bytes(path.read_bytes()[:1_000])
    assert np.array_equal(TrainedText.of(store, tmp_path)._hashes, first._hashes), "a damaged one is made again"
    assert path.stat().st_size > 1_000


def test_a_store_that_was_built_anew_under_its_name_has_a_fingerprint_of_its_own(
    make_mix: Callable[..., MixConfig], tmp_path: Path
):
    """A mix whose optional domain comes back has the same name and other text."""
    mix = make_mix()
    domains: dict[str, Any] = dict(mix.domains)
    missing = mix.model_copy(update={"domains": {name: domains[name] for name in list(domains)[:2]}})
    whole, part = (build_store(each, tmp_path / "cache", lambda _: None) for each in (mix, missing))
    folder = tmp_path / "moved" / whole.path.name
    shutil.copytree(part.path, folder)
    fingerprints = [TrainedText.of(Store.open(path), tmp_path) for path in (folder, whole.path)]
    texts = list(decoded_documents(whole, "train", list(domains)[2]))
    assert [fingerprint.share(texts) for fingerprint in fingerprints] == [0.0, 1.0]
