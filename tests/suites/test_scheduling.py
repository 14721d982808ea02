"""Side by side, failures, retries, and no child that outlives its parent."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from moe_testbed.launcher.config.suite import Suite, SuiteRun, suite_runs
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import Status
from moe_testbed.launcher.suites.progress import ProgressView
from moe_testbed.launcher.suites.scheduling import train_all

MakeSuite = Callable[..., Suite]


class Trained:
    """Trains a suite with the stub and keeps what was said."""

    def __init__(self, suite: Suite, command: list[str], jobs: int = 1) -> None:
        self.runs: list[SuiteRun] = suite_runs(suite, Path("runs"))
        for run in self.runs:
            RunFolder(run.run_dir).prepare(run.config)
        self.said = io.StringIO()
        self.failed = train_all(
            self.runs, jobs, {"OMP_NUM_THREADS": "3"}, ProgressView(self.said, len(self.runs)), command
        )
        self.events = [line.split() for line in Path("runs/stubs/events.txt").read_text().splitlines()]

    def starts(self, label: str) -> int:
        return sum(event[:2] == ["start", f"{label}-seed1"] for event in self.events)

    def state(self, label: str) -> object:
        return RunFolder(Path(f"runs/stubs/{label}-seed1")).read_status().state


def test_runs_are_trained_in_order_and_get_the_environment(make_suite: MakeSuite, stub_command: list[str]) -> None:
    trained = Trained(make_suite("a", "b"), stub_command)
    assert trained.failed == {}
    assert [(event[0], event[1], *event[3:]) for event in trained.events] == [
        ("start", "a-seed1", "3"),
        ("end", "a-seed1"),
        ("start", "b-seed1", "3"),
        ("end", "b-seed1"),
    ]


def test_no_more_run_at_a_time_than_jobs(make_suite: MakeSuite, stub_command: list[str]) -> None:
    trained = Trained(make_suite("meets_1", "meets_2", "c", "d", "e"), stub_command, jobs=2)
    assert trained.failed == {}
    alive, most = 0, 0
    for event in trained.events:
        alive += 1 if event[0] == "start" else -1
        most = max(most, alive)
    assert most == 2


def test_a_run_that_fails_the_same_way_twice_is_given_up_and_the_others_go_on(
    make_suite: MakeSuite, stub_command: list[str]
) -> None:
    trained = Trained(make_suite("always_fails", "b"), stub_command)
    assert trained.failed == {"always_fails-seed1": "RuntimeError: always the same"}
    assert trained.starts("always_fails") == 2
    assert trained.state("b") == "finished"
    assert "always_fails-seed1: failed: RuntimeError: always the same (see runs/stubs/always_fails-seed1/log.txt)" in (
        trained.said.getvalue()
    )


def test_a_run_that_fails_ever_differently_is_given_up_after_three_attempts(
    make_suite: MakeSuite, stub_command: list[str]
) -> None:
    trained = Trained(make_suite("fails_differently"), stub_command)
    assert trained.failed == {"fails_differently-seed1": "RuntimeError: at step 3"}
    assert trained.starts("fails_differently") == 3


def test_wrong_input_is_not_tried_again(make_suite: MakeSuite, stub_command: list[str]) -> None:
    trained = Trained(make_suite("wrong_input"), stub_command)
    assert trained.failed == {"wrong_input-seed1": "a value is wrong; mend it"}
    assert trained.starts("wrong_input") == 1


def test_a_killed_run_continues_where_it_was(make_suite: MakeSuite, stub_command: list[str]) -> None:
    trained = Trained(make_suite("dies_once"), stub_command)
    assert trained.failed == {}
    assert trained.starts("dies_once") == 2
    lines = Path("runs/stubs/dies_once-seed1/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    said = trained.said.getvalue()
    assert "failed, starting it again: killed by SIGKILL, perhaps by the system for lack of memory" in said
    assert "continues (it had come to step 2)" in said


def test_a_run_that_a_signal_has_stopped_continues(make_suite: MakeSuite, stub_command: list[str]) -> None:
    trained = Trained(make_suite("is_stopped_once"), stub_command)
    assert trained.failed == {}
    assert trained.starts("is_stopped_once") == 2
    assert trained.state("is_stopped_once") == "finished"
    assert "is_stopped_once-seed1: was asked to stop, starting it again" in trained.said.getvalue()


def test_a_run_that_ends_well_without_being_finished_has_failed(make_suite: MakeSuite, stub_command: list[str]) -> None:
    trained = Trained(make_suite("lies"), stub_command)
    assert trained.failed == {"lies-seed1": "ended with status 0 without a message"}
    assert trained.state("lies") == "failed"


def test_the_reason_of_a_failure_stands_in_the_runs_folder(make_suite: MakeSuite, stub_command: list[str]) -> None:
    Trained(make_suite("wrong_input"), stub_command)
    assert RunFolder(Path("runs/stubs/wrong_input-seed1")).read_status() == Status(
        "failed", 2, 4, "a value is wrong; mend it"
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the children on Linux only")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_no_training_outlives_the_comparison(
    make_suite: MakeSuite, stub_command: list[str], number: signal.Signals, status: int
) -> None:
    make_suite("hangs")
    # A shell that started these tests in the background has made SIGINT ignored, which processes inherit.
    script = f"""
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from pathlib import Path
        from moe_testbed.data import build
        from moe_testbed.launcher.errors import guarded
        from moe_testbed.launcher.suites.compare import compare
        from moe_testbed.launcher.config.suite import load_suite

        build.build_store = lambda mix, cache_dir, log: None
        sys.exit(guarded(lambda: compare(load_suite("stubs.yaml"), Path("runs"), 1, {stub_command!r})))
    """
    parent = subprocess.Popen([sys.executable, "-c", dedent(script)], stderr=subprocess.PIPE, text=True)
    events = Path("runs/stubs/events.txt")
    assert within(120, lambda: events.exists() and "start" in events.read_text()), "the stub did not start"
    child = int(events.read_text().split()[2])
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == status
    assert within(20, lambda: not is_alive(child)), "the training is still there"
    assert "Traceback" not in errors
    assert RunFolder(Path("runs/stubs/hangs-seed1")).read_status().state == "running"


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_alive(process: int) -> bool:
    """A zombie, which only waits to be read by a parent, is not."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
