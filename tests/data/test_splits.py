import random

import pytest

from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.data.splits import split_documents


def documents(count: int) -> list[Document]:
    generator = random.Random(3)
    return [Document(f"{number} " + "x" * generator.randint(50, 150), str(number)) for number in range(count)]


def test_shares_and_partition():
    everything = documents(1000)
    splits = split_documents(everything, 10**9, 0.1, 0.05)
    sizes = {split: sum(len(document.text) for document in members) for split, members in splits.items()}
    total = sum(sizes.values())
    assert sizes["validation"] / total == pytest.approx(0.1, abs=0.002)
    assert sizes["tuning"] / total == pytest.approx(0.05, abs=0.002)
    assert sorted(d.origin for members in splits.values() for d in members) == sorted(d.origin for d in everything)


def test_the_split_depends_on_content_not_on_order():
    everything = documents(200)
    shuffled = random.Random(5).sample(everything, len(everything))
    assert split_documents(everything, 10**9, 0.1, 0.1) == split_documents(shuffled, 10**9, 0.1, 0.1)


def test_the_cap_holds():
    splits = split_documents(documents(1000), 20_000, 0.1, 0.05)
    total = sum(len(document.text) for members in splits.values() for document in members)
    assert 19_000 < total <= 20_000


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_documents_are_an_error(count: int):
    with pytest.raises(DataError, match="no document is left for the split"):
        split_documents(documents(count), 10**9, 0.1, 0.05)
