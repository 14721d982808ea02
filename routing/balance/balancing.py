"""All balancers of a model together, with the counts that they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from moe_testbed.routing.load import Load, TokenSets, count_assignments, load_in_sets, token_sets
from moe_testbed.routing.records import RoutingContext, RoutingDecision
from moe_testbed.routing.router import KeepsBufferDtype
from moe_testbed.routing.scopes import Counts, Estimator, Scope, ScopeConfig


@dataclass(frozen=True)
class BalanceTerms:
    """What the balancers add to one micro-batch.

    Attributes:
        loss: sum over balancers and layers of coefficient times loss, scalar.
        values: mean over layers of each balancer's loss before its coefficient, by label, without gradient.
    """

    loss: Tensor
    values: dict[str, Tensor]


@dataclass(frozen=True)
class StepTotals:
    """A completed optimizer step over all ranks and micro-batches.

    Attributes:
        counts_YE: assignments, int64.
        tokens: tokens without padding, int64 scalar.
    """

    counts_YE: Tensor
    tokens: Tensor


class Balancing(KeepsBufferDtype):
    """Runs the balancers of a config over the layers' decisions.

    Counts are taken once per micro-batch for all layers, and cross the ranks in one all-reduce of Y x E + 1 integers:
    per micro-batch where a balancer needs the other ranks' counts at once, else per optimizer step. They come from the
    decisions that the model's forward returns, so recomputing a layer in the backward pass counts nothing twice.

    Args:
        configs: label -> config of the balancer.
        num_layers: Y, layers that decide.
        num_experts: E.
        top_k: K, experts that a token uses, or is to use on average.
        data_parallel_group: the ranks over which the batch is spread; None for one process.
    """

    step_counts_YE: Tensor
    step_tokens: Tensor
    counts_ahead_YE: Tensor
    previous_counts_YE: Tensor

    def __init__(
        self,
        configs: Mapping[str, BalancerConfig],
        num_layers: int,
        num_experts: int,
        top_k: int,
        data_parallel_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.group = data_parallel_group
        self.num_experts = num_experts
        self.balancers = nn.ModuleDict(
            {
                label: BALANCERS.get(config.name)(config, num_layers, num_experts, top_k)
                for label, config in configs.items()
            }
        )
        counts_YE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        # Checkpoints are taken between optimizer steps, where the counts of the running step are zero.
        self.register_buffer("step_counts_YE", counts_YE, persistent=False)
        self.register_buffer("step_tokens", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("counts_ahead_YE", counts_YE.clone(), persistent=False)
        self.register_buffer("previous_counts_YE", counts_YE.clone())
        scoped = [config for config in configs.values() if isinstance(config, ScopedBalancerConfig)]
        self._windows = sorted({c.window_steps for c in scoped if c.scope is Scope.WINDOW})
        for steps in self._windows:
            self.register_buffer(f"window_{steps}_counts_YE", counts_YE.double())
        self._reads = {balancer.reads_counts for _, balancer in self._labelled()}
        self._earlier_counts_are_known = False
        self._counts_ahead_are_known = False
        self._step_is_reduced = False

    @property
    def reads_counts_ahead(self) -> bool:
        """A balancer reads the counts of the whole step: :meth:`begin_step` must tell them."""
        return Counts.AHEAD in self._reads

    def begin_step(self, micro_batches: Iterable[tuple[list[RoutingDecision], Tensor | None]]) -> None:
        """Counts the step ahead.

        Args:
            micro_batches: decisions of the layers, and which tokens are no padding, of all of this rank's
                micro-batches.
        """
        counts_YE = torch.zeros_like(self.step_counts_YE)
        for decisions, valid_T in micro_batches:
            counts_YE += self._count(decisions, valid_T)
        self.counts_ahead_YE.copy_(self._sum_over_ranks(counts_YE))
        self._counts_ahead_are_known = True

    def forward(
        self, decisions: list[RoutingDecision], context: RoutingContext, outputs_TKM: Sequence[Tensor] = ()
    ) -> BalanceTerms:
        """Losses of one training micro-batch; its assignments are added to the step's counts.

        Args:
            outputs_TKM: see :class:`RoutedBatch`.
        """
        valid_T = context.valid_T
        counts_YE = self._count(decisions, valid_T)
        tokens = torch.as_tensor(context.token_ids_BL.numel(), device=counts_YE.device)
        tokens = tokens if valid_T is None else valid_T.sum()
        # All micro-batches of a step alike: what is known changes between steps.
        self._step_is_reduced = self._other_ranks_are_needed()
        if self._step_is_reduced:
            counts_YE, tokens = self._totals_over_ranks(counts_YE, tokens)
        self.step_counts_YE += counts_YE
        self.step_tokens += tokens

        known_sets: dict[Scope, TokenSets] = {}
        known_loads: dict[tuple[Scope, Estimator, int], list[Load]] = {}

        def sets(scope: Scope) -> TokenSets:
            if scope not in known_sets:
                known_sets[scope] = token_sets(scope, context)
            return known_sets[scope]

        def loads(config: ScopeConfig) -> list[Load]:
            if config.key not in known_loads:
                wider_YE = self._wider_counts(config, counts_YE)
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
        """Closes an optimizer step: updates the balancers, and moves the step's counts to the previous ones and into
        the windows."""
        counts_YE, tokens = self.step_counts_YE, self.step_tokens
        if not self._step_is_reduced:
            counts_YE, tokens = self._totals_over_ranks(counts_YE, tokens)
        totals = StepTotals(counts_YE.clone(), tokens.clone())
        for steps in self._windows:
            window_YE = self._window(steps)
            newest_YE = totals.counts_YE.double()
            averaged_YE = window_YE + (newest_YE - window_YE) / steps
            window_YE.copy_(torch.where(window_YE.any(), averaged_YE, newest_YE))
        windows = {steps: self._window(steps) for steps in self._windows}
        completed = CompletedStep(totals.counts_YE, totals.tokens, windows, self.mean_over_ranks)
        for _, balancer in self._labelled():
            balancer.finish_step(completed)
        self.previous_counts_YE.copy_(totals.counts_YE)
        self.step_counts_YE.zero_()
        self.step_tokens.zero_()
        self._counts_ahead_are_known = False
        self._step_is_reduced = False
        return totals

    def selection_bias_YE(self) -> Tensor | None:
        """Sum of the balancers' biases, float32 [Y, E]; None if no balancer sets one."""
        biases = [bias for _, balancer in self._labelled() if (bias := balancer.selection_bias_YE()) is not None]
        return torch.stack(biases).sum(0) if biases else None

    def _labelled(self) -> list[tuple[str, Balancer]]:
        return [(label, module) for label, module in self.balancers.items() if isinstance(module, Balancer)]

    def _count(self, decisions: list[RoutingDecision], valid_T: Tensor | None) -> Tensor:
        return torch.stack(
            [count_assignments(decision.expert_ids_TK, self.num_experts, valid_T) for decision in decisions]
        )

    def _window(self, steps: int) -> Tensor:
        return self.get_buffer(f"window_{steps}_counts_YE")

    def _other_ranks_are_needed(self) -> bool:
        """A balancer reads, in this micro-batch, the counts of what the other ranks are running."""
        if Counts.NOW in self._reads:
            return True
        if Counts.AHEAD in self._reads and not self._counts_ahead_are_known:
            return True
        if Counts.EARLIER not in self._reads:
            return False
        # Asked until it is so: a GPU waits for the answer in the first step only.
        self._earlier_counts_are_known = self._earlier_counts_are_known or bool(self.previous_counts_YE.any())
        return not self._earlier_counts_are_known

    def _wider_counts(self, config: ScopeConfig, counts_YE: Tensor) -> Tensor | None:
        """Counts over the balance set where it is wider than a rank's micro-batch, [Y, E]."""
        if config.counts is None:
            return None
        if config.scope is Scope.DATA_PARALLEL:
            return counts_YE
        if config.counts is Counts.AHEAD and self._counts_ahead_are_known:
            return self.counts_ahead_YE
        if config.counts is not Counts.EARLIER:
            return self.step_counts_YE
        earlier_YE = self._window(config.window_steps) if config.scope is Scope.WINDOW else self.previous_counts_YE
        # The first step has no earlier one. Asking Python for it would make a GPU wait.
        return torch.where(earlier_YE.any(), earlier_YE, self.step_counts_YE)

    def _totals_over_ranks(self, counts_YE: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.group is None:
            return counts_YE, tokens
        summed = self._sum_over_ranks(torch.cat([counts_YE.reshape(-1), tokens.reshape(1)]))
        return summed[:-1].view_as(counts_YE), summed[-1]

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
        return values

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Mean of a tensor over the data-parallel ranks, without gradient."""
        values = values.detach()
        return values if self.group is None else self._sum_over_ranks(values) / dist.get_world_size(self.group)
