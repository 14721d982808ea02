"""The counts of assignments that all balancers of a model share.

Shape legend: Y MoE layers, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_testbed.routing.load import count_assignments
from moe_testbed.routing.records import RoutingContext, RoutingDecision
from moe_testbed.routing.router import KeepsBufferDtype
from moe_testbed.routing.scopes import Counts, Scope, ScopeConfig


@dataclass(frozen=True)
class StepTotals:
    """A completed optimizer step over all ranks and micro-batches.

    Attributes:
        counts_YE: assignments, int64.
        tokens: tokens without padding, int64 scalar.
    """

    counts_YE: Tensor
    tokens: Tensor


class SharedCounts(KeepsBufferDtype):
    """Counts once per micro-batch for all layers.

    Counts cross the ranks in one all-reduce of Y x E + 1 integers: per micro-batch where a balancer needs the other
    ranks' counts at once, else per optimizer step. They come from the decisions that the model's forward returns, so
    recomputing a layer in the backward pass counts nothing twice.

    Args:
        num_layers: Y, layers that decide.
        num_experts: E.
        reads: the counts that the balancers read.
        windows: lengths of the moving averages that they read, in optimizer steps.
        data_parallel_group: the ranks over which the batch is spread; None for one process.
    """

    step_counts_YE: Tensor
    step_tokens: Tensor
    counts_ahead_YE: Tensor
    previous_counts_YE: Tensor

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        reads: Collection[Counts | None],
        windows: Collection[int],
        data_parallel_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.group = data_parallel_group
        self.num_experts = num_experts
        counts_YE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        # Checkpoints are taken between optimizer steps, where the counts of the running step are zero.
        self.register_buffer("step_counts_YE", counts_YE, persistent=False)
        self.register_buffer("step_tokens", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("counts_ahead_YE", counts_YE.clone(), persistent=False)
        self.register_buffer("previous_counts_YE", counts_YE.clone())
        self._windows = sorted(windows)
        for steps in self._windows:
            self.register_buffer(f"window_{steps}_counts_YE", counts_YE.double())
        self._reads = set(reads)
        self._earlier_counts_are_known = False
        self._counts_ahead_are_known = False
        self._step_is_reduced = False

    @property
    def reads_counts_ahead(self) -> bool:
        """Whether a balancer reads the counts of the whole step, which :meth:`begin_step` takes."""
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

    def add_micro_batch(self, decisions: list[RoutingDecision], context: RoutingContext) -> Tensor:
        """Adds a training micro-batch to the step's counts.

        Returns:
            Its assignments, int64 [Y, E]: of all ranks where a balancer needs them at once, else of this rank.
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
        return counts_YE

    def wider_counts(self, config: ScopeConfig, counts_YE: Tensor) -> Tensor | None:
        """Returns the counts over a balance set, [Y, E]; None where it is not wider than a rank's micro-batch.

        Args:
            counts_YE: what :meth:`add_micro_batch` has returned.
        """
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

    def close_step(self) -> tuple[StepTotals, dict[int, Tensor]]:
        """Moves the step's counts to the previous ones and into the moving averages.

        Returns:
            The completed step, and the moving averages with it, float64 [Y, E], by their lengths.
        """
        counts_YE, tokens = self.step_counts_YE, self.step_tokens
        if not self._step_is_reduced:
            counts_YE, tokens = self._totals_over_ranks(counts_YE, tokens)
        totals = StepTotals(counts_YE.clone(), tokens.clone())
        for steps in self._windows:
            window_YE = self._window(steps)
            newest_YE = totals.counts_YE.double()
            averaged_YE = window_YE + (newest_YE - window_YE) / steps
            window_YE.copy_(torch.where(window_YE.any(), averaged_YE, newest_YE))
        self.previous_counts_YE.copy_(totals.counts_YE)
        self.step_counts_YE.zero_()
        self.step_tokens.zero_()
        self._counts_ahead_are_known = False
        self._step_is_reduced = False
        return totals, {steps: self._window(steps) for steps in self._windows}

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Returns the mean of a tensor over the data-parallel ranks, without gradient."""
        values = values.detach()
        return values if self.group is None else self._sum_over_ranks(values) / dist.get_world_size(self.group)

    def _count(self, decisions: list[RoutingDecision], valid_T: Tensor | None) -> Tensor:
        return torch.stack(
            [count_assignments(decision.expert_ids_TK, self.num_experts, valid_T) for decision in decisions]
        )

    def _window(self, steps: int) -> Tensor:
        return self.get_buffer(f"window_{steps}_counts_YE")

    def _other_ranks_are_needed(self) -> bool:
        """Tells whether a balancer reads, in this micro-batch, the counts of what the other ranks are running."""
        if Counts.NOW in self._reads:
            return True
        if Counts.AHEAD in self._reads and not self._counts_ahead_are_known:
            return True
        if Counts.EARLIER not in self._reads:
            return False
        # Asked until it is so: a GPU waits for the answer in the first step only.
        self._earlier_counts_are_known = self._earlier_counts_are_known or bool(self.previous_counts_YE.any())
        return not self._earlier_counts_are_known

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
