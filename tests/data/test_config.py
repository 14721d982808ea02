from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from moe_testbed.data.config import MixConfig

MIXES = Path(__file__).parents[2] / "configs" / "mixes"
SOURCES = [{"kind": "files", "glob": "*.txt"}]


def read(name: str) -> MixConfig:
    return MixConfig.model_validate(with_included(name))


def with_included(name: str) -> dict[str, Any]:
    """The launcher resolves includes; a mix has nothing below its domains that two files would share."""
    content = yaml.safe_load((MIXES / name).read_text(encoding="utf-8"))
    included = content.pop("include", None)
    return {**(with_included(included) if included else {}), **content}


@pytest.mark.parametrize("path", sorted(MIXES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_mix_is_valid_and_named_after_its_contents(path: Path):
    mix = read(path.name)
    assert all(domain.licence != "unknown" and domain.family for domain in mix.domains.values())


def test_the_larger_mix_holds_the_smaller():
    small, large = read("packages8.yaml"), read("packages16.yaml")
    assert (len(small.domains), len(large.domains)) == (8, 16)
    assert all(large.domains[name] == domain for name, domain in small.domains.items())


def test_the_default_mix_needs_pip_only():
    assert {source.index for domain in read("packages8.yaml").domains.values() for source in domain.sources} == {"pypi"}


def test_fractions_must_leave_text_to_train_on():
    with pytest.raises(ValidationError, match=r"validation_fraction \+ tuning_fraction = 1 leaves nothing to train on"):
        MixConfig(name="m", domains={"a": {"sources": SOURCES}}, validation_fraction=0.5, tuning_fraction=0.5)


def test_one_weight_must_be_positive():
    with pytest.raises(ValidationError, match="every domain has weight 0"):
        MixConfig(name="m", domains={"a": {"sources": SOURCES, "weight": 0}})


def test_unknown_key_is_refused():
    with pytest.raises(ValidationError, match="vocabulary_size"):
        MixConfig(name="m", domains={"a": {"sources": SOURCES}}, vocabulary_size=10)


@pytest.mark.parametrize("field, value", [("package", "--index-url"), ("version", "1 --pre"), ("sha256", "abc")])
def test_a_pin_cannot_smuggle_options(field: str, value: str):
    pin = {"kind": "package", "package": "p", "version": "1", "sha256": "0" * 64, "members": ["*"], field: value}
    with pytest.raises(ValidationError, match=field):
        MixConfig(name="m", domains={"a": {"sources": [pin]}})


@pytest.mark.parametrize(
    "name, domains", [("mmlu_topics.yaml", 57), ("languages_udhr.yaml", 15), ("languages_quran.yaml", 10)]
)
def test_labelled_sets_are_for_evaluation_only(name: str, domains: int):
    mix = read(name)
    assert mix.evaluation_only and len(mix.domains) == domains
    # Every domain reads a text of its own.
    sources = [(source.members, source.reader) for domain in mix.domains.values() for source in domain.sources]
    assert len(set(map(str, sources))) == domains


def test_topics_are_read_under_their_own_names():
    for name, domain in read("mmlu_topics.yaml").domains.items():
        assert [source.reader.key for source in domain.sources] == [name]
