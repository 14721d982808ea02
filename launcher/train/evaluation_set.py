"""The held-out sequences that all runs on a mix share.

Shape legend: N evaluated sequences, C clusters, B sequences of a rank's share, L positions, D domains, V token
ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_testbed.data.tokens.held_out import evaluation_batches
from moe_testbed.data.tokens.sampler import Batch
from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.train.inputs import LANGUAGE_MODELLING, InputMaker
from moe_testbed.model.output_layer import NO_TARGET
from moe_testbed.routing.records import RoutingContext

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """The sequences that one rank runs at once.

    Attributes:
        numbers_B: numbers of the sequences that count, int64.
        counted_B: whether each row counts, bool. A row that does not is there because all ranks run as many rows.
        context, targets_BL, kinds_BL: the model's input, see `ModelInput`.
    """

    numbers_B: Tensor
    counted_B: Tensor
    context: RoutingContext
    targets_BL: Tensor
    kinds_BL: Tensor | None = None


@dataclass(frozen=True)
class EvaluationSet:
    """Sequences of one domain each, the domains taking turns.

    Attributes:
        domains: names of the domains.
        rows: the sequences.
        domain_NL: domain of the text that each token is from, also where the label is hidden from the router.
        cluster_N: number of each sequence's cluster. A cluster is the sequences that have most of their tokens from the
            same document (of equally many the first): what a bootstrap over documents resamples.
        cluster_domain_C: domain of each cluster.
        vocab_size: V.
        make_input: what makes a model's input of them.
    """

    domains: tuple[str, ...]
    rows: Batch
    domain_NL: Int64
    cluster_N: Int64
    cluster_domain_C: Int64
    vocab_size: int
    make_input: InputMaker

    @classmethod
    def of(
        cls,
        store: Store,
        split: str,
        sequence_length: int,
        sequences_per_domain: int,
        make_input: InputMaker = LANGUAGE_MODELLING,
    ) -> EvaluationSet:
        """Returns the sequences of a split. Raises DataError if a domain has too little text for one."""
        most = sequences_per_domain * len(store.domains)
        (rows,) = evaluation_batches(store, split, sequence_length, sequences_per_domain, most)
        first_document_D = [region.first_document for region in store.regions[split]]
        domain_NL = np.searchsorted(first_document_D, rows.document_BL, side="right") - 1
        documents, cluster_N = np.unique([_main_document(row_L) for row_L in rows.document_BL], return_inverse=True)
        cluster_domain_C = np.searchsorted(first_document_D, documents, side="right") - 1
        vocab_size = make_input.rows(store.vocab_size)
        return cls(store.domains, rows, domain_NL, cluster_N, cluster_domain_C, vocab_size, make_input)

    def __len__(self) -> int:
        """Returns N."""
        return len(self.domain_NL)

    @property
    def domain_N(self) -> Int64:
        """Says the domain of every sequence."""
        return self.domain_NL[:, 0]

    @property
    def token_counts_V(self) -> Int64:
        """How often every token id occurs."""
        return np.bincount(self.rows.token_ids_BL.reshape(-1), minlength=self.vocab_size)

    @property
    def shortest(self) -> int:
        """Says how many tokens every stack reads at least of every sequence."""
        return self.make_input.objective.shortest(self.domain_NL.shape[1])

    def first(self, sequences_per_domain: int) -> EvaluationSet:
        """Returns the first sequences of each domain, with the clusters of the whole set. They are the first of all,
        since the domains take turns."""
        taken = np.minimum(np.bincount(self.domain_N), sequences_per_domain).sum()
        rows = Batch(**{name: values[:taken] for name, values in vars(self.rows).items()})
        return replace(self, rows=rows, domain_NL=self.domain_NL[:taken], cluster_N=self.cluster_N[:taken])

    def shares(self, ranks: Ranks, micro_batch_size: int, step: int) -> Iterator[Share]:
        """Yields this rank's part of every batch.

        All ranks run as many rows, since experts on several ranks need all of them in every forward pass: where the
        rows of a batch do not suffice, its first one is run again and not counted.

        Args:
            micro_batch_size: most sequences that a rank runs at once.
            step: optimizer steps completed.
        """
        per_batch = micro_batch_size * ranks.size
        for first in range(0, len(self), per_batch):
            size = min(per_batch, len(self) - first)
            share = -(-size // ranks.size)
            rows_B = np.arange(ranks.rank * share, (ranks.rank + 1) * share)
            counted_B = rows_B < size
            numbers_B = first + np.where(counted_B, rows_B, 0)
            given = self.make_input(self.rows, numbers_B, step, ranks.device)
            context = given.context
            counted = torch.from_numpy(counted_B).to(ranks.device)
            if not counted_B.all():
                # A row that is run again must take no place in the pool of a router that chooses over one.
                context = _without_rows(context, counted)
            numbers = torch.from_numpy(numbers_B[counted_B]).to(ranks.device)
            yield Share(numbers, counted, context, given.targets_BL, given.kinds_BL)


def mean_losses(cross_entropy_BL: Tensor, targets_BL: Tensor) -> Tensor:
    """Returns the mean loss of each sequence over its targets, float64 [B]."""
    wanted_BL, loss_BL = targets_BL != NO_TARGET, cross_entropy_BL.double()
    if wanted_BL.all():
        return loss_BL.mean(1)
    return loss_BL.where(wanted_BL, 0.0).sum(1) / wanted_BL.sum(1).clamp(min=1)


def _without_rows(context: RoutingContext, counted_B: Tensor) -> RoutingContext:
    """Returns the context with the rows that do not count as padding, in every stack."""
    counted_BL = counted_B[:, None].expand_as(context.token_ids_BL)
    return replace(
        context,
        valid_BL=counted_BL if context.valid_BL is None else counted_BL & context.valid_BL,
        encoder=None if context.encoder is None else _without_rows(context.encoder, counted_B),
    )


def _main_document(document_L: Int64) -> int:
    documents, tokens = np.unique(document_L, return_counts=True)
    return int(documents[tokens.argmax()])
