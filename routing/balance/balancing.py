"""All balancers of a model together, with the counts that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_testbed.routing.balance.balancer import (
    BALANCERS,
    Balancer,
    BalancerConfig,
    CompletedStep,
    RoutedBatch,
    ScopedBalancerConfig,
)
from moe_testbed.routing.balance.counts import SharedCounts, StepTotals
from moe_testbed.routing.load import Load, TokenSets, load_in_sets, token_sets
from moe_testbed.routing.records import RoutingContext, RoutingDecision
from moe_testbed.routing.scopes import Estimator, Scope, ScopeConfig


@dataclass(frozen=True)
class BalanceTerms:
    """What the balancers add to one micro-batch.

    Attributes:
        loss: sum over balancers and layers of coefficient times loss, scalar.
        values: mean over layers of each balancer's loss before its coefficient, by label, without gradient.
    """

    loss: Tensor
    values: dict[str, Tensor]


class Balancing(SharedCounts):
    """Runs the balancers of a config over the layers' decisions, with the counts that they share.

    It is made from `SharedCounts` and does not hold one: checkpoints know the counts by their names here.

    Args:
        configs: label -> config of the balancer.
        num_layers: Y, layers that decide.
        num_experts: E.
        top_k: K, experts that a token uses, or is to use on average.
        data_parallel_group: the ranks over which the batch is spread; None for one process.
    """

    def __init__(
        self,
        configs: Mapping[str, BalancerConfig],
        num_layers: int,
        num_experts: int,
        top_k: int,
        data_parallel_group: dist.ProcessGroup | None = None,
    ) -> None:
        balancers = {
            label: BALANCERS.get(config.name)(config, num_layers, num_experts, top_k)
            for label, config in configs.items()
        }
        reads = {balancer.reads_counts for balancer in balancers.values()}
        scoped = [config for config in configs.values() if isinstance(config, ScopedBalancerConfig)]
        windows = {config.window_steps for config in scoped if config.scope is Scope.WINDOW}
        super().__init__(num_layers, num_experts, reads, windows, data_parallel_group)
        self.balancers = nn.ModuleDict(balancers)

    def forward(
        self, decisions: list[RoutingDecision], context: RoutingContext, outputs_TKM: Sequence[Tensor] = ()
    ) -> BalanceTerms:
        """Returns the losses of one training micro-batch, and adds its assignments to the step's counts.

        Args:
            outputs_TKM: see :class:`RoutedBatch`.
        """
        valid_T = context.valid_T
        counts_YE = self.add_micro_batch(decisions, context)
        known_sets: dict[Scope, TokenSets] = {}
        known_loads: dict[tuple[Scope, Estimator, int], list[Load]] = {}

        def sets(scope: Scope) -> TokenSets:
            if scope not in known_sets:
                known_sets[scope] = token_sets(scope, context)
            return known_sets[scope]

        def loads(config: ScopeConfig) -> list[Load]:
            if config.key not in known_loads:
                wider_YE = self.wider_counts(config, counts_YE)
                known_loads[config.key] = [
                    load_in_sets(sets(config.scope), decision, valid_T, None if wider_YE is None else wider_YE[y])
                    for y, decision in enumerate(decisions)
                ]
            return known_loads[config.key]

        batch = RoutedBatch(decisions, context, loads, sets, self.mean_over_ranks, list(outputs_TKM))
        loss = torch.zeros((), device=counts_YE.device)
        values = {}
        for label, balancer in self._labelled():
            term = balancer.loss(batch)
            if term is not None:
                loss = loss + balancer.coefficient(context.step) * len(decisions) * term
                values[label] = term.detach()
            balancer.observe(batch)
        return BalanceTerms(loss, values)

    def finish_step(self) -> StepTotals:
        """Completes an optimizer step, and updates the balancers."""
        totals, windows = self.close_step()
        completed = CompletedStep(totals.counts_YE, totals.tokens, windows, self.mean_over_ranks)
        for _, balancer in self._labelled():
            balancer.finish_step(completed)
        return totals

    def selection_bias_YE(self) -> Tensor | None:
        """Returns the sum of the balancers' biases, float32 [Y, E]; None if no balancer sets one."""
        biases = [bias for _, balancer in self._labelled() if (bias := balancer.selection_bias_YE()) is not None]
        return torch.stack(biases).sum(0) if biases else None

    def _labelled(self) -> list[tuple[str, Balancer]]:
        return [(label, module) for label, module in self.balancers.items() if isinstance(module, Balancer)]
