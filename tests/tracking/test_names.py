"""Keys, judged by MLflow's own check of names and by a file system."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path

import pytest

from moe_testbed.launcher.tracking.names import flatten, key_of
from moe_testbed.launcher.tracking.parts import send_texts
from moe_testbed.launcher.tracking.values import OLDER_LENGTHS

validation = pytest.importorskip("mlflow.utils.validation")

KEPT = ["law", "法律", "小说", "право", "νόμος", "القانون", "판결", "law/eu", "a.b-c d:e_f", "Ünïcödé"]
CHANGED = [
    "law & order", "law | order", "हिन्दी", "ภาษาไทย", "حُكْم", "⚖", "👩‍⚖️", "a//b", "a/", "/a", "..", "a/./b", "../a", "",
    "a\n", "a\tb",    "x" * 251, "法" * 251, "x" * 260, unicodedata.normalize("NFD", "é"), "a\x00b", "\ud800",
]  # fmt: skip


def takes(key: str) -> bool:
    try:
        validation._validate_metric(key, 1.0, 0, 0)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", KEPT)
def test_what_mlflow_takes_stays_as_it_is(name: str) -> None:
    assert takes(name)
    assert key_of(name) == name


@pytest.mark.parametrize("name", CHANGED)
def test_what_mlflow_refuses_gets_a_key_that_it_takes(name: str) -> None:
    assert not takes(name) or name == unicodedata.normalize("NFD", name)
    key = key_of(f"evaluation/loss/{name}" if name else name)
    assert takes(key) and len(key) <= 250


def test_no_two_names_have_one_key() -> None:
    names = [f"evaluation/loss/{name}" for name in [*KEPT, *CHANGED, "é", "__", "law _ order"]]
    keys: list[str] = []
    for name in names:
        keys.append(key_of(name, keys))
    assert len(set(keys)) == len(names)
    # Asked again, in any order, each name has the key that it had.
    assert [key_of(name, keys) for name in reversed(names)] == keys[::-1]


@pytest.mark.parametrize("pair", [("Law", "law"), ("cafe", "café"), ("STRASSE", "straße"), ("が", "か")])
def test_what_a_database_may_hold_for_one_is_told_apart(pair: tuple[str, str]) -> None:
    first = key_of(pair[0])
    second = key_of(pair[1], [first])
    assert first == pair[0]
    assert second.startswith(f"{pair[1]}-") and takes(second)
    assert key_of(pair[0], [first, second]) == first and key_of(pair[1], [first, second]) == second


def test_keys_that_are_files_exclude_no_other(tmp_path: Path) -> None:
    names = [
        *KEPT,
        *(name for name in CHANGED if name and "\ud800" not in name),
        "loss/law",
        "loss",
        "loss.law",
        "法" * 90,
    ]
    keys: list[str] = []
    for name in (f"evaluation/{name}" for name in names):
        keys.append(key_of(name, keys, slashes=1))
        assert takes(keys[-1])
        path = tmp_path / keys[-1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert [(tmp_path / key).read_text() for key in keys] == [f"evaluation/{name}" for name in names]
    assert key_of("train/loss", slashes=1) == "train/loss"
    assert "/" not in key_of("mix.law/eu", slashes=0)


def test_flatten() -> None:
    config = {"a": {"b": 1, "c": None}, "d": [1, "x"], "e": {}, "f & g": True, "h": "text", "法律": 2}
    assert flatten(config) == {
        "a.b": "1", "a.c": "null", "d": '[1, "x"]', "e": "{}", key_of("f & g"): "true", "h": "text", "法律": "2",
    }  # fmt: skip


def test_values_of_one_dotted_name_are_two_parameters() -> None:
    flat = flatten({"a": {"b": 1}, "a.b": 2, "A": {"B": 3}})
    assert sorted(flat.values()) == ["1", "2", "3"]
    assert flat["a.b"] == "1"


class Strict:
    """A store that refuses a batch for one value that is too long, and some keys."""

    def __init__(self, limit: int, *refused: str) -> None:
        self.limit, self.refused, self.taken, self.calls = limit, refused, dict[str, str](), 0

    def __call__(self, pairs: list[tuple[str, str]]) -> None:
        self.calls += 1
        for key, text in pairs:
            if len(text) > self.limit or key in self.refused:
                raise ValueError(key)
        self.taken |= dict(pairs)


@pytest.mark.parametrize("limit", [6000, *OLDER_LENGTHS])
def test_one_value_that_is_refused_holds_up_no_other(limit: int) -> None:
    texts = [(f"short_{number}", "x") for number in range(90)] + [("long", "y" * 6000), ("bad", "z")]
    store = Strict(limit, "bad")
    refused = send_texts(texts, store, lambda error: isinstance(error, ValueError))
    assert [(key, str(error)) for key, error in refused] == [("bad", "bad")]
    assert set(store.taken) == {key for key, _ in texts} - {"bad"}
    assert len(store.taken["long"]) == limit
    assert store.taken["long"] == "y" * 6000 if limit == 6000 else store.taken["long"].endswith("y…")
    assert store.calls < 40


def test_what_is_no_refusal_is_raised_and_sent_no_second_time() -> None:
    calls = itertools.count()

    def away(_: object) -> None:
        next(calls)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        send_texts([("a", "1"), ("b", "2")], away, lambda error: isinstance(error, ValueError))
    assert next(calls) == 1
