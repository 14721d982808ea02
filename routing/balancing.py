"""All balancers of a model together, with the counts that they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_testbed.routing.balancer import BALANCERS, Balancer, BalancerConfig, RoutedBatch, ScopedBalancerConfig
from moe_testbed.routing.records import RoutingContext, RoutingDecision
from moe_testbed.routing.scopes import Estimator, Load, Scope, count_assignments, load_in_scope


@dataclass(frozen=True)
class BalanceTerms:
    """What the balancers add to one micro-batch.

    Attributes:
        loss: sum over balancers and layers of coefficient times loss, scalar.
        values: mean over layers of each balancer's loss before its coefficient, by label, without gradient.
    """

    loss: Tensor
    values: dict[str, Tensor]


class Balancing(nn.Module):
    """Runs the balancers of a config over the layers' decisions.

    Counts are taken once per micro-batch for all layers, and cross the ranks in one all-reduce of Y x E integers: per
    micro-batch where a balancer needs the other ranks' counts at once, else per optimizer step. They come from the
    decisions that the model's forward returns, so recomputing a layer in the backward pass counts nothing twice.

    Args:
        configs: label -> config of the balancer.
        data_parallel_group: the ranks over which the batch is spread; None for one process.
    """

    step_counts_YE: Tensor
    previous_counts_YE: Tensor

    def __init__(
        self,
        configs: Mapping[str, BalancerConfig],
        num_layers: int,
        num_experts: int,
        data_parallel_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.group = data_parallel_group
        self.num_experts = num_experts
        self.balancers = nn.ModuleDict(
            {label: BALANCERS.get(config.name)(config, num_layers, num_experts) for label, config in configs.items()}
        )
        counts_YE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        # Checkpoints are taken between optimizer steps, where the counts of the running step are zero.
        self.register_buffer("step_counts_YE", counts_YE, persistent=False)
        self.register_buffer("previous_counts_YE", counts_YE.clone())
        self._reduce_every_micro_batch = any(balancer.reads_wider_counts for _, balancer in self._labelled())

    def forward(self, decisions: list[RoutingDecision], context: RoutingContext) -> BalanceTerms:
        """Losses of one training micro-batch; its assignments are added to the step's counts."""
        counts_YE = torch.stack(
            [count_assignments(decision.expert_ids_TK, self.num_experts, context.valid_T) for decision in decisions]
        )
        if self._reduce_every_micro_batch:
            counts_YE = self._sum_over_ranks(counts_YE)
        self.step_counts_YE += counts_YE

        known: dict[tuple[Scope, Estimator], list[Load]] = {}

        def loads(config: ScopedBalancerConfig) -> list[Load]:
            key = (config.scope, config.estimator)
            if key not in known:
                wider_YE = self._wider_counts(config, counts_YE)
                known[key] = [
                    load_in_scope(config.scope, decision, context, None if wider_YE is None else wider_YE[layer])
                    for layer, decision in enumerate(decisions)
                ]
            return known[key]

        batch = RoutedBatch(decisions, context, loads)
        loss = torch.zeros((), device=counts_YE.device)
        values = {}
        for label, balancer in self._labelled():
            term = balancer.loss(batch)
            if term is not None:
                loss = loss + balancer.coefficient(context.step) * len(decisions) * term
                values[label] = term.detach()
            balancer.observe(batch)
        return BalanceTerms(loss, values)

    def finish_step(self) -> Tensor:
        """Closes an optimizer step: updates the balancers and moves the step's counts to the previous ones.

        Returns:
            Assignments of the global batch, int64 [Y, E].
        """
        counts_YE = self.step_counts_YE if self._reduce_every_micro_batch else self._sum_over_ranks(self.step_counts_YE)
        for _, balancer in self._labelled():
            balancer.finish_step(counts_YE, self.mean_over_ranks)
        self.previous_counts_YE.copy_(counts_YE)
        self.step_counts_YE.zero_()
        return self.previous_counts_YE

    def selection_bias_YE(self) -> Tensor | None:
        """Sum of the balancers' biases, float32 [Y, E]; None if no balancer sets one."""
        biases = [bias for _, balancer in self._labelled() if (bias := balancer.selection_bias_YE()) is not None]
        return torch.stack(biases).sum(0) if biases else None

    def _labelled(self) -> list[tuple[str, Balancer]]:
        return [(label, module) for label, module in self.balancers.items() if isinstance(module, Balancer)]

    def _wider_counts(self, config: ScopedBalancerConfig, counts_YE: Tensor) -> Tensor | None:
        """Counts over the balance set where it is wider than a rank's micro-batch, [Y, E]."""
        if config.scope is Scope.DATA_PARALLEL:
            return counts_YE
        if config.scope is not Scope.GLOBAL_BATCH:
            return None
        if config.estimator is Estimator.ONLINE:
            return self.step_counts_YE
        # The first step has no previous one. Asking Python for it would make a GPU wait.
        return torch.where(self.previous_counts_YE.any(), self.previous_counts_YE, self.step_counts_YE)

    def _sum_over_ranks(self, counts_YE: Tensor) -> Tensor:
        if self.group is not None:
            counts_YE = counts_YE.clone()
            dist.all_reduce(counts_YE, group=self.group)
        return counts_YE

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Mean of a tensor over the data-parallel ranks."""
        if self.group is None:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values / dist.get_world_size(self.group)
