"""How long does a training step take with each balancing scope, against the scope `micro_batch` in the same run?

    python benchmarks/scopes.py [EXPERIMENT] [OVERRIDE ...] [--ranks 1] [--rounds 5] [--steps 24]

All scopes share one process (and one model per scope): they take turns, step by step, so that whatever else the machine
does hits all of them. The ratio is the median over rounds of the time of a round's steps; threads are pinned to one.
With ``--ranks 2`` the processes are started by torchrun's launcher and talk over gloo.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.ranks.rendezvous import choose_device, join

_BASE = "micro_batch"
SCOPES = {
    _BASE: "{scope: micro_batch}",
    "token": "{scope: token}",
    "sequence": "{scope: sequence}",
    "document": "{scope: document}",
    "data_parallel": "{scope: data_parallel}",
    "global_batch, online": "{scope: global_batch}",
    "global_batch, previous": "{scope: global_batch, estimator: previous}",
    "window": "{scope: window}",
    "global_batch, exact": "{scope: global_batch, estimator: exact}",
}


def measure(arguments: argparse.Namespace) -> None:
    """Prints the table on rank 0."""
    torch.set_num_threads(1)
    ranks = join(choose_device("cpu"), timeout_seconds=600.0)
    from moe_testbed.launcher.ranks.sharing import accumulation_steps, micro_batch_size
    from moe_testbed.launcher.train.allocator import keep_freed_memory
    from moe_testbed.launcher.train.engine import build_engine, build_model
    from moe_testbed.launcher.train.inputs import LANGUAGE_MODELLING, build_sampler

    keep_freed_memory()
    trainings: dict[str, Any] = {}
    for name, scope in SCOPES.items():
        balance = f"routing.balance={{load_balancing_loss: {scope}}}"
        config = load_experiment(arguments.experiment, [balance, *arguments.overrides])
        store = build_store(config.data.mix, Path(config.data.cache_dir), print)
        model = build_model(config, store, ranks)
        trainings[name] = model, build_engine(model, config, ranks)
    sampler, size = build_sampler(config, store), micro_batch_size(config, ranks.size)
    accumulation = accumulation_steps(config, ranks.size)

    def one_step(name: str, step: int) -> float:
        model, engine = trainings[name]
        started = time.perf_counter()
        starts = [(micro * ranks.size + ranks.rank) * size for micro in range(accumulation)]
        batches = [sampler.batch(step, start, start + size) for start in starts]
        inputs = [LANGUAGE_MODELLING(batch, slice(None), step, ranks.device).arguments for batch in batches]
        if model.reads_counts_ahead and accumulation > 1:
            model.begin_step(context for context, _ in inputs)
        for context, targets_BL in inputs:
            engine.backward(engine(context, targets_BL).loss)
            engine.step()
        model.finish_step()
        return time.perf_counter() - started

    for name in SCOPES:
        one_step(name, 0)
    ratios: dict[str, list[float]] = {name: [] for name in SCOPES}
    for _ in range(arguments.rounds):
        seconds = dict.fromkeys(SCOPES, 0.0)
        for step in range(arguments.steps):
            for name in SCOPES:
                seconds[name] += one_step(name, step)
        for name in SCOPES:
            ratios[name].append(seconds[name] / seconds[_BASE])
    if ranks.rank == 0:
        print(
            f"{ranks.size} rank(s), {accumulation} micro-batches, {arguments.rounds} rounds of {arguments.steps} steps"
        )
        for name, values in ratios.items():
            print(f"{name:<24}{statistics.median(values):>7.3f}  [{min(values):.3f}, {max(values):.3f}]")
        print(json.dumps(said(ratios, ranks.size)))


def said(ratios: dict[str, list[float]], ranks: int) -> dict[str, Any]:
    """Returns what the pages say: the range over the scopes but `exact`, and for one rank a table."""
    exact = "global_batch, exact"
    others = [statistics.median(values) for name, values in ratios.items() if name not in (_BASE, exact)]
    range_said = f"{min(others):.2f} to {max(others):.2f} x; `exact` {statistics.median(ratios[exact]):.2f} x"
    if ranks > 1:
        return {"figures": {"scopes_two_ranks": range_said}}
    rows = [["scope", f"ratio to `{_BASE}`"]]
    for name, values in ratios.items():
        scope, _, estimator = name.partition(", ")
        label = f"`{scope}`" + (f", `{estimator}`" if estimator else "")
        if name != _BASE:
            rows.append([label, f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"])
    return {"figures": {"scopes": range_said}, "tables": {"scopes": rows}}


def main() -> None:
    """Measures here, or in as many processes as there are to be ranks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("experiment", nargs="?", default="configs/experiments/tiny.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks == 1 or arguments.child:
        measure(arguments)
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
    subprocess.run([*launch, __file__, "--child", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
