"""Losses per domain and routing counts on a held-out split.

Shape legend: S scopes, G sets of tokens, N evaluated sequences, B sequences of a batch, T tokens, L positions, D
domains, E experts, K choices, W places for choices, Y MoE layers, V token ids, C clusters, X columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.run.arrays import Evaluation
from moe_testbed.launcher.train.evaluation_set import EvaluationSet, Share
from moe_testbed.model.language_model import LayerRouting, ModelOutput
from moe_testbed.routing.load import fractions, token_sets, without_padding
from moe_testbed.routing.metrics import COUNTS, REPORTED
from moe_testbed.routing.metrics.recording import RoutingTables, tracked_ids
from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.scopes import Scope

_TRACKED = tuple(metric for metric in REPORTED if metric.tracked and metric.of == COUNTS)

_SCOPES = (Scope.SEQUENCE, Scope.DOCUMENT)


class Evaluator:
    """Runs one fixed set of sequences, the same for all runs on a mix.

    The shuffled counts give every sequence another sequence's labels: what a table of counts shows by chance.
    """

    def __init__(self, config: ExperimentConfig, sequences: EvaluationSet, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sequences = sequences
        self.micro_batch_size = config.training.micro_batch_size
        self.num_layers = config.model.num_moe_layers
        self.num_experts = config.model.moe.num_routed_experts
        self.top_k = config.model.moe.choices
        self.vocabulary_ids_V = tracked_ids(sequences.token_counts_V)
        self.shuffled_NL = sequences.domain_NL[np.random.default_rng(0).permutation(len(sequences))]

    @torch.no_grad()
    def run(self, engine: Any, step: int) -> Evaluation:
        """Evaluates on all ranks, after ``step`` optimizer steps; returns the same on every rank."""
        sequences, device = self.sequences, self.ranks.device
        Y, D, N = self.num_layers, len(sequences.domains), len(sequences)
        sums = {
            "tokens_D": torch.zeros(D, dtype=torch.int64, device=device),
            "loss_sum_D": torch.zeros(D, dtype=torch.float64, device=device),
            "sequence_loss_N": torch.zeros(N, dtype=torch.float64, device=device),
            "violation_sum_SY": torch.zeros(len(_SCOPES), Y, dtype=torch.float64, device=device),
        }
        tables = RoutingTables(
            Y, D, self.num_experts, self.top_k, len(sequences.cluster_domain_C), self.vocabulary_ids_V, device
        )
        engine.eval()
        for share in sequences.shares(self.ranks, self.micro_batch_size, step):
            output = engine(share.context, share.targets_BL)
            self._add_losses(sums, output, share)
            self._add_routing(tables, output.layers, share)
            self._add_violations(sums["violation_sum_SY"], output.layers, share.context)
        engine.train()
        for table in sums.values():
            if self.ranks.group is not None:
                dist.all_reduce(table, group=self.ranks.group)
        tables.all_reduce(self.ranks.group)
        return Evaluation(
            step=step,
            domains=sequences.domains,
            sequence_domain_N=sequences.domain_N,
            sequence_cluster_N=sequences.cluster_N,
            cluster_domain_C=sequences.cluster_domain_C,
            **{name: table.cpu().numpy() for name, table in sums.items()},
            **tables.arrays(),
        )

    def _of_share(self, values_N: npt.NDArray[Any], share: Share) -> Tensor:
        """Returns the values of the sequences or tokens of a share, without those that do not count; one value a token,
        [T]."""
        values = torch.from_numpy(values_N).to(self.ranks.device)[share.numbers_B]
        if values.dim() == 1:
            values = values[:, None]
        return values.expand(-1, share.targets_BL.shape[1]).reshape(-1)

    def _add_losses(self, sums: dict[str, Tensor], output: ModelOutput, share: Share) -> None:
        loss_BL = output.cross_entropy_BL.double()[share.counted_B]
        domain_T = self._of_share(self.sequences.domain_NL, share)
        D = len(self.sequences.domains)
        sums["tokens_D"] += torch.bincount(domain_T, minlength=D)
        sums["loss_sum_D"] += torch.bincount(domain_T, loss_BL.reshape(-1), minlength=D)
        sums["sequence_loss_N"][share.numbers_B] = loss_BL.mean(1)

    def _add_routing(self, tables: RoutingTables, layers: list[LayerRouting], share: Share) -> None:
        counted_T = share.counted_B[:, None].expand_as(share.targets_BL).reshape(-1)
        domain_T = self._of_share(self.sequences.domain_NL, share)
        shuffled_T = self._of_share(self.shuffled_NL, share)
        cluster_T = self._of_share(self.sequences.cluster_N, share)
        token_ids_T = share.context.token_ids_BL[share.counted_B].reshape(-1)
        for y, layer in enumerate(layers):
            decision = layer.decision
            tables.add(
                y,
                decision.expert_ids_TK[counted_T],
                decision.weights_TK[counted_T],
                domain_T,
                cluster_T,
                token_ids_T,
                probabilities_TE=None if decision.probabilities_TE is None else decision.probabilities_TE[counted_T],
                kept_TW=layer.kept_TK[counted_T],
                shuffled_T=shuffled_T,
            )
            if decision.vectors_EX is not None:
                tables.add_vectors(y, decision.vectors_EX)

    def _add_violations(self, violation_sum_SY: Tensor, layers: list[LayerRouting], context: RoutingContext) -> None:
        for s, scope in enumerate(_SCOPES):
            sets = token_sets(scope, context)
            for y, layer in enumerate(layers):
                ids_TK = without_padding(layer.decision.expert_ids_TK, context.valid_T)
                violation_G = self.num_experts * fractions(sets.count(ids_TK, self.num_experts)).amax(-1) - 1
                sizes_G = sets.sizes(context.valid_T, layer.decision.weights_TK)
                violation_sum_SY[s, y] += (sizes_G * violation_G).sum()


def evaluation_values(evaluation: Evaluation) -> dict[str, float]:
    """Returns what the metrics file says of an evaluation: nats per token of every domain and their mean, and how the
    experts were used."""
    losses = evaluation.loss_sum_D / np.maximum(evaluation.tokens_D, 1)
    values = {"cross_entropy": float(losses.mean())}
    values |= {f"cross_entropy/{domain}": float(loss) for domain, loss in zip(evaluation.domains, losses, strict=True)}
    counts_YDE = evaluation.counts_top_k_YDE
    if len(counts_YDE) and evaluation.violation_sum_SY is not None:
        # Means over the layers; the report has each layer and every other metric.
        for metric in _TRACKED:
            assert metric.function is not None
            values[metric.name] = float(np.mean([metric.function(counts_DE) for counts_DE in counts_YDE]))
        # Within a sequence or document: mean over tokens of the violation of the set that they belong to.
        violation_SY = evaluation.violation_sum_SY / max(evaluation.tokens, 1)
        values |= {
            f"max_violation/{scope.value}": float(v_Y.mean()) for scope, v_Y in zip(_SCOPES, violation_SY, strict=True)
        }
    return values
