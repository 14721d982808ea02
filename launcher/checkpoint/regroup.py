"""Continues a checkpoint on another number of ranks, or with the experts spread over another number of them.

DeepSpeed loads the weights in any layout, since it keeps every expert in a file of its own, but the optimizer's state
(with ZeRO: the weights in float32, too) only in the layout that wrote it. Its universal checkpoints know no experts
that are spread over ranks. So here each rank takes what it needs from all the old ranks' files, and hands it to the
optimizer in the form in which the optimizer itself would have saved it.

A parameter is treated as one flat row of numbers, and the parameters of all experts as one row, one expert after
another. Ranks hold pieces of the row, in the order that `RankLayout.holders` gives. To regroup a checkpoint is to copy
from one row of pieces to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_testbed.launcher.checkpoint.files import MODULE, read_file
from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.launcher.ranks.ranks import Ranks

_MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHTS = "weights"


@dataclass(frozen=True)
class RankLayout:
    """How a model is spread over ranks.

    Attributes:
        ranks: number of processes.
        expert_parallel_size: number of them that share out the experts.
    """

    ranks: int
    expert_parallel_size: int

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks} and expert_parallel_size {self.expert_parallel_size}"

    def holders(self, is_expert: bool) -> list[int]:
        """Returns the ranks in the order of the pieces that ZeRO gives them: consecutive ranks hold consecutive
        experts, and the ranks that hold the same experts share them out in the order of their numbers."""
        shares = self.expert_parallel_size if is_expert else 1
        return [rank for first in range(shares) for rank in range(first, self.ranks, shares)]


@torch.no_grad()
def regroup(engine: Any, checkpoint: Path, written: RankLayout, present: RankLayout, ranks: Ranks) -> None:
    """Gives this rank its part of the optimizer's state; called on all ranks after the weights are loaded.

    Every file is mapped, and of each parameter only this rank's part is copied.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the model.
    """
    if engine.zero_optimization():
        _regroup_partitions(engine, checkpoint, written, present, ranks)
    else:
        _regroup_parameters(engine, checkpoint, written, present, ranks)


def _regroup_partitions(engine: Any, checkpoint: Path, written: RankLayout, present: RankLayout, ranks: Ranks) -> None:
    """Regroups what ZeRO 1 and 2 save: each rank's optimizer holds one flat partition per group, cut without regard to
    parameters."""
    experts = _experts(engine.module)
    old = [_Partitions(state) for state in _saved_partitions(checkpoint, written)]
    state = engine.optimizer.state_dict()
    lengths_with_padding = [group["params"][0].numel() for group in engine.optimizer.param_groups]
    for group, partition in enumerate(state["single_partition_of_fp32_groups"]):
        # Moments are saved with the padding at a partition's end, and ZeRO's weights without it.
        moments = {key: partition.new_zeros(lengths_with_padding[group]) for key in _MOMENTS}
        state["base_optimizer_state"]["state"][group] = {"step": old[0].step.clone(), **moments}
    new = _Partitions(state)
    lengths = [new.lengths()] * ranks.size
    if ranks.group is not None:
        dist.all_gather_object(lengths, new.lengths(), group=ranks.group)
    for name in new.places:
        holders = present.holders(name in experts)
        start = sum(lengths[rank].get(name, 0) for rank in holders[: holders.index(ranks.rank)])
        for key in (_WEIGHTS, *_MOMENTS):
            (target,) = new.pieces(name, key)
            pieces = [piece for rank in written.holders(name in experts) for piece in old[rank].pieces(name, key)]
            _copy(pieces, start, target, f"{checkpoint}: {key} of {name}")
    # It reads the entry of its own rank.
    engine.optimizer.load_state_dict([state] * present.ranks, load_from_fp32_weights=True)


class _Partitions:
    """The state that one rank's ZeRO optimizer saves.

    Attributes:
        places: name of each parameter of which the rank holds numbers -> group, and slice of that group's partition.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._weights = state["single_partition_of_fp32_groups"]
        self._moments = state["base_optimizer_state"]["state"]
        self.places = {
            name: (group, slice(address.start, address.start + address.numel))
            for group, mapping in enumerate(state["param_slice_mappings"])
            for name, address in mapping.items()
        }

    @property
    def step(self) -> Tensor:
        """The number of updates so far, the same for all parameters."""
        step: Tensor = self._moments[0]["step"]
        return step

    def lengths(self) -> dict[str, int]:
        """Returns how many numbers of each parameter the rank holds."""
        return {name: place.stop - place.start for name, (_, place) in self.places.items()}

    def pieces(self, name: str, key: str) -> list[Tensor]:
        """Returns this rank's numbers of a parameter, as a view: one piece, or none."""
        if name not in self.places:
            return []
        group, place = self.places[name]
        return [(self._weights[group] if key == _WEIGHTS else self._moments[group][key])[place]]


def _saved_partitions(checkpoint: Path, written: RankLayout) -> list[Mapping[str, Any]]:
    states = []
    for rank in range(written.ranks):
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        # In bfloat16 the name has a prefix.
        path = next(iter(checkpoint.glob(f"*{name}")), checkpoint / name)
        states.append(read_file(path, weights_only=False)["optimizer_state_dict"])
    return states


def _regroup_parameters(engine: Any, checkpoint: Path, written: RankLayout, present: RankLayout, ranks: Ranks) -> None:
    """Regroups what torch's own optimizer saves, with ZeRO 0. It numbers the parameters in an order that no layout
    changes, and each of the ranks that share out the experts has written the state of its own experts."""
    names, experts = {parameter: name for name, parameter in engine.module.named_parameters()}, _experts(engine.module)
    files = [f"expp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(written.expert_parallel_size)]
    if not experts:
        files = [MODULE]
    old = [read_file(checkpoint / file, weights_only=False)["optimizer"]["state"] for file in files]
    state = engine.optimizer.state_dict()
    parameters = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        is_expert = names[parameter] in experts
        holders = old if is_expert else old[:1]
        start = ranks.rank % present.expert_parallel_size * parameter.numel() if is_expert else 0
        state["state"][number] = {"step": old[0][number]["step"]}
        for key in _MOMENTS:
            target = state["state"][number][key] = torch.zeros_like(parameter)
            pieces = [holder[number][key].flatten() for holder in holders]
            _copy(pieces, start, target.view(-1), f"{checkpoint}: {key} of {names[parameter]}")
    engine.optimizer.load_state_dict(state)


def _experts(module: nn.Module) -> set[str]:
    """Returns the names of the parameters that are spread over ranks, which are marked as DeepSpeed wants it."""
    return {name for name, parameter in module.named_parameters() if not getattr(parameter, "allreduce", True)}


def _copy(pieces: list[Tensor], start: int, target: Tensor, what: str) -> None:
    """Fills a flat tensor with the numbers from ``start`` on of the row of pieces."""
    stop, place, copied = start + target.numel(), 0, 0
    for piece in pieces:
        first, last = max(start, place), min(stop, place + piece.numel())
        if first < last:
            target[first - start : last - start].copy_(piece[first - place : last - place])
            copied += last - first
        place += piece.numel()
    if copied != target.numel():
        raise CheckpointError(
            f"{what}: {place:,} numbers are there, and the model needs those up to {stop:,}; the checkpoint is not of "
            "this model"
        )
