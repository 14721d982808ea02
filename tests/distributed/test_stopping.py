"""SIGUSR1 and SIGTERM: a checkpoint after the step, status 75, and the same command continues bit for bit."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from moe_testbed.launcher.errors import ASKED_TO_STOP
from moe_testbed.launcher.ranks.heartbeat import host_name
from moe_testbed.launcher.ranks.preemption import StopSignals
from moe_testbed.launcher.ranks.ranks import Ranks
from tests.distributed import misfortunes
from tests.distributed.real_ranks import RealRanks, until
from tests.distributed.sleepers import Sleepers
from tests.processes.python import run_python
from tests.train import driver
from tests.train.results import assert_same_run, read_metrics

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

ALONE = Ranks(0, 1, torch.device("cpu"), None)


def listening() -> StopSignals:
    """The signals of a process without other ranks."""
    return StopSignals(before_exit=lambda stop: None, is_request=lambda: True)


@pytest.fixture
def experiment(make_experiment: MakeExperiment) -> Callable[[int], dict[str, Any]]:
    """On so many ranks, which share the experts; an evaluation falls on the step after which it is stopped."""

    def make(ranks: int) -> dict[str, Any]:
        return make_experiment(
            training=make_experiment()["training"] | {"micro_batch_size": 8 // ranks},
            parallel={"expert_parallel_size": ranks, "expert_parallel_across_nodes": True},
            evaluation={"every": 4, "sequences_per_domain": 2},
        )

    return make


@pytest.mark.parametrize(("ranks", "signalled", "misfortune"), [(1, 0, "is told to end"), (2, 1, "is asked to stop")])
def test_a_stopped_training_continues_bit_for_bit(
    ranks: int,
    signalled: int,
    misfortune: str,
    experiment: Callable[[int], dict[str, Any]],
    run_on_ranks: Run,
    tmp_path: Path,
) -> None:
    """It is enough that one rank is asked."""
    config, run_dir = experiment(ranks), tmp_path / "run"
    run_on_ranks(driver.train, ranks, config, str(tmp_path / "whole"))
    with pytest.raises(AssertionError):
        run_on_ranks(misfortunes.train_and_tell, ranks, config, str(run_dir), signalled, 4, misfortune)
    name = {"is told to end": "SIGTERM", "is asked to stop": "SIGUSR1"}[misfortune]
    reason = f"asked to stop by {name} after step 4"
    for rank in range(ranks):
        told = json.loads((run_dir / f"rank_{rank}.json").read_text())
        assert (told["error"], told["message"]) == ("AskedToStop", reason)
    assert json.loads((run_dir / "status.json").read_text()) == {
        "state": "stopped",
        "step": 4,
        "steps": 6,
        "reason": reason,
    }
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == ["step_00000004"]
    run_on_ranks(driver.train, ranks, config, str(run_dir))
    assert_same_run(run_dir, tmp_path / "whole")


def test_the_command_ends_with_status_75(experiment: Callable[[int], dict[str, Any]], tmp_path: Path) -> None:
    content = experiment(1) | {"training": experiment(1)["training"] | {"steps": 100_000}}
    with RealRanks(content, 1, tmp_path, tmp_path / "run") as ranks:
        ranks.wait_for_step(2)
        ranks.processes[0].send_signal(signal.SIGUSR1)
        assert ranks.exit_codes(60.0) == [ASKED_TO_STOP] == [75]
        assert ranks.errors().strip().splitlines()[-1] == (
            f"moe-testbed: {ranks.status()['reason']}; the same command continues"
        )


@pytest.mark.parametrize("held", [False, True])
def test_outside_the_steps_a_process_ends_at_once_though_it_is_blocked(held: bool) -> None:
    """The main thread waits in C++, where no handler of Python's is called."""
    script = f"""
        import os, signal, threading
        from datetime import timedelta
        import torch.distributed as dist
        from moe_testbed.launcher.ranks.preemption import StopSignals

        with StopSignals(before_exit=lambda stop: print(stop, flush=True), is_request=lambda: True) as signals:
            if {held}:
                signals.defer()
                os.kill(os.getpid(), signal.SIGTERM)
                signals.end_deferral()
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            dist.HashStore().wait(["what never comes"], timedelta(seconds=100))
    """
    started = time.monotonic()
    done = run_python("-c", dedent(script), timeout=90)
    assert done.returncode == ASKED_TO_STOP, done.stderr
    assert done.stdout == "asked to stop by SIGTERM outside the steps\n"
    assert time.monotonic() - started < 90


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 1), ("SIGUSR1", ASKED_TO_STOP)])
def test_before_the_ranks_have_met_only_sigusr1_is_a_wish(name: str, status: int) -> None:
    script = f"""
        import os, signal, time
        from moe_testbed.launcher.ranks.preemption import StopSignals, end_before_rendezvous

        with StopSignals(before_exit=lambda stop: print("noted", flush=True), is_request=end_before_rendezvous):
            os.kill(os.getpid(), signal.{name})
            time.sleep(100)
    """
    done = run_python("-c", dedent(script), timeout=90)
    assert done.returncode == status, done.stderr
    assert done.stdout == ("" if name == "SIGTERM" else "noted\n")
    assert ("ended by SIGTERM before the ranks had met" in done.stderr) == (name == "SIGTERM")


@pytest.mark.parametrize(
    ("where", "when"), [("build_model", "while the ranks started"), ("ablate_model", "after the last step")]
)
def test_sigterm_is_no_wish_where_another_rank_has_died(
    where: str, when: str, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    """As launchers send it to the ranks that are left."""
    training = make_experiment()["training"] | {"micro_batch_size": 4, "steps": 2}
    config = make_experiment(training=training, ablation={"sequences_per_domain": 1})
    run_dir = tmp_path / "run"
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[1, -9\]"):
        run_on_ranks(misfortunes.train_under_a_launcher, 2, config, str(run_dir), where)
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"] == f"rank 1 on host {host_name()} was lost {when} (rank 0 was sent SIGTERM)"


@pytest.mark.parametrize("step", [0, 2])
def test_sigterm_is_a_wish_where_all_ranks_live(step: int, tmp_path: Path) -> None:
    """Outside the steps, to one of the ranks; the other ends with it."""
    with Sleepers(2, tmp_path, 45.0, step) as sleepers:
        sleepers.processes[1].send_signal(signal.SIGTERM)
        assert sleepers.exit_codes([0, 1], 30.0) == [ASKED_TO_STOP] * 2
        assert "stopped: asked to stop by SIGTERM outside the steps" in sleepers.told(0)


def test_a_wish_waits_for_the_end_of_the_step_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    with listening() as signals:
        signals.defer()
        assert signals.agreed({}, ALONE) is None
        signal.raise_signal(signal.SIGUSR1)
        until(lambda: signals.agreed({}, ALONE) is signal.SIGUSR1, 10.0, "the signal did not arrive")
        signal.raise_signal(signal.SIGTERM)
        assert signals.agreed({}, ALONE) is signal.SIGUSR1
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)] == before


def test_all_ranks_learn_which_signal_one_has_received() -> None:
    two = Ranks(0, 2, torch.device("cpu"), object())  # type: ignore[arg-type]
    with listening() as asked, listening() as other:
        asked.defer()
        other.defer()
        # The second context has taken the signals over.
        signal.raise_signal(signal.SIGTERM)
        until(lambda: other.agreed({}, ALONE) is not None, 10.0, "the signal did not arrive")
        mine, its = other.requests(two), asked.requests(two)
        means = {"loss": 3.0} | {key: float(mine[key] + its[key]) / 2 for key in mine}
        assert asked.agreed(means, two) is signal.SIGTERM
    assert means == {"loss": 3.0}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_killed_at_five_random_moments_loses_only_the_steps_since_its_checkpoints(
    experiment: Callable[[int], dict[str, Any]], run_on_ranks: Run, tmp_path: Path
) -> None:
    """All ranks at once, by kill -9, in whatever they are doing."""
    generator = random.Random(5)
    config = experiment(2)
    config |= {
        "training": config["training"] | {"steps": 60},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 20, "sequences_per_domain": 2},
    }
    run_on_ranks(driver.train, 2, config, str(tmp_path / "whole"))
    run_dir = tmp_path / "run"
    for attempt in range(5):
        with RealRanks(config, 2, tmp_path / str(attempt), run_dir) as ranks:
            ranks.wait_for_step(1 + 10 * attempt)
            moment = time.monotonic() + generator.uniform(0.0, 0.5)
            until(lambda moment=moment: time.monotonic() > moment, 10.0, "")  # type: ignore[misc]
        lines = read_metrics(run_dir)
        reached = max((line["step"] for line in lines if line["kind"] == "train"), default=0)
        marks = sorted((run_dir / "checkpoints").glob("step_*/complete.json"))
        saved = int(marks[-1].parent.name.removeprefix("step_")) if marks else 0
        # A checkpoint is written after each third step; the next one may have been under way.
        assert reached - saved <= 4
    run_on_ranks(driver.train, 2, config, str(run_dir))
    assert_same_run(run_dir, tmp_path / "whole")
