"""A small corpus of three invented languages, each with its own alphabet, and the store built from it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.data.build import build_store
from moe_testbed.data.config import MixConfig
from moe_testbed.data.tokens.store import Store

ALPHABETS = {"latin": "abcdefgh", "greek": "αβγδεζηθ", "digits": "01234567"}


def make_document(alphabet: str, generator: random.Random, paragraphs: int) -> str:
    """Paragraphs of words over one alphabet; no two documents share a paragraph but by design of the test."""

    def word() -> str:
        return "".join(generator.choices(alphabet, k=generator.randint(2, 6)))

    return "\n\n".join(" ".join(word() for _ in range(20)) + "." for _ in range(paragraphs))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Domain -> folder with 60 text files."""
    root = tmp_path_factory.mktemp("corpus")
    generator = random.Random(1)
    folders = {}
    for name, alphabet in ALPHABETS.items():
        folders[name] = root / name
        folders[name].mkdir()
        for number in range(60):
            text = make_document(alphabet, generator, paragraphs=generator.randint(1, 8))
            (folders[name] / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return folders


@pytest.fixture(scope="session")
def make_mix(corpus: dict[str, Path]) -> Callable[..., MixConfig]:
    """A mix over the corpus; keyword arguments are further settings of the mix."""

    def make(**settings: Any) -> MixConfig:
        domains = {name: {"sources": [{"kind": "files", "glob": f"{path}/*.txt"}]} for name, path in corpus.items()}
        sizes = {
            "vocab_size": 512,
            "validation_fraction": 0.1,
            "tuning_fraction": 0.1,
            "minimum_document_characters": 1,
        }
        return MixConfig.model_validate({"name": "fixture", "domains": domains} | sizes | settings)

    return make


@pytest.fixture(scope="session")
def store(make_mix: Callable[..., MixConfig], tmp_path_factory: pytest.TempPathFactory) -> Store:
    return build_store(make_mix(), tmp_path_factory.mktemp("cache"), log=lambda _: None)
