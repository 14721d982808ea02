"""Decides what becomes of a job whose processes have ended; the batch script calls it."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

from moe_testbed.launcher.errors import ASKED_TO_STOP, FAILED, WRONG_INPUT, guarded
from moe_testbed.launcher.run.checkpoint_mark import newest_marked_step
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import FAILED_STATES, Status
from moe_testbed.launcher.run.suite_folder import SuiteFolder

_TASK_ENDED = re.compile(
    r"^srun: error: (?P<host>\S+): tasks? (?P<rank>\d+)\S*: (?:Exited with exit code (?P<status>\d+)|(?P<words>.+))$",
    re.MULTILINE,
)
_COMPLAINT = re.compile(r"^srun: error: (.+)$", re.MULTILINE)
_SIGNALLED = 128  # what a shell adds to a signal's number


def decide(run_dir: Path, status: int, told: bool, start: str, log: str) -> int:
    """Notes in the run's folder how a job has ended and says what is to be done, as an exit status.

    As `compare` does, a run that fails is started again unless `gives_up` says otherwise; one that was asked to stop,
    unless that has happened twice without a newer checkpoint. With one that is given up, those fail that start from it.

    Args:
        status: exit status of srun.
        told: whether the processes were asked to stop.
        start: which start of the job this was, as its first line in the logs of the job and of the ranks says.
        log: what the job has said.

    Returns:
        0 if the run is finished, `ASKED_TO_STOP` if it is to be started again, else another one.
    """
    folder = RunFolder(run_dir)
    now = _status_of_this_start(folder)
    said = _of_this_start(log, start)
    ends = list(_TASK_ENDED.finditer(said))
    wrong = WRONG_INPUT in (status, *(int(end["status"]) for end in ends if end["status"]))
    # Of a run that was finished before, this start may have found that it is stale.
    if folder.is_finished and (now.state == "finished" or not wrong):
        return 0
    if wrong:
        status = WRONG_INPUT
    # Where a rank was killed, srun has asked the others.
    elif told or (now.state == "stopped" and not ends):
        return _after_stop(folder, now)
    reason = str(now.reason) if now.state in FAILED_STATES else _reason(folder, status, ends, start, said)
    return _after_failure(folder, status or FAILED, reason)


def _after_failure(folder: RunFolder, status: int, reason: str) -> int:
    from moe_testbed.launcher.suites.scheduling import gives_up

    ends = folder.read_job_ends()
    folder.write_job_ends(replace(ends, failures=(*ends.failures, reason)))
    if not gives_up(status, reason, ends.failures):
        _write_failure(folder, reason)
        return ASKED_TO_STOP
    _give_up(folder, reason)
    return status


def _after_stop(folder: RunFolder, now: Status) -> int:
    ends, newest = folder.read_job_ends(), newest_marked_step(folder.checkpoints)
    folder.write_job_ends(replace(ends, stops=(*ends.stops, newest)))
    steps = [0, *ends.stops, newest]
    if len(steps) < 3 or not steps[-3] >= steps[-2] >= steps[-1]:
        return ASKED_TO_STOP
    last = now.reason or "it had no time"
    _give_up(
        folder,
        f"stopped twice without a new checkpoint since {f'step {newest}' if newest else 'the start'} ({last}); raise "
        "slurm.time if the start takes longer, slurm.grace_seconds if a step and its checkpoint do",
    )
    return FAILED


def _status_of_this_start(folder: RunFolder) -> Status:
    """Returns what the training has written since the job started; the status of a missing run if nothing."""
    try:
        fresh = folder.status_time_ns >= folder.job_start_file.stat().st_mtime_ns
    except FileNotFoundError:
        return Status()
    return folder.read_status() if fresh else Status()


def _of_this_start(log: str, start: str) -> str:
    """Returns what a log says after the first line of this start; nothing if that line is not there."""
    return log.rpartition(f"{start},")[2].partition("\n")[2] if f"{start}," in log else ""


def _reason(folder: RunFolder, status: int, ends: list[re.Match[str]], start: str, log: str) -> str:
    """Returns why processes have ended that have left no reason themselves: what is known of the first one to end."""
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

    said = _of_this_start(_text(folder.rank_log(rank)), start)
    return f"rank {rank} on host {host}: {last_words(said, code)}"


def _text(log: Path) -> str:
    """Returns what a log says; nothing if there is none, as where a container did not start."""
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def _give_up(folder: RunFolder, reason: str) -> None:
    """Notes the failure of a run that is not started again, and of the unfinished ones that start from it."""
    from moe_testbed.launcher.suites.order import failed_with

    _write_failure(folder, reason)
    for child in SuiteFolder(folder.path.parent).children(folder):
        if not child.is_finished:
            _give_up(child, failed_with(folder.path.name, reason))


def _write_failure(folder: RunFolder, reason: str) -> None:
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
