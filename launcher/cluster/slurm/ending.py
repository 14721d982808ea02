"""What becomes of a job whose processes have ended: called by the batch script."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from pathlib import Path

from moe_testbed.launcher.errors import ASKED_TO_STOP, WRONG_INPUT
from moe_testbed.launcher.files import read_json, write_atomically

FAILURES = "failures.json"
"""In a run's folder: {"reasons": of the failures of the jobs since it was submitted}."""

_TASK_ENDED = re.compile(
    r"^srun: error: (?P<host>\S+): tasks? (?P<rank>\d+)\S*: (?:Exited with exit code (?P<status>\d+)|(?P<words>.+))$",
    re.MULTILINE,
)
_SIGNALLED = 128  # what a shell adds to a signal's number


def decide(run_dir: Path, status: int, told: bool, log: str) -> int:
    """Notes a failure in the run's folder and says what is to be done, as an exit status.

    As `compare` does, a run that fails is started again unless `gives_up` says otherwise.

    Args:
        status: of srun.
        told: the processes were asked to stop.
        log: what srun has said of this start.

    Returns:
        0 if the run is finished, `ASKED_TO_STOP` if it is to be started again, else another one.
    """
    now = _status_of_this_start(run_dir)
    if read_json(run_dir / "status.json").get("state") == "finished":
        return 0
    if now.get("state") == "stopped":
        return ASKED_TO_STOP
    ends = list(_TASK_ENDED.finditer(log))
    is_wrong_input = WRONG_INPUT in (status, *(int(end["status"]) for end in ends if end["status"]))
    if told and not is_wrong_input:
        # It had no time for a checkpoint: the one before will do.
        return ASKED_TO_STOP
    reason = str(now["reason"]) if now.get("state") == "failed" else _reason(run_dir, status, ends)
    earlier = read_json(run_dir / FAILURES).get("reasons", [])
    write_atomically(run_dir / FAILURES, json.dumps({"reasons": [*earlier, reason]}, indent=1) + "\n")
    _note(run_dir, reason)
    from moe_testbed.launcher.scheduling import gives_up

    if is_wrong_input:
        status = WRONG_INPUT
    return (status or 1) if gives_up(status, reason, earlier) else ASKED_TO_STOP


def _status_of_this_start(run_dir: Path) -> dict[str, object]:
    """What the training has written since the job started; empty if nothing."""
    written, started = run_dir / "status.json", run_dir / "logs" / "started"
    if not written.exists() or written.stat().st_mtime_ns < started.stat().st_mtime_ns:
        return {}
    return read_json(written)


def _reason(run_dir: Path, status: int, ends: list[re.Match[str]]) -> str:
    """Of processes that have left none themselves, by the one that ended first."""
    if not ends:
        return f"ended with status {status} without being finished"
    rank, host = ends[0]["rank"], ends[0]["host"]
    if ends[0]["words"]:
        return f"rank {rank} on host {host}: {ends[0]['words']}"
    code = int(ends[0]["status"])
    if code > _SIGNALLED and code - _SIGNALLED in set(signal.Signals):
        return f"rank {rank} on host {host} was killed by {signal.Signals(code - _SIGNALLED).name}"
    said = (run_dir / "logs" / f"rank-{rank}.txt").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in said.replace("\r", "\n").splitlines() if line.strip()]
    last = lines[-1].removeprefix("moe-testbed: ") if lines else f"ended with status {code} without a message"
    return f"rank {rank} on host {host}: {last}"


def _note(run_dir: Path, reason: str) -> None:
    """A killed process has written no reason; the status and the report read it from the run's folder."""
    from moe_testbed.launcher.config import load_experiment
    from moe_testbed.launcher.progress import read_progress
    from moe_testbed.launcher.run_folder import RunFolder

    steps = load_experiment(run_dir / "config.yaml").training.steps
    RunFolder(run_dir).write_status("failed", read_progress(run_dir, steps).step, steps, reason)


def main() -> int:
    """Reads the arguments that the batch script gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--told", choices=("yes", "no"), required=True)
    parser.add_argument("--log", type=Path, required=True, help="of the job; its starts begin with 'RUN: job'")
    arguments = parser.parse_args()
    log = arguments.log.read_text(encoding="utf-8", errors="replace").rpartition(f"{arguments.run_dir.name}: job ")[2]
    return decide(arguments.run_dir, arguments.status, arguments.told == "yes", log)


if __name__ == "__main__":
    sys.exit(main())
