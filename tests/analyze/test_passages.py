"""How text becomes passages and tokens, and what of it counts."""

from __future__ import annotations

import pytest
import torch

from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.launcher.analyze.passages import CLUSTERS_PER_DOMAIN, Tokens, cut_passages
from tests.analyze import models

CPU = torch.device("cpu")


def documents(**texts: list[str]) -> dict[str, list[Document]]:
    return {name: [Document(text, "") for text in of_domain] for name, of_domain in texts.items()}


def test_no_passage_crosses_a_document_and_short_ends_are_left_out() -> None:
    passages = cut_passages(documents(one=["a" * 50, "b" * 41, "c" * 3], two=["d" * 8]), length=10, per_domain=9)
    assert passages.texts == ["a" * 40, "a" * 10, "b" * 40, "d" * 8]
    assert passages.domain_N.tolist() == [0, 0, 0, 1]
    assert passages.cluster_N.tolist() == [0, 0, 1, 2]
    assert passages.cluster_domain_C.tolist() == [0, 0, 1]


def test_passages_are_spread_evenly() -> None:
    text = "".join(chr(ord("a") + number) * 40 for number in range(12))
    assert cut_passages(documents(one=[text]), 10, 4).texts == [letter * 40 for letter in "adgj"]


def test_documents_are_dealt_to_a_bounded_number_of_clusters() -> None:
    many = documents(one=["abcdefgh"] * 100, two=["abcdefgh"] * 3)
    passages = cut_passages(many, 10, 100)
    assert passages.cluster_N[:100].tolist() == [number % CLUSTERS_PER_DOMAIN for number in range(100)]
    assert passages.cluster_N[100:].tolist() == [CLUSTERS_PER_DOMAIN + number for number in range(3)]
    assert passages.cluster_domain_C.tolist() == [0] * CLUSTERS_PER_DOMAIN + [1] * 3


def test_a_domain_without_text_is_named() -> None:
    with pytest.raises(DataError, match=r"domain 'two' has no text of at least 8 characters"):
        cut_passages(documents(one=["abcdefgh"], two=["", "abc"]), 10, 5)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_padding_special_tokens_and_the_last_token_do_not_count(adds_bos: bool) -> None:
    # The tokenizer knows </s> inside a text, too.
    passages = cut_passages(documents(one=["abcdefgh", "abc</s>defgh"]), 20, 2)
    (batch,) = Tokens(models.make_tokenizer(adds_bos), 20).batches(passages, 2, CPU)
    a, end = len(models.SPECIAL), 2
    bos = [1] if adds_bos else []
    first, second = [*bos, *range(a, a + 8)], [*bos, a, a + 1, a + 2, end, *range(a + 3, a + 8)]
    assert batch.token_ids_BL.tolist() == [first, second[:-1]]
    assert batch.attended_BL.tolist() == [[True] * len(first), [True] * len(first)]
    assert batch.targets_BL.tolist() == [first[1:] + [0], second[1:]]
    before = [False] * len(bos)
    assert batch.counted_BL.tolist() == [
        [*before, *[True] * 7, False],
        [*before, True, True, False, False, True, True, True, True],
    ]


def test_a_passage_with_more_tokens_loses_its_end() -> None:
    passages = cut_passages(documents(one=["abcdefgh" * 5]), 10, 1)
    (batch,) = Tokens(models.make_tokenizer(adds_bos=False), 10).batches(passages, 2, CPU)
    a = len(models.SPECIAL)
    assert batch.token_ids_BL.tolist() == [[*range(a, a + 8), a, a + 1]]
    assert batch.targets_BL.tolist() == [[*range(a + 1, a + 8), a, a + 1, a + 2]]
    assert batch.counted_BL.all()


def test_padding_is_not_attended() -> None:
    passages = cut_passages(documents(one=["abcdefgh", "abcdefghabcd"]), 20, 2)
    (batch,) = Tokens(models.make_tokenizer(), 20).batches(passages, 2, CPU)
    assert batch.attended_BL.tolist() == [[True] * 9 + [False] * 3, [True] * 12]
    assert batch.counted_BL.tolist() == [[False] + [True] * 7 + [False] * 4, [False] + [True] * 11]
