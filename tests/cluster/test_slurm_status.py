"""The table of a suite's runs, from folders and a stand-in for squeue."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.launcher.cluster.slurm.status import print_status
from moe_testbed.launcher.config.suite import Suite, load_suite
from moe_testbed.launcher.errors import ConfigError

Write = Callable[[str, str], Path]

# Run -> its status.json, the line of squeue about its job, and state and reason in the table.
CASES: dict[str, tuple[dict[str, str], str, str, str]] = {
    "new": ({}, "", "not started", ""),
    "waiting": ({}, "7_1|PENDING||Priority", "queued", "waits: Priority"),
    "again": (
        {"state": "failed", "reason": "RuntimeError: x"},
        "7_2|PENDING||BeginTime",
        "queued",
        "waits: BeginTime, after: RuntimeError: x",
    ),
    "working": ({"state": "running"}, "7_3|RUNNING|node[1-2]|None", "running", ""),
    "restarted": ({"state": "failed", "reason": "RuntimeError: x"}, "7_4|RUNNING|node1|None", "running", ""),
    "saving": ({"state": "stopped", "reason": "asked"}, "7_5|COMPLETING|node1|None", "ending", ""),
    "over": ({"state": "finished"}, "7_6|COMPLETED|node1|None", "done", ""),
    "broken": ({"state": "failed", "reason": "RuntimeError: x"}, "7_7|FAILED|node1|None", "failed", "RuntimeError: x"),
    "late": ({"state": "running"}, "7_8|TIMEOUT|node1|None", "cut off", "its job ended as TIMEOUT; see FOLDER/7_8.txt"),
    "gone": ({"state": "running"}, "", "cut off", "no job of it is left"),
    "paused": ({"state": "stopped", "reason": "asked"}, "7_10|FAILED|node1|None", "stopped", "asked"),
    "odd": ({}, "7_11|SUSPENDED|node1|None", "suspended", ""),
}


@pytest.fixture
def suite(experiment: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """A suite with a run for each case, submitted as array 7; SLURM tells of its jobs in no order."""
    for label, (status, _, _, _) in CASES.items():
        run_dir = experiment.parent / "runs" / "cases" / f"{label}-seed1"
        run_dir.mkdir(parents=True)
        if status:
            (run_dir / "status.json").write_text(json.dumps(status))
            (run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 3, "loss": 1.0}\n')
    write("runs/cases/slurm/jobs.json", json.dumps({"array": "7", "runs": [f"{label}-seed1" for label in CASES]}))
    lines = "\n".join(case[1] for case in reversed(CASES.values()) if case[1])
    stand_in(write, monkeypatch, f"cat <<'END'\n{lines}\nEND\n")
    write("cases.yaml", f"name: cases\nexperiment: small.yaml\nruns: {json.dumps({label: {} for label in CASES})}\n")
    return load_suite("cases.yaml")


def stand_in(write: Write, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Puts a squeue first on the PATH."""
    squeue = write("bin/squeue", f"#!/bin/sh\n{text}")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=":")


def test_folders_and_jobs_together_tell_the_state(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_status(suite, Path("runs")) == 1, "a run has failed"
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "step", "job", "nodes", "reason"]
    starts = [header.index(name) for name in header.split()]
    folder = str(Path.cwd() / "runs" / "cases" / "slurm")
    for line, (label, (status, job, state, reason)) in zip(lines, CASES.items(), strict=True):
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        number, _, nodes, _ = job.split("|") if job else ("", "", "", "")
        step = "3 of 4" if status else "0 of 4"
        assert cells == [f"{label}-seed1", state, step, number, nodes, reason.replace("FOLDER", folder)]


def test_an_array_that_slurm_has_forgotten_has_no_jobs(
    suite: Suite, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(write, monkeypatch, 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1\n')
    print_status(suite, Path("runs"))
    states = [line.split("  ")[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("working")]
    assert "cut off" in [cell.strip() for cell in states[0]]


def test_a_controller_that_is_down_is_one_line(suite: Suite, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    stand_in(write, monkeypatch, f'echo "{complaint}" >&2; exit 1\n')
    with pytest.raises(ConfigError, match="squeue refuses: Unable to contact slurm controller"):
        print_status(suite, Path("runs"))
