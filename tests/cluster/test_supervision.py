"""`launch` and its ranks end together, whichever process is killed, and signals reach all ranks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from moe_testbed.launcher.cluster.launch.supervision import Lifelines
from moe_testbed.launcher.errors import ASKED_TO_STOP, ConfigError
from moe_testbed.launcher.ranks.lifeline import LIFELINE_VARIABLE, end_with_launch
from tests.cluster import stand_ins

SECONDS = 60.0


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"not within {SECONDS} s"
        time.sleep(0.02)


class Job:
    """A stand-in for `launch` and all below it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen([sys.executable, stand_ins.__file__, "launch", str(folder)])

    def pid(self, name: str) -> int:
        return int((self.folder / f"{name}.pid").read_text())

    def ranks(self) -> list[int]:
        return [self.pid(f"rank{rank}") for rank in range(stand_ins.NUM_RANKS)]

    def start_ranks(self) -> None:
        (self.folder / "go").touch()
        names = [f"rank{rank}.pid" for rank in range(stand_ins.NUM_RANKS)]
        wait_until(lambda: all((self.folder / name).exists() for name in names))

    def signals(self) -> list[str]:
        return [(self.folder / f"rank{rank}.signal").read_text() for rank in range(stand_ins.NUM_RANKS)]

    def end(self) -> dict[str, Any]:
        assert self.process.wait(SECONDS) == 0
        content: dict[str, Any] = json.loads((self.folder / "end.json").read_text())
        return content


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    try:
        wait_until(lambda: (tmp_path / "deepspeed.pid").exists())
        yield job
    finally:
        for pid in [job.process.pid, *(int(file.read_text()) for file in tmp_path.glob("*.pid"))]:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        job.process.wait()


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_it_ends_with_the_last_rank(job: Job) -> None:
    job.start_ranks()
    (job.folder / "finish").touch()
    assert job.end() == {"code": 0, "asked": False, "all_gone": True, "first_gone": None}


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_every_wish_to_stop_reaches_all_ranks_as_one_that_no_launcher_sends(job: Job, sent: str) -> None:
    job.start_ranks()
    job.process.send_signal(signal.Signals[sent])
    assert job.end() == {"code": ASKED_TO_STOP, "asked": True, "all_gone": True, "first_gone": None}
    assert job.signals() == ["SIGUSR1"] * stand_ins.NUM_RANKS


def test_ranks_that_connect_later_hear_it_too(job: Job) -> None:
    job.process.send_signal(signal.SIGUSR1)
    (job.folder / "go").touch()
    assert job.end() == {"code": ASKED_TO_STOP, "asked": True, "all_gone": True, "first_gone": None}
    assert job.signals() == ["SIGUSR1"] * stand_ins.NUM_RANKS


def test_a_second_ctrl_c_ends_all_at_once(job: Job) -> None:
    (job.folder / "stubborn").touch()
    job.start_ranks()
    ranks = job.ranks()
    job.process.send_signal(signal.SIGINT)
    wait_until(lambda: len(list(job.folder.glob("*.signal"))) == stand_ins.NUM_RANKS)
    job.process.send_signal(signal.SIGINT)
    assert job.end() == {"code": -signal.SIGKILL, "asked": True, "all_gone": True, "first_gone": None}
    wait_until(lambda: all(is_gone(pid) for pid in ranks))


def test_ranks_end_when_launch_is_killed(job: Job) -> None:
    job.start_ranks()
    processes = [*job.ranks(), job.pid("deepspeed")]
    job.process.kill()
    wait_until(lambda: all(is_gone(pid) for pid in processes))


def test_ranks_end_when_deepspeed_is_killed(job: Job) -> None:
    job.start_ranks()
    ranks = job.ranks()
    os.kill(job.pid("deepspeed"), signal.SIGKILL)
    assert job.end() == {"code": -signal.SIGKILL, "asked": False, "all_gone": True, "first_gone": None}
    wait_until(lambda: all(is_gone(pid) for pid in ranks))


def test_ranks_do_not_outlive_the_first_for_long(job: Job) -> None:
    job.start_ranks()
    ranks = job.ranks()
    (job.folder / "rank1.finish").touch()
    end = job.end()
    assert (end["asked"], end["all_gone"], end["first_gone"]) == (False, True, "127.0.0.1")
    wait_until(lambda: all(is_gone(pid) for pid in ranks))


def test_strangers_at_the_port_are_no_ranks() -> None:
    async def come_and_go() -> None:
        lifelines = Lifelines(everywhere=True, num_ranks=2)
        await lifelines.open()
        ranks = [await asyncio.open_connection("127.0.0.1", lifelines.port) for _ in range(2)]
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", lifelines.port)
            writer.close()
            await writer.wait_closed()
        waiting = asyncio.create_task(lifelines.outlived(0.0))
        # The server's side follows.
        assert (await asyncio.wait((waiting,), timeout=0.5))[1]
        ranks[0][1].close()
        assert await asyncio.wait_for(waiting, SECONDS) == "127.0.0.1"
        # Otherwise the cut waits for the other rank.
        ranks[1][1].close()
        await lifelines.cut()

    asyncio.run(come_and_go())


def test_a_rank_that_cannot_reach_launch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv(LIFELINE_VARIABLE, f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match=rf"cannot reach `moe-testbed launch` at 127.0.0.1, port {port} .*refused"):
        end_with_launch()


def test_without_a_launch_nothing_is_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIFELINE_VARIABLE, raising=False)
    end_with_launch()
