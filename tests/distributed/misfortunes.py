"""What the children do: train, and meet a misfortune on the way."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.heartbeat import host_name
from moe_testbed.launcher.ranks.watchdog import bound_groups
from moe_testbed.launcher.train import loop
from moe_testbed.launcher.train import train as training


def train_and_tell(config: dict[str, Any], run_dir: str, rank: int, step: int, misfortune: str) -> None:
    """Trains. One rank meets a misfortune before a step, counted from 1; the others write how they end to
    ``RUN_DIR/rank_R.json``, with the seconds since the last step that they began."""
    began = [0.0]
    calls = [0]
    original = loop.train_step

    def begin(*arguments: Any) -> Any:
        began[0] = time.monotonic()
        calls[0] += 1
        if calls[0] == step and dist.get_rank() == rank:
            MISFORTUNES[misfortune]()
        return original(*arguments)

    loop.train_step = begin
    try:
        training.train(ExperimentConfig.model_validate(config), Path(run_dir))
    except BaseException as error:
        told: dict[str, Any] = {"error": type(error).__name__, "message": str(error), "host": host_name()}
        told["seconds"] = time.monotonic() - began[0]
        Path(run_dir, f"rank_{os.environ['RANK']}.json").write_text(json.dumps(told), encoding="utf-8")
        raise


def train_under_a_launcher(config: dict[str, Any], run_dir: str, where: str) -> None:
    """Trains; rank 1 is killed at a call of the loop, and rank 0 then gets SIGTERM while it meets no collective."""
    mark = Path(run_dir, "killed")

    def die_or_wait(*_: Any) -> None:
        if dist.get_rank() == 1:
            mark.write_text(str(os.getpid()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        while not _has_died(mark):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3600)

    setattr(loop, where, die_or_wait)
    training.train(ExperimentConfig.model_validate(config), Path(run_dir))


def _has_died(mark: Path) -> bool:
    text = mark.read_text(encoding="utf-8") if mark.exists() else ""
    return bool(text) and not Path("/proc", text).exists()


def train_differently(config: dict[str, Any], run_dir: str, difference: str) -> dict[str, Any]:
    """How a training ends in which rank 1 has another seed, clock or node."""
    if dist.get_rank() == 1:
        if difference == "seed":
            config = config | {"seed": 2}
        elif difference == "clock":
            clock = time.time
            time.time = lambda: clock() + 60.0
        else:
            os.environ["SLURMD_NODENAME"] = "elsewhere"
    try:
        training.train(ExperimentConfig.model_validate(config), Path(run_dir))
    except BaseException as error:
        return {"error": type(error).__name__, "message": str(error), "host": host_name()}
    raise AssertionError("it has trained")


def wait_in_vain() -> list[str]:
    """What rank 0, waiting for rank 1 in each of two groups, meets; their bound is set after they were made."""
    groups = [dist.group.WORLD, dist.new_group([0, 1])]
    bound_groups(1.0)
    store = dist.distributed_c10d._get_default_store()
    met = []
    if dist.get_rank() == 0:
        for group in groups:
            try:
                dist.all_reduce(torch.ones(1), group=group)
            except RuntimeError as error:
                met.append(str(error))
        store.set("rank 0 is done", "")
    store.get("rank 0 is done")
    return met


def _send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _fail() -> NoReturn:
    raise RuntimeError("the reason\nand more of it")


def _hang() -> None:
    time.sleep(3600)


MISFORTUNES: dict[str, Callable[[], object]] = {
    "is killed": _send(signal.SIGKILL),
    "freezes": _send(signal.SIGSTOP),
    "fails": _fail,
    "hangs": _hang,
    "is asked to stop": _send(signal.SIGUSR1),
    "is told to end": _send(signal.SIGTERM),
}
