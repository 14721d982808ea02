"""Cuts labelled text into passages, the same for every checkpoint of the hub's format, and tokenises them.

Shape legend: N evaluated sequences: passages, B sequences: passages of a batch, L positions, C clusters, D domains.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError

CHARACTERS_PER_TOKEN = 4
"""Passages are cut by characters, so that all tokenizers see the same; English has about so many in a token."""

MINIMUM_CHARACTERS = 8
CLUSTERS_PER_DOMAIN = 64

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Passages:
    """Pieces of documents, domain by domain.

    Attributes:
        domains: names.
        texts: N.
        domain_N, cluster_N: domain and cluster of each; the documents of a domain are dealt to its clusters in turn.
        cluster_domain_C: domain of each cluster.
    """

    domains: tuple[str, ...]
    texts: list[str]
    domain_N: Int64
    cluster_N: Int64
    cluster_domain_C: Int64


def cut_passages(documents: Mapping[str, Sequence[Document]], length: int, per_domain: int) -> Passages:
    """Returns passages spread evenly over the text of each domain; none crosses the end of a document.

    Args:
        documents: domain -> its documents.
        length: tokens of a passage, about; a tokenizer that makes more of it loses the passage's end.
        per_domain: most passages of a domain.

    Raises:
        DataError: a domain has no passage.
    """
    size = length * CHARACTERS_PER_TOKEN
    texts: list[str] = []
    domains: list[int] = []
    clusters: list[int] = []
    cluster_domains: list[int] = []
    for number, (name, of_domain) in enumerate(documents.items()):
        places = [
            (document, start)
            for document, content in enumerate(of_domain)
            for start in range(0, len(content.text), size)
            if len(content.text) - start >= MINIMUM_CHARACTERS
        ]
        if not places:
            raise DataError(f"domain '{name}' has no text of at least {MINIMUM_CHARACTERS} characters")
        taken = min(per_domain, len(places))
        chosen = [places[index * len(places) // taken] for index in range(taken)]
        first = len(cluster_domains)
        rank = {document: order for order, document in enumerate(dict.fromkeys(document for document, _ in chosen))}
        for document, start in chosen:
            texts.append(of_domain[document].text[start : start + size])
            domains.append(number)
            clusters.append(first + rank[document] % CLUSTERS_PER_DOMAIN)
        cluster_domains += [number] * min(len(rank), CLUSTERS_PER_DOMAIN)
    return Passages(tuple(documents), texts, np.array(domains), np.array(clusters), np.array(cluster_domains))


@dataclass(frozen=True)
class TokenBatch:
    """Passages as a model reads them.

    Attributes:
        first: number of the first passage.
        token_ids_BL, attended_BL: input; attended_BL is False for padding.
        targets_BL: next tokens.
        counted_BL: tokens of the text whose successor is of the text, too; padding and special tokens are not.
        cut_B: the passage has more tokens than are read.
    """

    first: int
    token_ids_BL: Tensor
    attended_BL: Tensor
    targets_BL: Tensor
    counted_BL: Tensor
    cut_B: list[bool]


class Tokens:
    """Tokenises passages batch by batch, anew every time, so that not all of them are held.

    Args:
        tokenizer: a tokenizer of transformers. A token that it sets before every text (Mixtral's <s>) is set before
            a passage.
        length: most tokens of a passage, L.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer = tokenizer
        self.length = length
        self.special = set(tokenizer.all_special_ids)
        self.special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.prefix: list[int] = []
        for token in tokenizer("a")["input_ids"]:
            if token not in self.special:
                break
            self.prefix.append(token)

    @property
    def digest(self) -> str:
        """The same for tokenizers with the same pieces, whose losses per token can be compared."""
        pieces = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hashlib.sha256(pieces.encode()).hexdigest()[:16]

    def batches(self, passages: Passages, batch_size: int, device: torch.device) -> Iterator[TokenBatch]:
        """Yields all passages in order, each batch as long as its longest."""
        for first in range(0, len(passages.texts), batch_size):
            yield self._batch(first, passages.texts[first : first + batch_size], device)

    def _batch(self, first: int, texts: list[str], device: torch.device) -> TokenBatch:
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        # One token more than is read: the target of the last.
        rows = [(self.prefix + ids)[: self.length + 1] for ids in encoded]
        longest = max(2, *map(len, rows))
        token_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        text = torch.zeros(len(rows), longest, dtype=torch.bool)
        attended = torch.zeros(len(rows), longest, dtype=torch.bool)
        for b, row in enumerate(rows):
            token_ids[b, : len(row)] = torch.tensor(row, dtype=torch.int64)
            attended[b, : len(row)] = True
            text[b, : len(row)] = torch.tensor([token not in self.special for token in row], dtype=torch.bool)
        return TokenBatch(
            first,
            token_ids[:, :-1].to(device),
            attended[:, :-1].to(device),
            token_ids[:, 1:].to(device),
            (text[:, :-1] & text[:, 1:]).to(device),
            [len(self.prefix) + len(ids) > self.length + 1 for ids in encoded],
        )
