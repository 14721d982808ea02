"""What a training step sends, in bytes, and over which links.

What is counted is what DeepSpeed 0.19.8 and our dispatch hand to torch.distributed. How NCCL sends it is taken to be a
ring in the order of ranks for all-reduce and all-gather, and straight for all-to-all. Not counted: the counts of the
balancers, norms and losses, some kB that take no time but their latency; evaluation and checkpoints.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

from moe_testbed.launcher.cluster.config import InterconnectConfig
from moe_testbed.launcher.cluster.layout import Layout
from moe_testbed.launcher.cluster.plan.memory import ELEMENT_SIZES, optimizer_groups
from moe_testbed.launcher.cluster.plan.stacks import PlannedStack, planned_stacks
from moe_testbed.launcher.cluster.plan.weights import Weight
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.sharing import accumulation_steps, micro_batch_size
from moe_testbed.routing.balance.balancer import ScopedBalancerConfig
from moe_testbed.routing.router import Capability
from moe_testbed.routing.scopes import Counts, Scope

_FLOAT, _COUNT = 4, 8
Collective = Literal["all-to-all", "all-reduce", "all-gather"]


@dataclass(frozen=True)
class Traffic:
    """One kind of message, all of it that a step sends.

    Attributes:
        what: what is sent.
        ranks: number of ranks in a group.
        handed: bytes that a rank hands to the collective; for an all-gather, the bytes of the result.
        within, between: bytes that a GPU of the busiest node sends to others of its node, and to other nodes.
        ranks_per_node: which share the node's link to the others.
    """

    what: str
    collective: Collective
    ranks: int
    handed: int
    within: float
    between: float
    ranks_per_node: int

    def seconds(self, interconnect: InterconnectConfig) -> float:
        """Returns the time at the full rate of the slower link, with nothing else going on."""
        within = self.within / (interconnect.within_node_gb_per_s * 1e9)
        return max(within, self.between * self.ranks_per_node / (interconnect.between_nodes_gb_per_s * 1e9))


def planned_traffic(config: ExperimentConfig, weights: list[Weight], layout: Layout) -> list[Traffic]:
    """All that ranks send in one optimizer step in which nothing is frozen any more; nothing where a group has one
    rank.

    Args:
        weights: of one rank.
    """
    stage, element = config.training.zero_stage, ELEMENT_SIZES[config.training.precision]
    accumulation = accumulation_steps(config, layout.world_size)
    everyone = [range(layout.world_size)]
    stacks = planned_stacks(config, micro_batch_size(config, layout.world_size))
    ahead = accumulation > 1 and any(_reads_ahead(stack) for stack in stacks)
    found = []
    for stack in stacks:
        forward = _forward_passes(config, stack, ahead)
        exchanged = accumulation * _exchanged(stack, element, forward)
        pooled = accumulation * forward * _pooled(stack, layout)
        whose = f" of the {stack.name}" if len(stacks) > 1 else ""
        found += [
            _traffic(f"tokens to experts{whose}", "all-to-all", exchanged, layout),
            _traffic(f"scores of a pool{whose}", "all-gather", pooled, layout, everyone),
        ]
    groups = optimizer_groups(weights, layout)
    for name, expert, sharing in (
        ("shared weights", False, everyone),
        ("experts", True, layout.expert_data_parallel_groups),
    ):
        own = [group for group in groups if group.expert == expert]
        numbers = sum(sum(group.sizes) for group in own)
        # ZeRO 2 keeps no gradients of others, so that it must send them after every micro-batch.
        times = accumulation if stage == 2 else 1
        found.append(_traffic(f"gradients of {name}", "all-reduce", numbers * element * times, layout, sharing))
        gathered = sum(group.padded_size for group in own) if stage else 0
        found.append(_traffic(f"updated {name}", "all-gather", gathered * element, layout, sharing))
    return [traffic for traffic in found if traffic.handed and traffic.ranks > 1]


def _reads_ahead(stack: PlannedStack) -> bool:
    """Whether a balancer of the stack has to know how the whole step will be loaded."""
    if stack.is_still or not stack.model.num_moe_layers:
        return False
    scoped = [config for config in stack.routing.balance.values() if isinstance(config, ScopedBalancerConfig)]
    return any(balancer.counts is Counts.AHEAD for balancer in scoped)


def _forward_passes(config: ExperimentConfig, stack: PlannedStack, ahead: bool) -> int:
    """The forward passes of each micro-batch: one, one more to recompute it, and one more to count it ahead."""
    return 1 + (config.training.activation_checkpointing and not stack.is_still) + ahead


def _exchanged(stack: PlannedStack, element: int, forward: int) -> int:
    """Bytes that a rank hands to a stack's all-to-alls for a micro-batch, if all experts are used alike.

    Args:
        element: bytes of a number in the model's precision.
        forward: forward passes of the micro-batch.
    """
    model, moe, backward = stack.model, stack.model.moe, not stack.is_still
    if moe.dispatch == "capacity":
        slots = moe.num_ffn_experts * moe.expert_capacity(stack.tokens)
        of_layer = slots * model.hidden_size * element * 2 * (forward + backward)
    else:
        # There and back; and the weight of each row, which has a gradient if it comes from scores.
        hidden = 2 * model.hidden_size * element * (forward + backward)
        weight = _FLOAT * (forward + (backward and Capability.SCORES in stack.routing.router.provides))
        of_layer = stack.sent_rows * (hidden + weight) + moe.num_ffn_experts * _COUNT * forward
    return of_layer * model.num_moe_layers


def _pooled(stack: PlannedStack, layout: Layout) -> int:
    """Bytes of the scores that a stack's routers gather from all ranks in a forward pass, if they choose over all their
    tokens."""
    if getattr(stack.routing.router, "pool", None) is not Scope.DATA_PARALLEL:
        return 0
    layers = stack.model.num_moe_layers
    deciding = layers if stack.routing.depth == "layer_wise" else min(layers, 1)
    return layout.world_size * stack.tokens * (stack.model.moe.num_routed_experts + 1) * _FLOAT * deciding


def _traffic(
    what: str, collective: Collective, handed: int, layout: Layout, groups: list[range] | None = None
) -> Traffic:
    groups = layout.expert_parallel_groups if groups is None else groups
    ranks = len(groups[0])
    sent = handed * (ranks - 1) / ranks * (2 if collective == "all-reduce" else 1)
    between = sent * _leaving(groups, layout, collective)
    return Traffic(what, collective, ranks, handed, sent - between, between, layout.ranks_per_node)


def _leaving(groups: list[range], layout: Layout, collective: Collective) -> float:
    """Share of what a node's ranks send that leaves it, of the node where it is most."""
    leaving: defaultdict[int, float] = defaultdict(float)
    for group in groups:
        nodes = [layout.node_of(rank) for rank in group]
        if collective == "all-to-all":
            for node, here in Counter(nodes).items():
                leaving[node] += here * (len(nodes) - here) / max(len(nodes) - 1, 1)
        else:
            for node, next_node in zip(nodes, nodes[1:] + nodes[:1], strict=True):
                leaving[node] += node != next_node
    return max(leaving.values(), default=0) / layout.ranks_per_node
