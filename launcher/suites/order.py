"""The order of a suite's trainings: one that starts from another waits until that one is finished."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moe_testbed.launcher.config.suite import SuiteRun
from moe_testbed.launcher.run.folder import RunFolder


def left_to_train(runs: Sequence[SuiteRun]) -> list[SuiteRun]:
    """Returns the runs that are not finished, and those that start from such a run, directly or not: whether they are
    still good shows only once that one is."""
    left: dict[str, SuiteRun] = {}
    for run in parents_first(runs):
        if not RunFolder(run.run_dir).is_finished or any(parent in left for parent in run.parents):
            left[run.name] = run
    return [run for run in runs if run.name in left]


def parents_first(runs: Sequence[SuiteRun]) -> list[SuiteRun]:
    """Returns the runs, generation by generation."""
    return [run for generation in generations(runs) for run in generation]


def generations(runs: Sequence[SuiteRun]) -> list[list[SuiteRun]]:
    """Returns the runs that start from none of the others, those that start from these, and so on, each in the order
    in which they were given."""
    found: list[list[SuiteRun]] = []
    rest = list(runs)
    while rest:
        waiting = {run.name for run in rest}
        found.append([run for run in rest if not waiting.intersection(run.parents)])
        assert found[-1], "runs that start from one another in a circle are refused when the suite is loaded"
        rest = [run for run in rest if waiting.intersection(run.parents)]
    return found


def most_at_once(runs: Iterable[SuiteRun]) -> int:
    """Returns how many of the runs can train at a time: as many as there are from which no other one starts."""
    runs = list(runs)
    return len({run.name for run in runs} - {parent for run in runs for parent in run.parents})


def work_behind(runs: Sequence[SuiteRun], work: Mapping[str, int]) -> dict[str, int]:
    """Returns for each run its own work and, of the runs that start from it, that of the longest chain.

    Args:
        work: name of each run -> its own work.
    """
    behind = dict(work)
    for run in reversed(parents_first(runs)):
        for parent in run.parents:
            if parent in work:
                behind[parent] = max(behind[parent], work[parent] + behind[run.name])
    return behind


def failed_with(parent: str, reason: str) -> str:
    """Returns why a run has failed whose parent has."""
    return f"the run it starts from, {parent}, failed: {reason}"
