"""The probe shows how the routing develops: the experts of the same few tokens, and the load of a batch, over the
training.

Shape legend: T tokens of the probe, t tokens of a rank's share, W places for choices, Y MoE layers, D domains, E
experts, K choices, B sequences, N evaluated sequences, L positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.run.arrays import RoutingProbe
from moe_testbed.launcher.train.evaluation_set import EvaluationSet, Share
from moe_testbed.model.stack import LayerRouting
from moe_testbed.routing.load import TokenSets
from moe_testbed.routing.records import NO_EXPERT


class Probe:
    """Routes the same tokens after some of the steps, and leaves the training as it is.

    Args:
        config: says after how many steps, and how many tokens.
        held_out: the sequences of the evaluation; the probe's tokens are those of the first of each domain.
    """

    def __init__(self, config: ExperimentConfig, held_out: EvaluationSet, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sequences = held_out.first(config.probe.sequences_per_domain)
        self.length = held_out.shortest
        self.micro_batch_size = config.training.micro_batch_size
        self.steps = config.training.steps
        self.num_layers = config.model.num_moe_layers
        self.points = config.probe.points if self.num_layers else 0
        shape = self.num_layers, len(held_out.domains), config.model.moe.num_routed_experts
        self.counts_YDE = torch.zeros(shape, dtype=torch.int64, device=ranks.device)

    def is_due(self, done: int) -> bool:
        """Tells whether the probe is due after this optimizer step: evenly spaced, the last step among them."""
        return done * self.points // self.steps > (done - 1) * self.points // self.steps

    @torch.no_grad()
    def add(self, layers: list[LayerRouting]) -> None:
        """Counts a micro-batch of a step after which the probe is due; tokens without a label are left out."""
        _, D, E = self.counts_YDE.shape
        for y, layer in enumerate(layers):
            domain_T = layer.context.domain_BL.reshape(-1)
            labelled_T = domain_T >= 0
            if layer.context.valid_T is not None:
                labelled_T = labelled_T & layer.context.valid_T
            sets = TokenSets(D, domain_T[labelled_T])
            self.counts_YDE[y] += sets.count(layer.decision.expert_ids_TK[labelled_T], E)

    @torch.no_grad()
    def run(self, engine: Any, step: int) -> RoutingProbe:
        """Routes the probe's tokens, on all ranks.

        Returns:
            The same on every rank: the probe's experts, first choice first, and the assignments of all micro-batches
            added since it ran last.
        """
        engine.eval()
        shares = [
            (share, self._ids(share, engine(share.context, share.targets_BL).layers))
            for share in self.sequences.shares(self.ranks, self.micro_batch_size, step)
        ]
        engine.train()
        counts_YDE, self.counts_YDE = self.counts_YDE, torch.zeros_like(self.counts_YDE)
        if self.ranks.group is not None:
            dist.all_reduce(counts_YDE, group=self.ranks.group)
        return RoutingProbe(
            step=step,
            domains=self.sequences.domains,
            domain_T=self.sequences.domain_NL[:, : self.length].reshape(-1),
            expert_ids_YTW=self._gathered(shares).cpu().numpy(),
            counts_top_k_YDE=counts_YDE.cpu().numpy(),
        )

    def _ids(self, share: Share, layers: list[LayerRouting]) -> Tensor:
        """Returns the experts of the tokens that count, [Y, t, W]: of each sequence as many as every stack reads."""
        of_layers = []
        for layer in layers:
            ids_BLW = layer.decision.expert_ids_TK.unflatten(0, layer.context.token_ids_BL.shape)
            of_layers.append(ids_BLW[share.counted_B, : self.length].flatten(0, 1))
        width = max(ids.shape[1] for ids in of_layers)
        return torch.stack([F.pad(ids, (0, width - ids.shape[1]), value=NO_EXPERT) for ids in of_layers])

    def _gathered(self, shares: list[tuple[Share, Tensor]]) -> Tensor:
        """Returns the shares of all ranks, [Y, T, W], with the W of the widest."""
        group, device = self.ranks.group, self.ranks.device
        width = torch.tensor(max(ids_YtW.shape[2] for _, ids_YtW in shares), device=device)
        if group is not None:
            dist.all_reduce(width, dist.ReduceOp.MAX, group=group)
        N, L = len(self.sequences), self.length
        # Each token is one rank's; what the others add is 0, less NO_EXPERT once at the end.
        shifted = torch.zeros(self.num_layers, N, L, int(width), dtype=torch.int64, device=device)
        for share, ids_YtW in shares:
            by_sequence = ids_YtW.view(self.num_layers, -1, L, ids_YtW.shape[2])
            shifted[:, share.numbers_B, :, : ids_YtW.shape[2]] = by_sequence - NO_EXPERT
        if group is not None:
            dist.all_reduce(shifted, group=group)
        return shifted.flatten(1, 2) + NO_EXPERT
