"""What becomes of a job whose processes have ended: called by the batch script."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_testbed.launcher.errors import ASKED_TO_STOP, FAILED, WRONG_INPUT, guarded
from moe_testbed.launcher.run.files import read_json, write_atomically
from moe_testbed.launcher.run.folder import RunFolder, step_of
from moe_testbed.launcher.run.records import Status

ENDS = "ends.json"
"""In a run's folder, of the jobs since it was submitted: {"failures": their reasons, "stops": the step of the newest
checkpoint at each end of a job that was asked to stop}."""

_TASK_ENDED = re.compile(
    r"^srun: error: (?P<host>\S+): tasks? (?P<rank>\d+)\S*: (?:Exited with exit code (?P<status>\d+)|(?P<words>.+))$",
    re.MULTILINE,
)
_COMPLAINT = re.compile(r"^srun: error: (.+)$", re.MULTILINE)
_SIGNALLED = 128  # what a shell adds to a signal's number


def decide(run_dir: Path, status: int, told: bool, start: str, log: str) -> int:
    """Notes in the run's folder how a job has ended and says what is to be done, as an exit status.

    As `compare` does, a run that fails is started again unless `gives_up` says otherwise; one that was asked to stop,
    unless that has happened twice without a newer checkpoint.

    Args:
        status: of srun.
        told: the processes were asked to stop.
        start: which one, as in its first line in the logs of the job and of the ranks.
        log: of the job.

    Returns:
        0 if the run is finished, `ASKED_TO_STOP` if it is to be started again, else another one.
    """
    if RunFolder(run_dir).is_finished:
        return 0
    now = _status_of_this_start(run_dir)
    said = _of_this_start(log, start)
    ends = list(_TASK_ENDED.finditer(said))
    if WRONG_INPUT in (status, *(int(end["status"]) for end in ends if end["status"])):
        status = WRONG_INPUT
    # Where a rank was killed, srun has asked the others.
    elif told or (now.state == "stopped" and not ends):
        return _after_stop(run_dir, now)
    reason = str(now.reason) if now.state == "failed" else _reason(run_dir, status, ends, start, said)
    return _after_failure(run_dir, status or FAILED, reason)


def _after_failure(run_dir: Path, status: int, reason: str) -> int:
    from moe_testbed.launcher.suites.scheduling import gives_up

    earlier = _note_end(run_dir, "failures", reason)
    _write_failure(run_dir, reason)
    return status if gives_up(status, reason, earlier) else ASKED_TO_STOP


def _after_stop(run_dir: Path, now: Status) -> int:
    # The last that is written of a checkpoint.
    whole = (run_dir / "checkpoints").glob("step_*/complete.json")
    newest = max((step_of(mark.parent) for mark in whole), default=0)
    steps = [0, *_note_end(run_dir, "stops", newest), newest]
    if len(steps) < 3 or not steps[-3] >= steps[-2] >= steps[-1]:
        return ASKED_TO_STOP
    last = now.reason or "it had no time"
    _write_failure(
        run_dir,
        f"stopped twice without a new checkpoint since {f'step {newest}' if newest else 'the start'} ({last}); raise "
        "slurm.time if the start takes longer, slurm.grace_seconds if a step and its checkpoint do",
    )
    return FAILED


def _note_end(run_dir: Path, kind: str, value: object) -> Sequence[Any]:
    """Adds it to those of its kind; returns the earlier ones."""
    ends = read_json(run_dir / ENDS)
    earlier = ends.get(kind, [])
    write_atomically(run_dir / ENDS, json.dumps(ends | {kind: [*earlier, value]}, indent=1) + "\n")
    return earlier


def _status_of_this_start(run_dir: Path) -> Status:
    """Returns what the training has written since the job started; the status of a missing run if nothing."""
    folder = RunFolder(run_dir)
    try:
        fresh = folder.status_time_ns >= (run_dir / "logs" / "started").stat().st_mtime_ns
    except FileNotFoundError:
        return Status()
    return folder.read_status() if fresh else Status()


def _of_this_start(log: str, start: str) -> str:
    """What a log says after the first line of this start; nothing if that is not there."""
    return log.rpartition(f"{start},")[2].partition("\n")[2] if f"{start}," in log else ""


def _reason(run_dir: Path, status: int, ends: list[re.Match[str]], start: str, log: str) -> str:
    """Of processes that have left none themselves, by the one that ended first."""
    if not ends:
        complaint = _COMPLAINT.search(log)
        return f"srun: {complaint[1]}" if complaint else f"ended with status {status} without being finished"
    rank, host = ends[0]["rank"], ends[0]["host"]
    if ends[0]["words"]:
        return f"rank {rank} on host {host}: {ends[0]['words']}"
    code = int(ends[0]["status"])
    if code > _SIGNALLED and code - _SIGNALLED in set(signal.Signals):
        return f"rank {rank} on host {host} was killed by {signal.Signals(code - _SIGNALLED).name}"
    from moe_testbed.launcher.suites.scheduling import last_words

    said = _of_this_start(_text(run_dir / "logs" / f"rank-{rank}.txt"), start)
    return f"rank {rank} on host {host}: {last_words(said, code)}"


def _text(log: Path) -> str:
    """Empty if there is none: a container that does not start writes none."""
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def _write_failure(run_dir: Path, reason: str) -> None:
    folder = RunFolder(run_dir)
    folder.note_failure(folder.read_config().training.steps, reason)


def main() -> int:
    """Reads the arguments that the batch script gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--told", choices=("yes", "no"), required=True)
    parser.add_argument("--start", required=True)
    parser.add_argument("--log", type=Path, required=True)
    given = parser.parse_args()
    return guarded(lambda: decide(given.run_dir, given.status, given.told == "yes", given.start, _text(given.log)))


if __name__ == "__main__":
    sys.exit(main())
