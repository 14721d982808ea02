import random
from dataclasses import replace
from hashlib import blake2b
from itertools import accumulate, takewhile

import pytest

from moe_testbed.data.deduplication import Unique
from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.data.splits import Selection, split_documents


def documents(count: int) -> list[Document]:
    generator = random.Random(3)
    return [Document(f"{number} " + "x" * generator.randint(50, 150), str(number)) for number in range(count)]


def test_shares_and_partition():
    everything = documents(1000)
    splits = split_documents(everything, 0.1, 0.05)
    sizes = {split: sum(len(document.text) for document in members) for split, members in splits.items()}
    total = sum(sizes.values())
    assert sizes["validation"] / total == pytest.approx(0.1, abs=0.002)
    assert sizes["tuning"] / total == pytest.approx(0.05, abs=0.002)
    assert sorted(d.origin for members in splits.values() for d in members) == sorted(d.origin for d in everything)


def select(everything: list[Document], max_bytes: int) -> tuple[list[Document], list[Document]]:
    """Those that are held at the end, and those that were let go."""
    selection = Selection(max_bytes)
    let_go = [unique.document for document in everything for unique in selection.add(Unique(document, []))]
    return selection.documents(), let_go


def test_the_order_depends_on_content_not_on_where_it_stood():
    everything = documents(200)
    shuffled = random.Random(5).sample(everything, len(everything))
    for max_bytes in (5_000, 10**9):
        assert select(everything, max_bytes)[0] == select(shuffled, max_bytes)[0]


@pytest.mark.parametrize("max_bytes", [10, 150, 5_000, 20_000, 99_999, 10**9])
def test_what_is_held_is_the_beginning_of_all_in_the_order_of_digests(max_bytes: int):
    """The oracle sorts everything and takes documents up to the first that exceeds the cap; some texts occur twice."""
    everything = documents(1000)
    everything += [replace(document, origin="again") for document in everything[::7]]
    held, let_go = select(everything, max_bytes)
    ordered = sorted(everything, key=lambda document: blake2b(document.text.encode(), digest_size=16).digest())
    sizes = accumulate(len(document.text.encode()) for document in ordered)
    expected = [
        document for document, _ in takewhile(lambda pair: pair[1] <= max_bytes, zip(ordered, sizes, strict=True))
    ]
    assert held == expected
    assert sorted(map(str, held + let_go)) == sorted(map(str, everything))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_documents_are_an_error(count: int):
    with pytest.raises(DataError, match="no document is left for the split"):
        split_documents(documents(count), 0.1, 0.05)
