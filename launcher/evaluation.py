"""Losses per domain and routing counts on a held-out split.

Shape legend: S scopes, G balance sets, N sequences, B sequences of a batch, L positions, D domains, E experts, K
choices, Y MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from moe_testbed.data.sampler import Batch, evaluation_batches
from moe_testbed.data.store import Store
from moe_testbed.launcher.batches import to_context
from moe_testbed.launcher.config import ExperimentConfig
from moe_testbed.launcher.ranks import Ranks
from moe_testbed.model.language_model import LayerRouting
from moe_testbed.routing import metrics
from moe_testbed.routing.records import NO_EXPERT, RoutingContext
from moe_testbed.routing.scopes import Scope, fractions, token_sets, without_padding

_TOLD = {
    "domain_information": metrics.domain_information,
    "normalised_effective_experts": metrics.normalised_effective_experts,
    "dead_experts": metrics.dead_experts,
    "max_violation": metrics.max_violation,
}

_SCOPES = (Scope.SEQUENCE, Scope.DOCUMENT)


@dataclass
class Tables:
    """Sums over the evaluation set; the ranks' tables add up."""

    tokens_D: Tensor
    loss_sum_D: Tensor
    sequence_loss_N: Tensor
    counts_top_1_YDE: Tensor
    counts_top_k_YDE: Tensor
    dropped_YDE: Tensor
    shuffled_counts_top_k_YDE: Tensor
    violation_sum_SY: Tensor


class Evaluator:
    """Runs one fixed set of sequences, the same for all runs on a mix.

    The shuffled counts give every sequence another sequence's labels: what a table of counts shows by chance.
    """

    def __init__(self, config: ExperimentConfig, store: Store, ranks: Ranks) -> None:
        self.ranks = ranks
        self.domains = store.domains
        self.num_layers = config.model.num_moe_layers
        self.num_experts = config.model.moe.num_routed_experts
        rows = config.training.micro_batch_size * ranks.size
        self.batches = list(
            evaluation_batches(
                store,
                config.evaluation.split,
                config.data.sequence_length,
                config.evaluation.sequences_per_domain,
                rows,
            )
        )
        # By document, since a domain may hide its label from the router.
        first_document_D = [region.first_document for region in store.regions[config.evaluation.split]]
        document_NL = np.concatenate([batch.document_BL for batch in self.batches])
        self.domain_NL = np.searchsorted(first_document_D, document_NL, side="right") - 1
        self.shuffled_NL = self.domain_NL[np.random.default_rng(0).permutation(len(self.domain_NL))]

    @torch.no_grad()
    def run(self, engine: Any, step: int) -> dict[str, npt.NDArray[Any]]:
        """Evaluates on all ranks.

        Returns:
            The arrays of an evaluation file, the same on every rank.
        """
        Y, D, E, N = self.num_layers, len(self.domains), self.num_experts, len(self.domain_NL)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.ranks.device)

        tables = Tables(
            tokens_D=zeros(D),
            loss_sum_D=zeros(D, dtype=torch.float64),
            sequence_loss_N=zeros(N, dtype=torch.float64),
            counts_top_1_YDE=zeros(Y, D, E),
            counts_top_k_YDE=zeros(Y, D, E),
            dropped_YDE=zeros(Y, D, E),
            shuffled_counts_top_k_YDE=zeros(Y, D, E),
            violation_sum_SY=zeros(len(_SCOPES), Y, dtype=torch.float64),
        )
        engine.eval()
        for batch, rows_B, counted_B, first in self._shares():
            context, targets_BL = to_context(batch, rows_B, step, self.ranks.device)
            counted = torch.from_numpy(counted_B).to(self.ranks.device)
            if not counted_B.all():
                # A row that is run again must take no place in the pool of a router that chooses over one.
                context = replace(context, valid_BL=counted[:, None].expand_as(targets_BL))
            output = engine(context, targets_BL)
            domain = torch.from_numpy(self.domain_NL[first + rows_B]).to(self.ranks.device)
            shuffled = torch.from_numpy(self.shuffled_NL[first + rows_B]).to(self.ranks.device)
            self._add(tables, output.cross_entropy_BL.double(), output.layers, domain, shuffled, counted)
            self._add_violations(tables, output.layers, context)
            where = torch.from_numpy(first + rows_B).to(self.ranks.device)[counted]
            tables.sequence_loss_N[where] = output.cross_entropy_BL.double().mean(1)[counted]
        engine.train()
        arrays = {}
        for name, table in vars(tables).items():
            if self.ranks.group is not None:
                dist.all_reduce(table, group=self.ranks.group)
            arrays[name] = table.cpu().numpy()
        arrays["domains"] = np.array(self.domains)
        arrays["sequence_domain_N"] = self.domain_NL[:, 0]
        return arrays

    def _shares(self) -> Iterator[tuple[Batch, npt.NDArray[Any], npt.NDArray[Any], int]]:
        """This rank's rows of every batch, which of them count, and the number of the batch's first sequence.

        All ranks run as many rows, since experts on several ranks need all of them in every forward pass: where the
        rows do not suffice, the first one is run again and not counted.
        """
        first = 0
        for batch in self.batches:
            size = len(batch.sequence_B)
            share = -(-size // self.ranks.size)
            rows = np.arange(self.ranks.rank * share, (self.ranks.rank + 1) * share)
            yield batch, np.where(rows < size, rows, 0), rows < size, first
            first += size

    def _add(
        self,
        tables: Tables,
        loss_BL: Tensor,
        layers: list[LayerRouting],
        domain_BL: Tensor,
        shuffled_BL: Tensor,
        counted_B: Tensor,
    ) -> None:
        D, E = len(self.domains), self.num_experts
        domain_T, shuffled_T = domain_BL[counted_B].reshape(-1), shuffled_BL[counted_B].reshape(-1)
        tables.tokens_D += torch.bincount(domain_T, minlength=D)
        tables.loss_sum_D += torch.bincount(domain_T, loss_BL[counted_B].reshape(-1), minlength=D)
        counted_T = counted_B[:, None].expand_as(domain_BL).reshape(-1)

        def count(ids_TK: Tensor, labels_T: Tensor) -> Tensor:
            cells = labels_T[:, None] * (E + 1) + ids_TK - NO_EXPERT
            return torch.bincount(cells.reshape(-1), minlength=D * (E + 1)).view(D, E + 1)[:, 1:]

        for y, layer in enumerate(layers):
            ids_TK, kept_TK = layer.decision.expert_ids_TK[counted_T], layer.kept_TK[counted_T]
            tables.counts_top_1_YDE[y] += count(ids_TK[:, :1], domain_T)
            tables.counts_top_k_YDE[y] += count(ids_TK, domain_T)
            tables.dropped_YDE[y] += count(ids_TK.masked_fill(kept_TK, NO_EXPERT), domain_T)
            tables.shuffled_counts_top_k_YDE[y] += count(ids_TK, shuffled_T)

    def _add_violations(self, tables: Tables, layers: list[LayerRouting], context: RoutingContext) -> None:
        for s, scope in enumerate(_SCOPES):
            sets = token_sets(scope, context)
            for y, layer in enumerate(layers):
                ids_TK = without_padding(layer.decision.expert_ids_TK, context.valid_T)
                violation_G = self.num_experts * fractions(sets.count(ids_TK, self.num_experts)).amax(-1) - 1
                sizes_G = sets.sizes(context.valid_T, layer.decision.weights_TK)
                tables.violation_sum_SY[s, y] += (sizes_G * violation_G).sum()


def evaluation_line(arrays: dict[str, npt.NDArray[Any]], step: int, seconds: float) -> dict[str, Any]:
    """The line of metrics.jsonl for an evaluation: nats per token of every domain and their mean, and how the
    experts were used."""
    losses = arrays["loss_sum_D"] / np.maximum(arrays["tokens_D"], 1)
    line: dict[str, Any] = {
        "kind": "evaluation",
        "step": step,
        "seconds": seconds,
        "cross_entropy": float(losses.mean()),
    }
    line |= {f"cross_entropy/{domain}": float(loss) for domain, loss in zip(arrays["domains"], losses, strict=True)}
    counts_YDE = arrays["counts_top_k_YDE"]
    if len(counts_YDE):
        # Means over the layers; the report has each layer and every other metric.
        for name, metric in _TOLD.items():
            line[name] = float(np.mean([metric(counts_DE) for counts_DE in counts_YDE]))
        # Within a sequence or document: mean over tokens of the violation of the set that they belong to.
        violation_SY = arrays["violation_sum_SY"] / max(int(arrays["tokens_D"].sum()), 1)
        line |= {
            f"max_violation/{scope.value}": float(v_Y.mean()) for scope, v_Y in zip(_SCOPES, violation_SY, strict=True)
        }
    return line
