"""How a training would lie on a cluster: computed from the two configurations, nothing is started."""

from __future__ import annotations

from dataclasses import dataclass

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.layout import Layout, layout_of
from moe_testbed.launcher.cluster.plan.activations import planned_activations
from moe_testbed.launcher.cluster.plan.memory import ELEMENT_SIZES, Memory, planned_memory
from moe_testbed.launcher.cluster.plan.traffic import Traffic, planned_traffic
from moe_testbed.launcher.cluster.plan.weights import Weight, rank_weights
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.sharing import micro_batch_size


@dataclass(frozen=True)
class Plan:
    """A training on a cluster.

    Attributes:
        weights: the weights that one rank holds.
        memory: what the GPU needs that needs most.
        traffic: what one optimizer step sends.
    """

    config: ExperimentConfig
    cluster: ClusterConfig
    layout: Layout
    weights: list[Weight]
    memory: Memory
    traffic: list[Traffic]

    @property
    def spare_bytes(self) -> int:
        """Memory of a GPU that is left; below 0 it does not fit."""
        return round(self.cluster.gpu_memory_gb * 1e9) - self.memory.total

    @property
    def fits(self) -> bool:
        """Every GPU has the memory that it needs."""
        return self.spare_bytes >= 0

    @property
    def seconds(self) -> float:
        """The time that a step's messages take one after another, while nothing is computed."""
        return sum(traffic.seconds(self.cluster.interconnect) for traffic in self.traffic)


def make_plan(config: ExperimentConfig, cluster: ClusterConfig, weights: list[Weight] | None = None) -> Plan:
    """Returns the plan of a training.

    Args:
        weights: those of one rank, if they are known already.

    Raises:
        ConfigError: the ranks cannot share the batch or the experts, a group leaves its node without leave to do so, or
            router, model and mix do not go together.
    """
    layout, training = layout_of(config, cluster), config.training
    weights = rank_weights(config) if weights is None else weights
    micro = micro_batch_size(config, layout.world_size)
    activations = planned_activations(config, micro, ELEMENT_SIZES[training.precision], cluster.accelerator)
    return Plan(
        config,
        cluster,
        layout,
        weights,
        planned_memory(training, weights, layout, activations, cluster.accelerator),
        planned_traffic(config, weights, layout),
    )
