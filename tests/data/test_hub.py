"""The hub source with a fake hub."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from moe_testbed.data.errors import DataError
from moe_testbed.data.sources import HubSource

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
    documents = list(source.documents(tmp_path, max_bytes=10**6))
    assert [document.text for document in documents] == ["one", "two", "three"]
    assert documents[2].origin == "hub/a/b/fr/train#2"
    assert hub[0] == ("a/b", "fr", {"split": "train", "revision": None, "streaming": True})


def test_stops_at_the_bytes_or_the_end(hub: list[tuple[Any, ...]], tmp_path: Path):
    source = HubSource(path="a/b", column="body")
    assert [document.text for document in source.documents(tmp_path, max_bytes=4)] == ["one", "two"]
    assert len(list(source.documents(tmp_path, max_bytes=10**6))) == 4


def test_a_missing_column_names_those_there_are(hub: list[tuple[Any, ...]], tmp_path: Path):
    with pytest.raises(DataError, match=r"hub/a/b/train has no column 'text': correct `column`\. Available: body, id"):
        HubSource(path="a/b").prepare(tmp_path, lambda _: None)


def test_a_column_of_numbers_is_refused(hub: list[tuple[Any, ...]], tmp_path: Path):
    with pytest.raises(DataError, match="column 'id' holds int, not text"):
        list(HubSource(path="a/b", column="id").documents(tmp_path, max_bytes=10))


def test_whatever_the_hub_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"^hub/a/b/train cannot be read \(no route\): check the name") as caught:
        HubSource(path="a/b").prepare(tmp_path, lambda _: None)
    assert "\n" not in str(caught.value)
