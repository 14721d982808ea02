"""Cluster files for SLURM."""

from __future__ import annotations

from moe_testbed.launcher.cluster.config import ClusterConfig


def make_cluster(slurm: dict[str, object] | None = None, **parts: object) -> ClusterConfig:
    """Two nodes of four GPUs; keyword arguments replace parts, ``slurm`` values of the part of that name."""
    content: dict[str, object] = {
        "name": "test",
        "nodes": 2,
        "gpus_per_node": 4,
        "gpu_memory_gb": 80,
        "interconnect": {"within_node_gb_per_s": 450, "between_nodes_gb_per_s": 50},
        "launcher": "slurm",
        "slurm": {"partition": "gpu"} | (slurm or {}),
    }
    return ClusterConfig.model_validate(content | parts)
