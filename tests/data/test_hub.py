"""The hub source with a fake hub."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from moe_testbed.data.errors import DataError
from moe_testbed.data.sources import HubSource
from moe_testbed.data.sources.base import Limits
from moe_testbed.data.sources.tally import Tally

ALL = Limits(10**6, 10**6)
ROWS = {"body": ["one", "two", "three", "four"], "id": [1, 2, 3, 4]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Answers every request with ROWS, as a stream; returns the requests."""
    requests: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> datasets.IterableDataset:
        requests.append((path, name, options))
        return datasets.Dataset.from_dict(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return requests


def test_streams_one_column(hub: list[tuple[Any, ...]], tmp_path: Path):
    source = HubSource(path="a/b", name="fr", column="body", limit=3)
    source.prepare(tmp_path, lambda _: None)
    documents = list(source.documents(tmp_path, ALL, Tally(0)))
    assert [document.text for document in documents] == ["one", "two", "three"]
    assert documents[2].origin == "hub/a/b/fr/train#2"
    assert hub[0] == ("a/b", "fr", {"split": "train", "revision": None, "streaming": True})


def test_stops_at_the_bytes_or_the_end(hub: list[tuple[Any, ...]], tmp_path: Path):
    source = HubSource(path="a/b", column="body")
    assert [document.text for document in source.documents(tmp_path, Limits(4, 4), Tally(0))] == ["one", "two"]
    assert len(list(source.documents(tmp_path, ALL, Tally(0)))) == 4


def test_a_missing_column_names_those_there_are(hub: list[tuple[Any, ...]], tmp_path: Path):
    with pytest.raises(DataError, match=r"hub/a/b/train has no column 'text': correct `column`\. Available: body, id"):
        HubSource(path="a/b").prepare(tmp_path, lambda _: None)


def test_a_long_document_does_not_count_for_more_than_is_kept_of_it(hub: list[tuple[Any, ...]], tmp_path: Path):
    source = HubSource(path="a/b", column="body")
    assert [found.text for found in source.documents(tmp_path, Limits(4, 1), Tally(0))] == ROWS["body"]


def test_rows_without_text_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    rows = datasets.Dataset.from_dict({"meta": [{"text": "one"}, {"text": None}, {"text": "two"}]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows.to_iterable_dataset())
    tally = Tally(max_bad_records=0.5)
    source = HubSource(path="a/b", column="meta.text")
    source.prepare(tmp_path, lambda _: None)
    assert [found.text for found in source.documents(tmp_path, ALL, tally)] == ["one", "two"]
    assert (tally.records, tally.named) == (3, ["hub/a/b/train#1: meta.text is null"])


def test_a_column_of_numbers_is_no_text(hub: list[tuple[Any, ...]], tmp_path: Path):
    tally = Tally(max_bad_records=0)
    assert list(HubSource(path="a/b", column="id").documents(tmp_path, ALL, tally)) == []
    with pytest.raises(DataError, match=r"4 of 4 records cannot be read.*hub/a/b/train#0: id is a number, not text"):
        tally.check()


def test_whatever_the_hub_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"^hub/a/b/train cannot be read \(no route\): check the name") as caught:
        HubSource(path="a/b").prepare(tmp_path, lambda _: None)
    assert "\n" not in str(caught.value)
