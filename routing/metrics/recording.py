"""Streaming tables of who was routed where: memory does not depend on the number of tokens.

Shape legend: T tokens, W places for choices, Y MoE layers, D domains, E experts, C clusters of sequences, V token ids
that are tracked, X columns of the vectors that stand for experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.routing.records import NO_EXPERT

TRACKED_IDS = 2_048
"""Most token ids whose experts are counted."""

MINIMUM_OCCURRENCES = 10
"""An id that is rarer says nothing about its experts."""


def tracked_ids(token_counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The most frequent token ids among those seen at least ``MINIMUM_OCCURRENCES`` times, at most ``TRACKED_IDS``.

    Args:
        token_counts: occurrences of every token id.

    Returns:
        Ids by falling count; of equally frequent ones the lower first.
    """
    ids = np.argsort(-token_counts, kind="stable")[:TRACKED_IDS]
    return ids[token_counts[ids] >= MINIMUM_OCCURRENCES].astype(np.int64)


class RoutingTables:
    """Sums over routed tokens, layer by layer; tables of several ranks add up.

    Args:
        num_layers, num_domains, num_experts: Y, D, E.
        top_k: K of the router, also where tokens use more or fewer experts: between which ranks the margin lies.
        num_clusters: C.
        vocabulary_ids_V: token ids that are tracked, each once.
        device: where decisions come from.
        shuffled: a second label of every token is counted, too.
    """

    def __init__(
        self,
        num_layers: int,
        num_domains: int,
        num_experts: int,
        top_k: int,
        num_clusters: int,
        vocabulary_ids_V: npt.NDArray[np.int64],
        device: torch.device,
        shuffled: bool = True,
    ) -> None:
        self._num_domains, self._num_experts, self._top_k = num_domains, num_experts, top_k
        self._num_layers, self._device = num_layers, device
        self._ids_V = vocabulary_ids_V
        ordered_V, self._row_V = torch.from_numpy(vocabulary_ids_V).to(device).sort()
        # One id more, which no token has, so that looking up is never out of range.
        self._ordered = torch.cat([ordered_V, ordered_V.new_tensor([torch.iinfo(torch.int64).max])])
        self._vectors_YEX: dict[int, Tensor] = {}
        D, E = num_domains, num_experts
        counted = {
            "counts_top_1_YDE": (D, E),
            "counts_top_k_YDE": (D, E),
            "dropped_YDE": (D, E),
            "cluster_counts_YCE": (num_clusters, E),
            "coactivation_YEE": (E, E),
            "vocabulary_counts_YVE": (len(vocabulary_ids_V), E),
        }
        if shuffled:
            counted["shuffled_counts_top_k_YDE"] = (D, E)
        self._tables = {name: self._zeros(torch.int64, *shape) for name, shape in counted.items()}
        self._tables["weight_YDE"] = self._zeros(torch.float64, D, E)

    def _zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(self._num_layers, *shape, dtype=dtype, device=self._device)

    @torch.no_grad()
    def add(
        self,
        layer: int,
        decision_ids_TW: Tensor,
        weights_TW: Tensor,
        domain_T: Tensor,
        cluster_T: Tensor,
        token_ids_T: Tensor,
        *,
        probabilities_TE: Tensor | None = None,
        kept_TW: Tensor | None = None,
        shuffled_T: Tensor | None = None,
    ) -> None:
        """Adds what one layer did with some tokens, all of them labelled and none of them padding.

        Args:
            layer: y.
            decision_ids_TW: experts, first choice first, each at most once a token; ``NO_EXPERT`` where there is none.
            weights_TW: their weights, 0 where there is none.
            domain_T, cluster_T, token_ids_T: the token's domain, cluster and id.
            probabilities_TE: distribution over the experts, rows sum to 1; for all calls or for none.
            kept_TW: False where an assignment was dropped; None where nothing was.
            shuffled_T: the second label; needed if the tables count it.
        """
        tables, D, ids_TW = self._tables, self._num_domains, decision_ids_TW
        tables["counts_top_1_YDE"][layer] += self._count(ids_TW[:, :1], domain_T, D)
        tables["counts_top_k_YDE"][layer] += self._count(ids_TW, domain_T, D)
        if kept_TW is not None:
            tables["dropped_YDE"][layer] += self._count(ids_TW.masked_fill(kept_TW, NO_EXPERT), domain_T, D)
        if "shuffled_counts_top_k_YDE" in tables:
            assert shuffled_T is not None, "these tables count a second label"
            tables["shuffled_counts_top_k_YDE"][layer] += self._count(ids_TW, shuffled_T, D)
        clusters = tables["cluster_counts_YCE"].shape[1]
        tables["cluster_counts_YCE"][layer] += self._count(ids_TW, cluster_T, clusters)
        tables["weight_YDE"][layer] += self._count(ids_TW, domain_T, D, weights_TW.double())
        tables["coactivation_YEE"][layer] += self._together(ids_TW)
        place_T = torch.searchsorted(self._ordered, token_ids_T)
        tracked_T = self._ordered[place_T] == token_ids_T
        rows_T = self._row_V[place_T[tracked_T]]
        tables["vocabulary_counts_YVE"][layer] += self._count(ids_TW[tracked_T, :1], rows_T, len(self._row_V))
        if probabilities_TE is not None:
            self._add_probabilities(layer, probabilities_TE.double(), domain_T)

    def _count(self, ids_TW: Tensor, rows_T: Tensor, num_rows: int, values_TW: Tensor | None = None) -> Tensor:
        """Assignments, or the sum of their values, by row and expert."""
        width = self._num_experts + 1  # column 0 collects the choices that are no expert's
        cells = (rows_T[:, None] * width + ids_TW - NO_EXPERT).reshape(-1)
        values = None if values_TW is None else values_TW.reshape(-1)
        return torch.bincount(cells, values, minlength=num_rows * width).view(num_rows, width)[:, 1:]

    def _together(self, ids_TW: Tensor) -> Tensor:
        """Tokens that use both experts, [E, E]."""
        used = torch.zeros(len(ids_TW), self._num_experts + 1, device=ids_TW.device)
        used_TE = used.scatter_(1, ids_TW - NO_EXPERT, 1.0)[:, 1:]
        # Whole numbers below 2^24 are exact in float32.
        return (used_TE.t() @ used_TE).long()

    def _add_probabilities(self, layer: int, probabilities_TE: Tensor, domain_T: Tensor) -> None:
        K, E = self._top_k, self._num_experts
        if K < E:
            highest = probabilities_TE.topk(K + 1, dim=-1).values
            margin_T = highest[:, K - 1] - highest[:, K]
        else:
            margin_T = probabilities_TE.new_zeros(len(probabilities_TE))
        entropy_T = torch.special.entr(probabilities_TE).sum(-1)
        sums = {"entropy_sum_YD": entropy_T, "probability_sum_YDE": probabilities_TE, "margin_sum_YD": margin_T}
        for name, values in sums.items():
            shape = (self._num_domains, *values.shape[1:])
            table = self._tables.setdefault(name, self._zeros(torch.float64, *shape))
            table[layer].index_add_(0, domain_T, values)

    @torch.no_grad()
    def add_vectors(self, layer: int, vectors_EX: Tensor) -> None:
        """Takes the vectors that stand for the experts of a layer; the same on all ranks."""
        self._vectors_YEX[layer] = F.normalize(vectors_EX.float(), dim=-1)

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        """Adds up the tables of all ranks, which must have added the same kinds of values; None for one process."""
        if group is not None:
            for table in self._tables.values():
                dist.all_reduce(table, group=group)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The tables by name; what was never added is absent.

        ``entropy_sum_YD`` is in nats. ``margin_sum_YD`` sums the K-th minus the (K+1)-th highest probability, 0 for K =
        E. ``coactivation_YEE`` has the tokens that use expert i at [i, i]. ``vocabulary_counts_YVE`` has first choices.
        """
        arrays = {name: table.cpu().numpy() for name, table in self._tables.items()}
        arrays["vocabulary_ids_V"] = self._ids_V
        if self._vectors_YEX:
            cosine_YEE = torch.stack([self._vectors_YEX[y] @ self._vectors_YEX[y].t() for y in range(self._num_layers)])
            arrays["router_cosine_YEE"] = cosine_YEE.cpu().numpy()
        return arrays
