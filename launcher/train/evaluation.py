"""Losses per domain and routing counts on a held-out split.

Shape legend: S scopes, G sets of tokens, N evaluated sequences, B sequences of a batch, T tokens, L positions, D
domains, E experts, K choices, W places for choices, Y MoE layers, V token ids, C clusters, X kinds of targets.
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
from moe_testbed.launcher.run.records import ONE_STACK, MoELayers
from moe_testbed.launcher.train.evaluation_set import EvaluationSet, Share, mean_losses
from moe_testbed.model.language_model import ModelOutput
from moe_testbed.model.output_layer import NO_TARGET
from moe_testbed.model.stack import LayerRouting
from moe_testbed.routing.load import fractions, token_sets, without_padding
from moe_testbed.routing.metrics import COUNTS, REPORTED
from moe_testbed.routing.metrics.recording import RoutingTables, tracked_ids
from moe_testbed.routing.scopes import Scope

_TRACKED = tuple(metric for metric in REPORTED if metric.tracked and metric.of == COUNTS)

_SCOPES = (Scope.SEQUENCE, Scope.DOCUMENT)

_OF_KINDS = {"kind_tokens_X": torch.int64, "kind_loss_sum_X": torch.float64, "kind_correct_X": torch.int64}


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
        self.shuffled_N = sequences.domain_N[np.random.default_rng(0).permutation(len(sequences))]
        self.kinds = config.objective.kinds
        self.predicts_what_it_routes = config.model.architecture == "causal"

    @torch.no_grad()
    def run(self, engine: Any, step: int) -> Evaluation:
        """Evaluates on all ranks, after ``step`` optimizer steps; returns the same on every rank."""
        sequences, device = self.sequences, self.ranks.device
        Y, D, N = self.num_layers, len(sequences.domains), len(sequences)
        sums = {
            "tokens_D": torch.zeros(D, dtype=torch.int64, device=device),
            "loss_sum_D": torch.zeros(D, dtype=torch.float64, device=device),
            "sequence_loss_N": torch.zeros(N, dtype=torch.float64, device=device),
            "correct_D": torch.zeros(D, dtype=torch.int64, device=device),
            "violation_sum_SY": torch.zeros(len(_SCOPES), Y, dtype=torch.float64, device=device),
            "routed_tokens_SY": torch.zeros(len(_SCOPES), Y, dtype=torch.int64, device=device),
        }
        if self.kinds:
            for name, dtype in _OF_KINDS.items():
                sums[name] = torch.zeros(len(self.kinds), dtype=dtype, device=device)
        if not self.predicts_what_it_routes:
            sums["routed_tokens_YD"] = torch.zeros(Y, D, dtype=torch.int64, device=device)
        tables = RoutingTables(
            Y, D, self.num_experts, self.top_k, len(sequences.cluster_domain_C), self.vocabulary_ids_V, device
        )
        engine.eval()
        for share in sequences.shares(self.ranks, self.micro_batch_size, step):
            output = engine(share.context, share.targets_BL)
            self._add_losses(sums, output, share)
            self._add_routing(tables, sums.get("routed_tokens_YD"), output.layers, share)
            self._add_violations(sums, output.layers)
        engine.train()
        for table in sums.values():
            if self.ranks.group is not None:
                dist.all_reduce(table, group=self.ranks.group)
        tables.all_reduce(self.ranks.group)
        # Of a stack that reads another number of tokens than there are targets: as if it read as many.
        routed_SY, targets = sums.pop("routed_tokens_SY"), sums["tokens_D"].sum()
        scale_SY = (targets / routed_SY.clamp(min=1)).where(routed_SY != targets, 1.0)
        sums["violation_sum_SY"] *= scale_SY
        return Evaluation(
            step=step,
            domains=sequences.domains,
            sequence_domain_N=sequences.domain_N,
            sequence_cluster_N=sequences.cluster_N,
            cluster_domain_C=sequences.cluster_domain_C,
            kinds=self.kinds or None,
            **{name: table.cpu().numpy() for name, table in sums.items()},
            **tables.arrays(),
        )

    def _of_rows(self, values_N: npt.NDArray[Any], share: Share) -> Tensor:
        """Returns the values of the sequences of a share; any value for one that does not count."""
        values_B = torch.zeros(len(share.counted_B), dtype=torch.int64, device=self.ranks.device)
        values_B[share.counted_B] = torch.from_numpy(values_N).to(self.ranks.device)[share.numbers_B]
        return values_B

    def _add_losses(self, sums: dict[str, Tensor], output: ModelOutput, share: Share) -> None:
        wanted_BL = share.counted_B[:, None] & (share.targets_BL != NO_TARGET)
        loss_BL = output.cross_entropy_BL.double()
        domain_BL = self._of_rows(self.sequences.domain_N, share)[:, None].expand_as(loss_BL)
        D = len(self.sequences.domains)
        domain_T, loss_T, correct_T = domain_BL[wanted_BL], loss_BL[wanted_BL], output.correct_BL[wanted_BL]
        sums["tokens_D"] += torch.bincount(domain_T, minlength=D)
        sums["loss_sum_D"] += torch.bincount(domain_T, loss_T, minlength=D)
        sums["correct_D"] += torch.bincount(domain_T[correct_T], minlength=D)
        sums["sequence_loss_N"][share.numbers_B] = mean_losses(loss_BL, share.targets_BL)[share.counted_B]
        if share.kinds_BL is not None:
            kind_T, number = share.kinds_BL[wanted_BL], len(self.kinds)
            sums["kind_tokens_X"] += torch.bincount(kind_T, minlength=number)
            sums["kind_loss_sum_X"] += torch.bincount(kind_T, loss_T, minlength=number)
            sums["kind_correct_X"] += torch.bincount(kind_T[correct_T], minlength=number)

    def _add_routing(
        self, tables: RoutingTables, routed_YD: Tensor | None, layers: list[LayerRouting], share: Share
    ) -> None:
        labels_B = [
            self._of_rows(values_N, share)
            for values_N in (self.sequences.domain_N, self.sequences.cluster_N, self.shuffled_N)
        ]
        for y, layer in enumerate(layers):
            decision, token_ids_BL = layer.decision, layer.context.token_ids_BL
            counted_BL = share.counted_B[:, None].expand_as(token_ids_BL)
            if layer.context.valid_BL is not None:
                counted_BL = counted_BL & layer.context.valid_BL
            counted_T = counted_BL.reshape(-1)
            domain_T, cluster_T, shuffled_T = (
                values_B[:, None].expand_as(token_ids_BL)[counted_BL] for values_B in labels_B
            )
            if routed_YD is not None:
                routed_YD[y] += torch.bincount(domain_T, minlength=routed_YD.shape[1])
            tables.add(
                y,
                decision.expert_ids_TK[counted_T],
                decision.weights_TK[counted_T],
                domain_T,
                cluster_T,
                token_ids_BL[counted_BL],
                probabilities_TE=None if decision.probabilities_TE is None else decision.probabilities_TE[counted_T],
                kept_TW=layer.kept_TK[counted_T],
                shuffled_T=shuffled_T,
            )
            if decision.vectors_EX is not None:
                tables.add_vectors(y, decision.vectors_EX)

    def _add_violations(self, sums: dict[str, Tensor], layers: list[LayerRouting]) -> None:
        for s, scope in enumerate(_SCOPES):
            for y, layer in enumerate(layers):
                context = layer.context
                sets = token_sets(scope, context)
                ids_TK = without_padding(layer.decision.expert_ids_TK, context.valid_T)
                violation_G = self.num_experts * fractions(sets.count(ids_TK, self.num_experts)).amax(-1) - 1
                sizes_G = sets.sizes(context.valid_T, layer.decision.weights_TK)
                sums["violation_sum_SY"][s, y] += (sizes_G * violation_G).sum()
                sums["routed_tokens_SY"][s, y] += sizes_G.sum().long()


def evaluation_values(evaluation: Evaluation, layers: MoELayers = ONE_STACK) -> dict[str, float]:
    """Returns what the metrics file says of an evaluation: nats per token of every domain and their mean, and how the
    experts were used, also of each stack by itself.

    Args:
        layers: the MoE layers of the model.
    """
    losses = evaluation.loss_sum_D / np.maximum(evaluation.tokens_D, 1)
    values = {"cross_entropy": float(losses.mean())}
    values |= {f"cross_entropy/{domain}": float(loss) for domain, loss in zip(evaluation.domains, losses, strict=True)}
    if evaluation.correct_D is not None:
        values["accuracy"] = float((evaluation.correct_D / np.maximum(evaluation.tokens_D, 1)).mean())
    for kind, tokens, loss_sum, correct in evaluation.of_kinds():
        values |= {f"{kind}/cross_entropy": loss_sum / tokens, f"{kind}/accuracy": correct / tokens}
    values |= _means_over_layers(evaluation)
    for stack, numbers in layers.by_stack.items():
        of_stack = _means_over_layers(evaluation.only_layers(numbers))
        values |= {f"{stack}/{name}": value for name, value in of_stack.items()}
    return values


def _means_over_layers(evaluation: Evaluation) -> dict[str, float]:
    """How the experts were used; the report has each layer and every other metric."""
    counts_YDE = evaluation.counts_top_k_YDE
    if not len(counts_YDE) or evaluation.violation_sum_SY is None:
        return {}
    values = {}
    for metric in _TRACKED:
        assert metric.function is not None
        values[metric.name] = float(np.mean([metric.function(counts_DE) for counts_DE in counts_YDE]))
    # Within a sequence or document: mean over tokens of the violation of the set that they belong to.
    violation_SY = evaluation.violation_sum_SY / max(evaluation.tokens, 1)
    return values | {
        f"max_violation/{scope.value}": float(v_Y.mean()) for scope, v_Y in zip(_SCOPES, violation_SY, strict=True)
    }
