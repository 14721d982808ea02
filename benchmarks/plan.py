"""How long does a plan of 512 GPUs take, and what are the planned layouts of the embedded experiments?

    python benchmarks/plan.py [--rounds 5] [--table]

The time is the whole command's, from the shell's point of view, beside that of importing torch alone in the same round;
`planning` is what remains when all is imported. ``--table`` prints a table of the layouts instead: planned,
never run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from moe_testbed.launcher.cluster.config import load_cluster
from moe_testbed.launcher.cluster.plan.plan import Plan, make_plan
from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.ranks.sharing import accumulation_steps, micro_batch_size

CLUSTER = "configs/clusters/slurm_h100.yaml"
EXPERIMENTS = ("small", "large")
GPUS = (8, 64, 512)
# Of the file, or as many sequences as 512 GPUs need to have two each.
BATCH = {8: 256, 64: 256, 512: 1024}
HEADS = (
    "experiment",
    "GPUs",
    "nodes x GPUs",
    "ranks that share experts",
    "ranks with the same experts",
    "sequences of a step",
    "micro-batch x accumulation",
    "memory, GB",
    "all-to-all, MB",
    "gradients and weights, MB",
    "of it to other nodes, MB",
    "seconds of sending",
)


def planned(name: str, gpus: int, *overrides: str) -> Plan:
    """Returns the plan of an embedded experiment on nodes of eight H100."""
    config = load_experiment(
        f"configs/experiments/{name}.yaml", [f"training.global_batch_size={BATCH[gpus]}", *overrides]
    )
    return make_plan(config, load_cluster(CLUSTER, [f"nodes={gpus // 8}"]))


def table_row(plan: Plan) -> tuple[str, ...]:
    """Returns a plan as a row under `HEADS`."""
    layout, config, traffic = plan.layout, plan.config, plan.traffic
    micro = micro_batch_size(config, layout.world_size)
    exchange = [t.within + t.between for t in traffic if t.collective == "all-to-all"]
    return (
        f"{config.name}.yaml",
        str(layout.world_size),
        f"{layout.nodes} x {layout.ranks_per_node}",
        str(layout.expert_parallel_size),
        str(layout.expert_data_parallel_size),
        str(config.training.global_batch_size),
        f"{micro} x {accumulation_steps(config, layout.world_size)}",
        f"{plan.memory.total / 1e9:.1f} of {plan.cluster.gpu_memory_gb:.0f}",
        f"{sum(exchange) / 1e6:,.0f}",
        f"{(sum(t.within + t.between for t in traffic) - sum(exchange)) / 1e6:,.0f}",
        f"{sum(t.between for t in traffic) / 1e6:,.0f}",
        f"{plan.seconds:.3f}",
    )


def print_table() -> None:
    """Prints the planned layouts."""
    rows = [HEADS, *(table_row(planned(name, gpus)) for name in EXPERIMENTS for gpus in GPUS)]
    for row in rows:
        print(" | ".join(row))
    print(json.dumps({"tables": {"planned_layouts": rows}}))


def seconds_of(function: Callable[[], Any]) -> float:
    """Returns the duration of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Prints medians, or the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="print the planned layouts instead")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    command = [sys.executable, "-m", "moe_testbed.launcher", "plan", "configs/experiments/large.yaml"]
    command += ["--cluster", CLUSTER, "--set", "nodes=64", f"training.global_batch_size={BATCH[512]}"]

    def run(line: list[str]) -> float:
        return seconds_of(lambda: subprocess.run(line, check=True, stdout=subprocess.DEVNULL))

    rounds = [(run(command), run([sys.executable, "-c", "import torch"])) for _ in range(arguments.rounds)]
    planning = [seconds_of(lambda: planned("large", 512)) for _ in range(arguments.rounds)]
    whole, torch = (statistics.median(column) for column in zip(*rounds, strict=True))
    alone = statistics.median(planning)
    print(f"plan of 512 GPUs: {whole:.2f} s; importing torch alone {torch:.2f} s")
    print(f"planning, all imported: {alone:.3f} s")
    said = f"{whole:.1f} s, {whole / torch:.2f} x importing torch alone ({torch:.1f} s); the planning {alone:.2f} s"
    print(json.dumps({"figures": {"plan": said}}))


if __name__ == "__main__":
    main()
