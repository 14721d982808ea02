"""The experiment of a laptop as it trains on a cluster: what it computes is untouched."""

from __future__ import annotations

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.config.experiment import ExperimentConfig


def config_on(config: ExperimentConfig, cluster: ClusterConfig) -> ExperimentConfig:
    """What ranks start with: the cluster's accelerator if none is named, and no MLflow if the nodes do not reach it."""
    runtime, tracking = config.runtime, config.tracking
    if runtime.device == "auto":
        runtime = runtime.model_copy(update={"device": cluster.accelerator})
    if not cluster.nodes_reach_mlflow:
        tracking = tracking.model_copy(update={"mlflow": False})
    return config.model_copy(update={"runtime": runtime, "tracking": tracking})
