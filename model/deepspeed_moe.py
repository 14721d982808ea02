"""DeepSpeed's MoE layer with our decisions and experts in it. The only file that touches DeepSpeed's private parts
(pinned to 0.19.8).

DeepSpeed's are the expert-parallel groups, the gradients of expert parameters (``allreduce = False``), their ZeRO
partitions and checkpoint files, and in the ``capacity`` path the buffers and both all-to-alls. The layer itself and the
``dropless`` path are those of :mod:`moe_testbed.model.moe`.

Shape legend: T tokens, K choices, M model width.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from moe_testbed.model.config import MoEConfig
from moe_testbed.model.dispatch import place_in_slots
from moe_testbed.model.experts import GroupedExperts
from moe_testbed.model.moe import MoELayer, MoEOutput, run_experts
from moe_testbed.routing.records import NO_EXPERT, RoutingDecision


def _import_deepspeed() -> Any:
    """Imports DeepSpeed without its autotuner's MLflow (which doubles the time), without torch's compiler, and without
    compiling operators on a CPU.

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
    _leave_out_compiler()
    return deepspeed


def _leave_out_compiler() -> None:
    """Lets a training do without torch's compiler, which takes 2 s to import and 110 MB.

    DeepSpeed's ZeRO compiles a function of Muon, an optimizer that nothing here uses. The methods of torch's optimizers
    import the compiler to be left alone by it; what they wrap is left alone anyway, as nothing compiles it.
    """
    with mock.patch.object(torch, "compile", lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        setattr(Optimizer, name, inspect.unwrap(getattr(Optimizer, name)))
    # The wrapper of this one also turns gradients off.
    Adam.step = torch.no_grad()(inspect.unwrap(Adam.step))  # type: ignore[method-assign]


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


class DecisionGate(nn.Module):
    """Stands where DeepSpeed's layer expects its gate, and turns a decision already made into what that layer reads.
    The decision must be free of zero-computation experts.

    Tokens over an expert's capacity are dropped, see :func:`~moe_testbed.model.dispatch.place_in_slots` and
    :meth:`~moe_testbed.model.config.MoEConfig.expert_capacity`.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:
        """DeepSpeed hands over the expert-parallel group; a gate that makes no decision needs none."""

    def forward(self, x_TM: Tensor, decision: RoutingDecision, sparse_routes: bool, use_tutel: bool) -> tuple[Any, ...]:
        """DeepSpeed's sparse routes; its place for a gate loss carries the mask of kept assignments instead, bool [T,
        K], and that of its expert counts, which nobody reads, is empty."""
        ids_TK, experts = decision.expert_ids_TK, self.config.num_ffn_experts
        capacity = self.config.expert_capacity(len(ids_TK))
        kept_TK, slot_TK = place_in_slots(ids_TK, experts, capacity)
        routes_TK = ids_TK.where(kept_TK, NO_EXPERT).to(torch.int32)
        return kept_TK, capacity, experts, routes_TK.t(), slot_TK.to(torch.int32).t(), decision.weights_TK.t(), None


class DispatchingLayer(MOELayer):
    """DeepSpeed's layer, and beside its buffers the dropless path.

    Attributes:
        drops: the buffers are used, and what overflows them is dropped.
        keep_outputs: what each choice contributed is returned, too; by the dropless path only.
    """

    drops: bool
    keep_outputs: bool

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks over which the experts are spread; None for one process."""
        return self.ep_group if self.ep_size > 1 else None

    def forward(self, *inputs: Any, **unused: Any) -> MoEOutput:
        """Runs the experts with a feed-forward layer."""
        hidden_BLM, decision = inputs
        if self.drops:
            return MoEOutput(super().forward(hidden_BLM, decision), self.l_aux)
        return run_experts(hidden_BLM, decision, self.experts, self.group, self.keep_outputs)


class RoutedMoE(MoELayer, MoE):
    """:class:`~moe_testbed.model.moe.MoELayer` as DeepSpeed's engine and checkpoints find it: by its class. Its experts
    may be spread over several ranks."""

    ep_size: int

    def __init__(
        self, hidden_size: int, config: MoEConfig, expert_parallel_size: int = 1, keep_outputs: bool = False
    ) -> None:
        MoE.__init__(self, hidden_size, nn.Identity(), num_experts=config.num_ffn_experts, ep_size=expert_parallel_size)
        self._add_experts(hidden_size, config, expert_parallel_size, keep_outputs)

    def _way_to(self, experts: GroupedExperts, config: MoEConfig, keep_outputs: bool) -> nn.Module:
        way = DispatchingLayer(
            DecisionGate(config), experts, self.expert_group_name, self.ep_size, self.num_local_experts
        )
        way.drops, way.keep_outputs = config.dispatch == "capacity", keep_outputs
        return way

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks over which the experts are spread; None for one process."""
        group: dist.ProcessGroup | None = self.deepspeed_moe.group
        return group

    @property
    def first_expert(self) -> int:
        """Number of this rank's first expert: DeepSpeed gives consecutive ranks consecutive experts."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        return (rank % self.ep_size) * self.num_local_experts
