"""A cluster of two hosts of two processes each, to launch on."""

from __future__ import annotations

CLUSTER = """
    name: trial
    nodes: 2
    gpus_per_node: 2
    accelerator: cpu
    gpu_memory_gb: 8
    interconnect: {within_node_gb_per_s: 10, between_nodes_gb_per_s: 1}
    launcher: deepspeed
    hostfile: hosts
"""
HOSTS = "node1 slots=2\nnode2 slots=2\n"
