"""Texts by domain before any tokenizer: the splits of a mix, and labelled sets for evaluation only."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.data.build import build_store, store_path
from moe_testbed.data.config import MixConfig
from moe_testbed.data.errors import DataError
from moe_testbed.data.inspect import decoded_documents, describe_documents
from moe_testbed.data.manifest import describe_texts, mix_settings
from moe_testbed.data.splits import SPLITS
from moe_testbed.data.texts import ALL, MixTexts, labelled_documents, read_texts
from moe_testbed.data.tokens.store import Store

MakeMix = Callable[..., MixConfig]


def texts_of(texts: MixTexts, split: str) -> dict[str, list[str]]:
    return {name: [d.text for d in documents] for name, documents in labelled_documents(texts, split).items()}


@pytest.fixture
def parallel(tmp_path: Path) -> MixConfig:
    """Two languages that share names and numbers, one of which says the same twice, and a file without text."""
    for name, lines in {"one": ["Anna, 1948", "Anna, 1948", "x"], "two": ["Anna, 1948", "Otto, 1949", " \n"]}.items():
        (tmp_path / name).mkdir()
        for number, line in enumerate(lines):
            (tmp_path / name / f"{number}.txt").write_text(line)
    domains = {name: {"sources": [{"kind": "files", "glob": f"{tmp_path / name}/*.txt"}]} for name in ("one", "two")}
    return MixConfig.model_validate({"name": "parallel", "evaluation_only": True, "domains": domains})


def test_an_evaluation_set_keeps_duplicates_and_short_documents_in_their_order(parallel: MixConfig, tmp_path: Path):
    texts = read_texts(parallel, tmp_path / "cache", lambda _: None)
    assert texts_of(texts, ALL) == {"one": ["Anna, 1948", "Anna, 1948", "x"], "two": ["Anna, 1948", "Otto, 1949"]}
    assert describe_texts(texts)["domains"]["one"]["splits"] == {"all": {"documents": 3, "bytes": 21}}


@pytest.mark.parametrize("split", SPLITS)
def test_an_evaluation_set_has_no_splits(split: str, parallel: MixConfig, tmp_path: Path):
    texts = read_texts(parallel, tmp_path / "cache", lambda _: None)
    with pytest.raises(DataError, match=rf"for evaluation only and has no split '{split}': take the split 'all'"):
        labelled_documents(texts, split)


def test_nobody_trains_on_an_evaluation_set(parallel: MixConfig, tmp_path: Path):
    with pytest.raises(DataError, match=r"the mix 'parallel' is for evaluation only.*`moe-testbed analyze --mix`"):
        build_store(parallel, tmp_path, lambda _: None)
    assert not (tmp_path / "stores").exists()


def test_a_domain_without_text_is_left_out_or_refused(parallel: MixConfig, tmp_path: Path):
    for path in (tmp_path / "two").iterdir():
        path.write_text(" ")
    with pytest.raises(DataError, match=r"domain 'two' of the mix 'parallel': it has no text: .*`optional: true`"):
        read_texts(parallel, tmp_path / "cache", lambda _: None)
    said: list[str] = []
    two = parallel.domains["two"].model_copy(update={"optional": True})
    optional = parallel.model_copy(update={"domains": parallel.domains | {"two": two}})
    texts = read_texts(optional, tmp_path / "cache", said.append)
    assert [domain.name for domain in texts.domains] == ["one"]
    assert texts.dropped == {"two": "it has no text: correct its sources"}
    assert any(
        "domain 'two' is left out of the mix 'parallel', in which it is optional: it has" in line for line in said
    )
    with pytest.raises(DataError, match=r"domain 'two' of the mix 'parallel': it has no text: .* is not strict"):
        read_texts(optional.model_copy(update={"strict": True}), tmp_path / "cache", lambda _: None)


def test_the_splits_of_a_mix_are_those_of_its_store(make_mix: MakeMix, store: Store, tmp_path: Path):
    texts = read_texts(make_mix(), tmp_path, lambda _: None)
    for split in SPLITS:
        assert texts_of(texts, split) == {name: list(decoded_documents(store, split, name)) for name in store.domains}
    everything = texts_of(texts, ALL)
    for name in store.domains:
        assert sorted(everything[name]) == sorted(text for split in SPLITS for text in texts_of(texts, split)[name])


def test_the_flag_names_no_other_store(make_mix: MakeMix):
    """Stores that were built before mixes had it are found again."""
    assert store_path(make_mix(), Path()) == store_path(make_mix(evaluation_only=True), Path())


def test_later_settings_name_another_store_only_if_they_are_set(make_mix: MakeMix):
    defaults = {"max_document_share": 0.1, "max_bad_records": 0.01}
    assert store_path(make_mix(), Path()) == store_path(make_mix(**defaults), Path())
    assert not set(mix_settings(make_mix())) & set(defaults)
    for name in defaults:
        assert store_path(make_mix(), Path()) != store_path(make_mix(**{name: 0.5}), Path())


def test_the_table_tells_documents_sizes_and_samples(parallel: MixConfig, tmp_path: Path):
    shown = describe_documents(read_texts(parallel, tmp_path / "cache", lambda _: None))
    assert ["one", "3", "0.0", "unknown"] in [line.split() for line in shown.splitlines()]
    assert shown.endswith("--- two\nAnna, 1948")
