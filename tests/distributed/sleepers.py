"""Ranks whose main threads wait for no collective, and so meet no error of one: as with NCCL.

Run as a script it is one of them: it joins, watches over the others, says that it is ready and sleeps.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.distributed.real_ranks import free_port, until
from tests.processes.python import Python

JOIN_SECONDS = 120.0


class Sleepers:
    """So many of them, rank R on the host ``nodeR``. Ends them when it is left.

    Args:
        folder: of their logs.
        timeout_seconds: parallel.timeout_seconds.
        step: after which they sleep, of two; 0: while they start.
    """

    def __init__(self, size: int, folder: Path, timeout_seconds: float, step: int) -> None:
        self._logs = [folder / f"rank_{rank}.log" for rank in range(size)]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        common |= {"PYTHONPATH": str(Path(__file__).parents[2])}
        self.processes = []
        for rank, log in enumerate(self._logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "SLURMD_NODENAME": f"node{rank}"}
            command = [__file__, str(timeout_seconds), str(step)]
            self.processes.append(Python(*command, stdout=log, stderr=log, environment=os.environ | common | own))

    def __enter__(self) -> Sleepers:
        until(lambda: all("ready" in self.told(rank) for rank in range(len(self._logs))), JOIN_SECONDS, "no join")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def told(self, rank: int) -> list[str]:
        """The lines that a rank has printed."""
        return self._logs[rank].read_text(encoding="utf-8").splitlines()

    def exit_codes(self, ranks: list[int], seconds: float) -> list[int | None]:
        """Of these ranks, None for those that live on after this time."""
        deadline = time.monotonic() + seconds
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[rank].wait(max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].poll() for rank in ranks]


def _sleep(timeout_seconds: float, step: int) -> None:
    import torch

    from moe_testbed.launcher.config.experiment import ParallelConfig
    from moe_testbed.launcher.ranks.preemption import StopSignals
    from moe_testbed.launcher.ranks.rendezvous import join
    from moe_testbed.launcher.ranks.watchdog import Watchdog

    watchdog = Watchdog(
        join(torch.device("cpu"), 1800.0),
        ParallelConfig(timeout_seconds=timeout_seconds),
        2,
        lambda state, reason: print(f"{state}: {reason}", flush=True),
    )
    with StopSignals(before_exit=watchdog.explain, is_request=watchdog.all_alive):
        if step:
            watchdog.passed(step)
        # They have checked in with one another.
        assert watchdog.all_alive()
        print("ready", flush=True)
        time.sleep(3600)


if __name__ == "__main__":
    _sleep(float(sys.argv[1]), int(sys.argv[2]))
