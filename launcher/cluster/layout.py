"""The layout of a training says which rank lies on which node, and which ranks share what.

DeepSpeed numbers experts and groups by rank: consecutive ranks make an expert-parallel group, which holds every expert
once; the ranks at the same place of all groups hold the same experts and average their gradients (the
expert-data-parallel group). All ranks together are data-parallel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.sharing import check_layout, check_placement


@dataclass(frozen=True)
class Layout:
    """The ranks of a training.

    Attributes:
        nodes: number of nodes of the cluster.
        ranks_per_node: consecutive ones.
        expert_parallel_size: ranks that share one set of experts.
    """

    nodes: int
    ranks_per_node: int
    expert_parallel_size: int

    @property
    def world_size(self) -> int:
        """All ranks, which is the data-parallel size too."""
        return self.nodes * self.ranks_per_node

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.expert_parallel_size

    @property
    def expert_parallel_groups(self) -> list[range]:
        """Ranks of each group."""
        size = self.expert_parallel_size
        return [range(first, first + size) for first in range(0, self.world_size, size)]

    @property
    def expert_data_parallel_groups(self) -> list[range]:
        """Ranks of each group."""
        return [range(first, self.world_size, self.expert_parallel_size) for first in range(self.expert_parallel_size)]

    def node_of(self, rank: int) -> int:
        """Returns the number of the rank's node."""
        return rank // self.ranks_per_node

    def nodes_of(self, ranks: Sequence[int]) -> list[int]:
        """Numbers of the nodes on which ranks lie, ascending."""
        return sorted({self.node_of(rank) for rank in ranks})


def layout_of(config: ExperimentConfig, cluster: ClusterConfig) -> Layout:
    """Returns the layout of a training on a whole cluster.

    Raises:
        ConfigError: the ranks cannot share the batch or the experts, or a group leaves its node without leave to do so.
    """
    check_layout(config, cluster.num_gpus)
    nodes = [str(rank // cluster.gpus_per_node) for rank in range(cluster.num_gpus)]
    check_placement(config, nodes)
    return Layout(cluster.nodes, cluster.gpus_per_node, config.parallel.expert_parallel_size)
