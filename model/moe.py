"""The mixture-of-experts layer: experts that carry out decisions made outside, without anything of DeepSpeed.

Shape legend: B sequences, L positions, T = B * L tokens, K choices, E experts, M model width, F feed-forward width, X
zero-computation experts, e experts of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from moe_testbed.model.config import MoEConfig
from moe_testbed.model.dispatch import (
    combine_rows,
    gather_rows,
    gather_weights,
    outputs_by_choice,
    place_in_slots,
    plan_dispatch,
    plan_exchange,
    return_rows,
    send_rows,
)
from moe_testbed.model.experts import GroupedExperts
from moe_testbed.model.zero_computation import ZeroComputation
from moe_testbed.routing.records import NO_EXPERT, RoutingDecision


@dataclass(frozen=True)
class MoEOutput:
    """What an MoE layer returns.

    Attributes:
        hidden_BLM: sum of each token's weighted expert outputs.
        kept_TK: assignments that reached their expert, bool; False where there is no expert.
        outputs_TKM: the summands, 0 where there is no expert; None unless they are kept.
    """

    hidden_BLM: Tensor
    kept_TK: Tensor
    outputs_TKM: Tensor | None = None


def run_experts(
    hidden_BLM: Tensor,
    decision: RoutingDecision,
    experts: GroupedExperts,
    group: dist.ProcessGroup | None,
    keep_outputs: bool = False,
) -> MoEOutput:
    """Takes steps 2 to 4 of :class:`MoELayer` without any drop: rows sorted by expert, none dropped, none padded.

    Args:
        decision: choices among the experts with a feed-forward layer.
        experts: those of this rank.
        group: the ranks over which the experts are spread; None for one process.
        keep_outputs: the output of every choice is returned, too.
    """
    x_TM = hidden_BLM.flatten(0, 1)
    num_experts = experts.num_experts * (1 if group is None else dist.get_world_size(group))
    # 2. Dispatch.
    plan = plan_dispatch(decision.expert_ids_TK, num_experts)
    rows, weights = gather_rows(x_TM, plan), gather_weights(decision.weights_TK, plan)
    # 3. Experts, on the ranks that hold them.
    if group is None:
        rows = experts.grouped(rows, plan.counts_E, weights)
    else:
        exchange = plan_exchange(plan.counts_E, group)
        rows, weights = send_rows(rows, exchange), send_rows(weights, exchange)
        rows = return_rows(experts.grouped(rows, exchange.counts_e, weights), exchange)
    # 4. Combine.
    outputs_TKM = outputs_by_choice(rows, plan) if keep_outputs else None
    return MoEOutput(combine_rows(rows, plan).view(hidden_BLM.shape), decision.expert_ids_TK != NO_EXPERT, outputs_TKM)


class LocalExperts(nn.Module):
    """All experts with a feed-forward layer in one process, and the way to them and back.

    Attributes:
        drops: assignments over an expert's capacity are dropped.
    """

    def __init__(self, experts: GroupedExperts, config: MoEConfig, keep_outputs: bool) -> None:
        super().__init__()
        self.experts, self.config, self.keep_outputs = experts, config, keep_outputs
        self.drops = config.dispatch == "capacity"

    def forward(self, hidden_BLM: Tensor, decision: RoutingDecision) -> MoEOutput:
        """Runs them."""
        if self.drops:
            ids_TK = decision.expert_ids_TK
            kept_TK, _ = place_in_slots(ids_TK, self.config.num_ffn_experts, self.config.expert_capacity(len(ids_TK)))
            decision = replace(decision, expert_ids_TK=ids_TK.where(kept_TK, NO_EXPERT))
        return run_experts(hidden_BLM, decision, self.experts, None, self.keep_outputs)


class MoELayer(nn.Module):
    """Experts that carry out decisions made outside, in four steps.

    1. Decision: the router's. Choices of zero-computation experts are taken out of it and answered on the spot.
    2. Dispatch: the other assignments are sorted by expert, and sent to the ranks that hold these experts.
    3. Experts: each expert runs on its rows, which are weighted.
    4. Combine: the rows come back, and those of each token are summed.

    Decisions may be of any width K >= 1, with ``NO_EXPERT`` and weight 0 where a token uses fewer experts. Experts are
    numbered as in :attr:`MoEConfig.num_routed_experts`. As it stands here the layer runs in one process; with experts
    spread over several ranks it can be built and counted, and :mod:`moe_testbed.model.deepspeed_moe` runs it.

    Args:
        hidden_size: M.
        config: experts and dispatch.
        expert_parallel_size: ranks over which the experts are spread.
        keep_outputs: what each choice contributed is returned, too.

    Raises:
        ValueError: outputs are to be kept from capacity dispatch, which adds them up in its buffers.
    """

    deepspeed_moe: Any

    def __init__(
        self, hidden_size: int, config: MoEConfig, expert_parallel_size: int = 1, keep_outputs: bool = False
    ) -> None:
        super().__init__()
        self._add_experts(hidden_size, config, expert_parallel_size, keep_outputs)

    def _add_experts(self, hidden_size: int, config: MoEConfig, expert_parallel_size: int, keep_outputs: bool) -> None:
        if keep_outputs and config.dispatch == "capacity":
            raise ValueError(
                "model.moe.dispatch is capacity, but a balancer needs each expert's output by itself, which only the "
                "other path has; set model.moe.dispatch to dropless"
            )
        self.num_ffn_experts, self.choices = config.num_ffn_experts, config.choices
        self.num_local_experts = config.num_ffn_experts // expert_parallel_size
        experts = GroupedExperts(
            self.num_local_experts, hidden_size, config.expert_size, f"ep_size_{expert_parallel_size}"
        )
        # DeepSpeed's checkpoints find experts by this name.
        self.deepspeed_moe = self._way_to(experts, config, keep_outputs)
        self.zero_computation: ZeroComputation | None = None
        if config.num_zero_computation_experts:
            self.zero_computation = ZeroComputation(
                hidden_size, config.num_zero_experts, config.num_copy_experts, config.num_constant_experts
            )

    def _way_to(self, experts: GroupedExperts, config: MoEConfig, keep_outputs: bool) -> nn.Module:
        """Steps 2 to 4, with the experts as their attribute ``experts``."""
        return LocalExperts(experts, config, keep_outputs)

    @property
    def experts(self) -> GroupedExperts:
        """The experts that this rank holds."""
        experts: GroupedExperts = self.deepspeed_moe.experts
        return experts

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks over which the experts are spread; None for one process."""
        return None

    @property
    def first_expert(self) -> int:
        """The number that this rank's first expert has."""
        return 0

    def forward(self, hidden_BLM: Tensor, decision: RoutingDecision) -> MoEOutput:
        """Runs the experts."""
        if self.zero_computation is None:
            output: MoEOutput = self.deepspeed_moe(hidden_BLM, decision)
            return output
        # 1. Decision.
        numbers_TK = decision.expert_ids_TK - self.num_ffn_experts
        free_TK = numbers_TK >= 0
        computed = replace(
            decision,
            expert_ids_TK=decision.expert_ids_TK.where(~free_TK, NO_EXPERT),
            weights_TK=decision.weights_TK.where(~free_TK, 0.0),
        )
        # 2 to 4, of the experts that compute.
        output = self.deepspeed_moe(hidden_BLM, computed)
        x_TM, weights_TK = hidden_BLM.flatten(0, 1), decision.weights_TK
        kept_TK = output.kept_TK | free_TK
        if output.outputs_TKM is None:
            weights_TX = self.zero_computation.weights_by_number(numbers_TK, weights_TK)
            added_TM = self.zero_computation(x_TM, weights_TX)
            return MoEOutput(output.hidden_BLM + added_TM.view_as(hidden_BLM), kept_TK)
        # Every choice by itself: as if each were a token's only one.
        weights_TKX = self.zero_computation.weights_by_number(numbers_TK[..., None], weights_TK[..., None])
        added_TKM = self.zero_computation(x_TM, weights_TKX)
        hidden_BLM = output.hidden_BLM + added_TKM.sum(1).view_as(hidden_BLM)
        return MoEOutput(hidden_BLM, kept_TK, output.outputs_TKM + added_TKM)
