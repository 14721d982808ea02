"""How the documents of a probing task are split."""

from __future__ import annotations

import random
from typing import Any

import pytest

from moe_testbed.data.errors import DataError
from moe_testbed.data.probes.splits import HeldOutSplit, NamedSplit, Parts, RandomSplit, Split

DOCUMENTS = [f"folder{number % 2}/{number:03}" for number in range(200)]
SPLITS: list[Split] = [
    RandomSplit(test=0.25),
    NamedSplit(train=("folder0/*",), test=("folder1/*",)),
    HeldOutSplit(test=0.1),
]


def is_new(name: str) -> bool:
    """The last digit tells what was held out: 30 % of the documents."""
    return name[-1] in "369"


def parts_of(split: Split, documents: list[str] = DOCUMENTS) -> Parts:
    return split.parts(documents, is_new)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.kind)
def test_no_document_is_in_both_parts_and_none_is_in_one_twice(split: Split):
    train, test = parts_of(split)
    assert len(set(train) | set(test)) == len(train) + len(test) == len(DOCUMENTS)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.kind)
def test_the_order_of_the_files_does_not_matter(split: Split):
    mixed = random.Random(1).sample(DOCUMENTS, len(DOCUMENTS))
    assert mixed != DOCUMENTS
    assert parts_of(split, mixed) == parts_of(split)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.kind)
def test_the_seed_decides_the_order(split: Split):
    other = split.model_copy(update={"seed": 1})
    assert parts_of(other) != parts_of(split)
    assert parts_of(split).train != sorted(parts_of(split).train), "it has nothing to do with names"


def test_shares_are_as_asked_for():
    assert len(parts_of(RandomSplit(test=0.25)).test) == 50
    assert len(parts_of(HeldOutSplit(test=0.1)).test) == 20
    assert len(parts_of(HeldOutSplit(test=0.9)).test) == 60, "at most those that are new"


def test_held_out_documents_alone_are_tested_on():
    train, test = parts_of(HeldOutSplit(test=0.1))
    assert all(map(is_new, test))
    assert sum(map(is_new, train)) == 40


def test_names_say_what_is_tested_on():
    train, test = parts_of(NamedSplit(train=("*/00?", "*/19*"), test=("folder1/02*",)))
    assert sorted(train) == sorted(name for name in DOCUMENTS if name[8:] < "010" or name[8:] >= "190")
    assert sorted(test) == [f"folder1/{number:03}" for number in (21, 23, 25, 27, 29)]


@pytest.mark.parametrize(
    "split, documents, message",
    [
        (RandomSplit(test=0.01), DOCUMENTS[:10], "no document for test"),
        (RandomSplit(test=0.99), DOCUMENTS[:10], "no document for train"),
        (NamedSplit(train=("*",), test=("folder2/*",)), DOCUMENTS, "no document for test"),
        (NamedSplit(train=("folder2/*",), test=("*",)), DOCUMENTS, "no document for train"),
        (NamedSplit(train=("*",), test=("folder1/001",)), DOCUMENTS, "'folder1/001' in train and in test"),
        (HeldOutSplit(), ["a0", "b1"], "all 2 documents were trained on, or are too short to tell"),
        (HeldOutSplit(), ["a3"], "no document for train"),
    ],
)
def test_an_empty_part_is_refused(split: Split, documents: list[str], message: str):
    with pytest.raises(DataError, match=message):
        parts_of(split, documents)


@pytest.mark.parametrize("options", [{"test": 0}, {"test": 1}, {"seed": -1}, {"share": 0.5}])
def test_bad_options_are_refused(options: dict[str, Any]):
    with pytest.raises(ValueError):
        RandomSplit.model_validate(options)
