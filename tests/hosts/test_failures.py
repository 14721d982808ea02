"""Launches that are cut short: whatever dies, nothing stays behind, and the same command continues."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.errors import ASKED_TO_STOP
from tests.hosts.network import Network
from tests.hosts.trial import Trial

pytestmark = pytest.mark.daemons

MakeExperiment = Callable[..., dict[str, Any]]

TIMEOUT_SECONDS = 10.0
# Ranks promise to be gone a minute after one is lost, with the default timeout of 45 s.
BOUND_SECONDS = TIMEOUT_SECONDS + 15.0
# ssh notices a cut link, and `launch` looks after what it cannot reach.
SSH_SECONDS = 60.0


def endless(make_experiment: MakeExperiment) -> dict[str, Any]:
    """An experiment that trains until it is ended; its checkpoints lie so that some steps are lost."""
    return make_experiment(
        training={"steps": 100_000},
        evaluation={"every": 0},
        probe={"points": 0},
        checkpoint={"every": 20},
        parallel={
            "expert_parallel_size": 2,
            "expert_parallel_across_nodes": True,
            "timeout_seconds": TIMEOUT_SECONDS,
        },
    )


def assert_continues(trial: Trial) -> None:
    """The same command goes on from the last checkpoint, through the same losses, and stops when it is asked to."""
    before = trial.losses()
    process = trial.start(trial.hosts[0])
    trial.wait_for_step(max(before) + 1, process)
    trial.launcher(trial.hosts[0]).send_signal(signal.SIGTERM)
    assert process.wait(BOUND_SECONDS + SSH_SECONDS) == ASKED_TO_STOP, trial.log
    assert trial.status["state"] == "stopped"
    after = trial.losses()
    assert {step: after[step] for step in before} == before
    trial.assert_nothing_is_left()


def test_a_rank_is_killed(two_hosts: Network, make_experiment: MakeExperiment, tmp_path: Path) -> None:
    trial = Trial(two_hosts, tmp_path, endless(make_experiment))
    process = trial.start(two_hosts.hosts[0])
    trial.wait_for_step(30, process)
    killed = two_hosts.hosts[1].ranks()[1]
    killed.kill()
    trial.assert_ranks_end(BOUND_SECONDS)
    assert process.wait(SSH_SECONDS) == 1
    trial.assert_nothing_is_left()
    assert trial.status["state"] == "failed"
    assert "rank 1 on host node2 was lost in step" in trial.status["reason"]
    assert_continues(trial)


def test_the_link_of_a_host_is_cut(two_hosts: Network, make_experiment: MakeExperiment, tmp_path: Path) -> None:
    trial = Trial(two_hosts, tmp_path, endless(make_experiment))
    process = trial.start(two_hosts.hosts[0])
    trial.wait_for_step(30, process)
    two_hosts.hosts[1].unplug()
    trial.assert_ranks_end(BOUND_SECONDS)
    assert process.wait(SSH_SECONDS) == 1
    trial.assert_nothing_is_left(SSH_SECONDS)
    # Each side lost the other, and both write to the one disk.
    assert trial.status["state"] == "failed"
    assert re.match(r"rank (0 on host node1|1 on host node2) was lost in step", trial.status["reason"])
    two_hosts.hosts[1].plug()
    assert_continues(trial)


@pytest.mark.parametrize("victim", ["launch", "deepspeed"])
def test_what_started_the_ranks_is_killed(
    victim: str, two_hosts: Network, make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    trial = Trial(two_hosts, tmp_path, endless(make_experiment))
    first = two_hosts.hosts[0]
    process = trial.start(first)
    trial.wait_for_step(5, process)
    launcher = trial.launcher(first)
    (launcher if victim == "launch" else launcher.children()[0]).kill()
    trial.assert_ranks_end(BOUND_SECONDS)
    assert process.wait(SSH_SECONDS) != 0
    trial.assert_nothing_is_left()
    if victim == "deepspeed":
        assert "deepspeed ended with exit status -9" in trial.status["reason"]


def test_a_rank_that_never_joins_does_not_hold_the_others(
    two_hosts: Network, make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    content = make_experiment(parallel={"timeout_seconds": 1.0})
    trial = Trial(two_hosts, tmp_path, content)
    data = Path(content["data"]["cache_dir"]).parent
    two_hosts.hosts[1].run(["mount", "-t", "tmpfs", "tmpfs", data], check=True)
    assert trial.launch() == 1, trial.log
    trial.assert_nothing_is_left()
    # Why, rank 1 has said; rank 0 would have waited for it for half an hour.
    assert f"{data}/latin/*.txt" in trial.log
    assert trial.status["state"] == "failed"
    assert trial.status["reason"].startswith("a rank on host node2 ended, and others waited for it")


def test_a_host_dies(two_hosts: Network, make_experiment: MakeExperiment, tmp_path: Path) -> None:
    trial = Trial(two_hosts, tmp_path, endless(make_experiment))
    process = trial.start(two_hosts.hosts[0])
    trial.wait_for_step(5, process)
    two_hosts.hosts[1].crash()
    assert process.wait(BOUND_SECONDS + SSH_SECONDS) == 1
    trial.assert_nothing_is_left()
    assert "rank 1 on host node2 was lost in step" in trial.status["reason"]
