"""The two smallest packages of the default mix, from whatever index this machine has."""

from pathlib import Path

import pytest
import yaml

from moe_testbed.data.build import build_store
from moe_testbed.data.config import MixConfig
from moe_testbed.data.errors import DataError
from moe_testbed.data.texts import ALL, labelled_documents, read_texts

MIXES = Path(__file__).parents[2] / "configs" / "mixes"
MIX = MIXES / "packages8.yaml"


@pytest.mark.network
def test_two_packages_become_a_store(tmp_path: Path):
    settings = yaml.safe_load(MIX.read_text(encoding="utf-8"))
    settings["domains"] = {name: settings["domains"][name] for name in ("chinese", "ukrainian")}
    settings |= {"name": "network", "vocab_size": 1024, "max_bytes_per_domain": 3_000_000, "strict": True}
    mix = MixConfig.model_validate(settings)
    try:
        store = build_store(mix, tmp_path, lambda _: None)
    except DataError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(f"no package index answers: {error}")
    assert store.domains == ("chinese", "ukrainian")
    assert min(len(store.tokens_of("train", domain)) for domain in store.domains) > 100_000


@pytest.mark.network
@pytest.mark.parametrize(
    "name, domains, documents",
    [("mmlu_topics", 57, {4, 5}), ("languages_udhr", 15, {31}), ("languages_quran", 10, {114})],
)
def test_labelled_sets_are_whole(name: str, domains: int, documents: set[int], tmp_path: Path):
    mix = MixConfig.model_validate(yaml.safe_load((MIXES / f"{name}.yaml").read_text(encoding="utf-8")))
    try:
        texts = read_texts(mix.model_copy(update={"strict": True}), tmp_path, lambda _: None)
    except DataError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(f"no package index answers: {error}")
    found = labelled_documents(texts, ALL)
    assert len(found) == domains
    assert {len(of_domain) for of_domain in found.values()} == documents
