"""DeepSpeed's MoE layer with our routers in it. The only file that touches DeepSpeed's private parts (pinned to
0.19.8).

What is DeepSpeed's: the expert-parallel groups, the gradients of expert parameters (``allreduce = False``), their ZeRO
partitions and checkpoint files, and in the ``capacity`` path the buffers and both all-to-alls. What is ours: the
routing decision, which is made before the layer and handed to it, and in the ``dropless`` path the way of the tokens to
the experts and back.

Shape legend: B sequences, L positions, T = B * L tokens, K choices, E experts, M model width, F feed-forward width, X
zero-computation experts, e experts of a rank.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_testbed.model.config import MoEConfig
from moe_testbed.model.dispatch import (
    combine_rows,
    gather_rows,
    gather_weights,
    outputs_by_choice,
    plan_dispatch,
    plan_exchange,
    return_rows,
    send_rows,
)
from moe_testbed.model.experts import GroupedExperts
from moe_testbed.model.zero_computation import ZeroComputation
from moe_testbed.routing.records import NO_EXPERT, RoutingDecision


def _import_deepspeed() -> Any:
    """Imports DeepSpeed without its autotuner's MLflow (which doubles the time) and without compiling operators on a
    CPU.

    On a CPU the first ``init_distributed`` would compile a shared-memory operator: it needs a compiler, takes minutes,
    and hangs for ever on the lock of a build that was killed. gloo does the same work without it.
    """
    without_mlflow = "mlflow" not in sys.modules
    if without_mlflow:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if without_mlflow:
            del sys.modules["mlflow"]
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed


deepspeed = _import_deepspeed()

from deepspeed.moe.layer import MoE  # noqa: E402
from deepspeed.moe.sharded_moe import MOELayer  # noqa: E402
from deepspeed.utils import groups  # noqa: E402


def create_expert_parallel_groups(expert_parallel_size: int) -> None:
    """Makes DeepSpeed's expert-parallel groups, once per process and size, over the process group that torch has
    joined."""
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
    if f"ep_size_{expert_parallel_size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel_size)


def refuse_expert_names(model: nn.Module) -> None:
    """Guards against DeepSpeed's checkpoints, which take every entry with "expert" in its name for an expert's and lose
    the others.

    Raises:
        ValueError: a parameter or buffer outside the experts has such a name.
    """
    for name in model.state_dict():
        if "expert" in name and ".deepspeed_moe.experts." not in name:
            raise ValueError(
                f"'{name}' has 'expert' in its name, and DeepSpeed's checkpoints would lose it; rename the attribute "
                f"(of a router) or the label (of a balancer)"
            )


def refuse_scalars(model: nn.Module) -> None:
    """Guards against DeepSpeed's broadcast of the initial weights, which cannot send a parameter without dimensions.

    Raises:
        ValueError: there is one.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(
                f"the parameter '{name}' has no dimensions, and DeepSpeed cannot send it between ranks; give it the "
                "shape [1]"
            )


class DecisionGate(nn.Module):
    """Stands where DeepSpeed's layer expects its gate, and turns a decision already made into what that layer reads.
    The decision must be free of zero-computation experts.

    Tokens over an expert's capacity are dropped: first choices have precedence over second ones, earlier tokens over
    later ones (GShard, arXiv 2006.16668, algorithm 1). The capacity is ``ceil(capacity_factor * K * T / E)`` with the
    configured K, also where tokens choose more experts or fewer, and with E including the zero-computation experts:
    factor 1 is the load of each expert when all of them are used alike, whatever they compute.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:
        """DeepSpeed hands over the expert-parallel group; a gate that makes no decision needs none."""

    def forward(self, x_TM: Tensor, decision: RoutingDecision, sparse_routes: bool, use_tutel: bool) -> tuple[Any, ...]:
        """DeepSpeed's sparse routes; its place for a gate loss carries the mask of kept assignments instead, bool [T,
        K]."""
        ids_TK, config = decision.expert_ids_TK, self.config
        T, K = ids_TK.shape
        capacity = max(1, math.ceil(config.capacity_factor * config.choices * T / config.num_routed_experts))
        ids_KT = ids_TK.t()
        flat = ids_KT.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat - NO_EXPERT, minlength=config.num_ffn_experts + 1)
        first_row = counts.cumsum(0) - counts
        location = torch.empty_like(order)
        location[order] = torch.arange(K * T, device=order.device) - first_row[flat[order] - NO_EXPERT]
        kept_KT = ((location < capacity) & (flat != NO_EXPERT)).view(K, T)
        routes_KT = torch.where(kept_KT, ids_KT, NO_EXPERT).to(torch.int32)
        locations_KT = (location.view(K, T) * kept_KT).to(torch.int32)
        weights_KT = decision.weights_TK.t()
        return kept_KT.t(), capacity, config.num_ffn_experts, routes_KT, locations_KT, weights_KT, counts[1:]


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


class DispatchingLayer(MOELayer):
    """DeepSpeed's layer, and beside its buffers the dropless path: rows sorted by expert, none dropped, none padded.

    Attributes:
        drops: to use the buffers.
        keep_outputs: to return what each choice contributed, too; of the dropless path only.
    """

    drops: bool
    keep_outputs: bool

    def forward(self, *inputs: Any, **unused: Any) -> MoEOutput:
        """Runs the experts with a feed-forward layer."""
        hidden, decision = inputs
        if self.drops:
            return MoEOutput(super().forward(hidden, decision), self.l_aux)
        x_TM = hidden.reshape(-1, hidden.shape[-1])
        # 1. Sort the assignments by expert.
        plan = plan_dispatch(decision.expert_ids_TK, self.ep_size * self.num_local_experts)
        rows, weights = gather_rows(x_TM, plan), gather_weights(decision.weights_TK, plan)
        # 2. Run the experts, on the ranks that hold them.
        if self.ep_size > 1:
            exchange = plan_exchange(plan.counts_E, self.ep_group)
            rows, weights = send_rows(rows, exchange), send_rows(weights, exchange)
            rows = return_rows(self.experts.grouped(rows, exchange.counts_e, weights), exchange)
        else:
            rows = self.experts.grouped(rows, plan.counts_E, weights)
        # 3. Bring the results back.
        outputs_TKM = outputs_by_choice(rows, plan) if self.keep_outputs else None
        y = combine_rows(rows, plan).view(hidden.shape)
        return MoEOutput(y, decision.expert_ids_TK != NO_EXPERT, outputs_TKM)


class RoutedMoE(MoE):
    """DeepSpeed's MoE layer, run with decisions made outside.

    Decisions may be of any width K >= 1, with ``NO_EXPERT`` and weight 0 where a token uses fewer experts. Experts are
    numbered as in :attr:`MoEConfig.num_routed_experts`.

    Args:
        hidden_size: M.
        config: experts and dispatch.
        expert_parallel_size: ranks over which the experts are spread.
        keep_outputs: to return what each choice contributed, too.

    Raises:
        ValueError: outputs are to be kept from capacity dispatch, which adds them up in its buffers.
    """

    def __init__(
        self, hidden_size: int, config: MoEConfig, expert_parallel_size: int = 1, keep_outputs: bool = False
    ) -> None:
        super().__init__(hidden_size, nn.Identity(), num_experts=config.num_ffn_experts, ep_size=expert_parallel_size)
        if keep_outputs and config.dispatch == "capacity":
            raise ValueError(
                "model.moe.dispatch is capacity, but a balancer needs each expert's output by itself, which only the "
                "other path has; set model.moe.dispatch to dropless"
            )
        self.num_ffn_experts = config.num_ffn_experts
        self.deepspeed_moe = DispatchingLayer(
            DecisionGate(config),
            GroupedExperts(self.num_local_experts, hidden_size, config.expert_size, self.expert_group_name),
            self.expert_group_name,
            self.ep_size,
            self.num_local_experts,
        )
        self.deepspeed_moe.drops = config.dispatch == "capacity"
        self.deepspeed_moe.keep_outputs = keep_outputs
        self.zero_computation: ZeroComputation | None = None
        if config.num_zero_computation_experts:
            self.zero_computation = ZeroComputation(
                hidden_size, config.num_zero_experts, config.num_copy_experts, config.num_constant_experts
            )

    @property
    def first_expert(self) -> int:
        """Global number of this rank's first expert: DeepSpeed gives consecutive ranks consecutive experts."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        return (rank % self.ep_size) * self.num_local_experts

    def forward(self, hidden_BLM: Tensor, decision: RoutingDecision) -> MoEOutput:
        """Runs the experts."""
        if self.zero_computation is None:
            return self.deepspeed_moe(hidden_BLM, decision)
        numbers_TK = decision.expert_ids_TK - self.num_ffn_experts
        free_TK = numbers_TK >= 0
        # Only experts that compute take part in the dispatch.
        output = self.deepspeed_moe(
            hidden_BLM,
            replace(
                decision,
                expert_ids_TK=decision.expert_ids_TK.where(~free_TK, NO_EXPERT),
                weights_TK=decision.weights_TK.where(~free_TK, 0.0),
            ),
        )
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

    @torch.no_grad()
    def neurons_EFX(self) -> Tensor:
        """All weights of each neuron of the experts with a feed-forward layer, of all ranks: what its gate reads, what
        it reads, what it writes. [E, F, 3 * M]."""
        experts = self.deepspeed_moe.experts
        gate, up = experts.gate_up.transpose(1, 2).chunk(2, dim=1)
        mine = torch.cat([gate, up, experts.down], dim=-1)
        if self.ep_size == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.ep_size)]
        dist.all_gather(parts, mine, group=self.deepspeed_moe.ep_group)
        return torch.cat(parts)

    @contextmanager
    def without_drops(self) -> Iterator[None]:
        """The dropless path, whatever is configured."""
        drops = self.deepspeed_moe.drops
        self.deepspeed_moe.drops = False
        try:
            yield
        finally:
            self.deepspeed_moe.drops = drops
