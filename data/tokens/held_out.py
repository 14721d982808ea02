"""Batches of held-out text: the same for every run, whatever it trains on.

Shape legend: N evaluated sequences, D domains.
"""

from collections.abc import Iterator

import numpy as np

from moe_testbed.data.tokens.sampler import Batch, chunk_count, gather
from moe_testbed.data.tokens.store import Store


def evaluation_batches(
    store: Store, split: str, sequence_length: int, sequences_per_domain: int, batch_size: int
) -> Iterator[Batch]:
    """Yields the same single-domain sequences for every run, spread evenly over each domain's held-out text.

    The domains take turns, so that a batch is as mixed as one in training: what a router or an expert's capacity makes
    of a batch depends on its mixture.

    A domain with fewer chunks than sequences_per_domain gives each once. Samples are numbered from 0. The last batch
    may be smaller. Raises DataError if a domain has too little text for one sequence.
    """
    chunks = [chunk_count(store, split, domain, sequence_length) for domain in range(len(store.domains))]
    taken = [min(sequences_per_domain, count) for count in chunks]
    domain_N = np.repeat(np.arange(len(chunks), dtype=np.int64), taken)
    chunk_N = np.concatenate(
        [np.arange(n, dtype=np.int64) * count // n for n, count in zip(taken, chunks, strict=True)]
    )
    turns = np.lexsort((domain_N, np.concatenate([np.arange(n) for n in taken])))
    domain_N, chunk_N = domain_N[turns], chunk_N[turns]
    starts_D = np.array([region.first_token for region in store.regions[split]], dtype=np.int64)
    labels_D = np.array(store.labels, dtype=np.int64)
    for first in range(0, len(domain_N), batch_size):
        rows = np.arange(first, min(first + batch_size, len(domain_N)), dtype=np.int64)
        yield gather(store, starts_D, labels_D, domain_N[rows], chunk_N[rows], rows, sequence_length)
