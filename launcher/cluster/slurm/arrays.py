"""Submits the job arrays of a suite, one for each generation of its runs: those that start from none of the others,
those that start from these, and so on.

SLURM takes jobs of one array that wait for one another in a chain for a circle; of different arrays it does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_testbed.launcher.cluster.slurm.jobs import call_slurm
from moe_testbed.launcher.config.suite import SuiteRun
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.suites.order import generations, parents_first


@dataclass(frozen=True)
class JobArray:
    """The jobs of a generation.

    Attributes:
        indices: numbers of its runs among those of all arrays.
        waits: numbers of runs that others start from -> numbers of the runs in this array that start from these.
    """

    indices: range
    waits: Mapping[tuple[int, ...], Sequence[int]]


def job_arrays(runs: Sequence[SuiteRun]) -> list[JobArray]:
    """Returns the arrays of these runs, which are numbered as `parents_first` has them."""
    numbers = {run.name: number for number, run in enumerate(parents_first(runs))}
    arrays = []
    for generation in generations(runs):
        waits: dict[tuple[int, ...], list[int]] = {}
        for run in generation:
            # One that is finished already is in no array.
            if parents := tuple(numbers[parent] for parent in run.parents if parent in numbers):
                waits.setdefault(parents, []).append(numbers[run.name])
        first = numbers[generation[0].name]
        arrays.append(JobArray(range(first, first + len(generation)), waits))
    return arrays


def submit_arrays(
    arrays: Sequence[JobArray],
    script: Path,
    options: Callable[[range], Sequence[str]],
    note: Callable[[Sequence[str]], None],
) -> list[str]:
    """Submits a script once for each array.

    Args:
        options: returns the options of sbatch for an array of these indices.
        note: is given the numbers of the arrays that SLURM has, after each.

    Returns:
        The arrays' numbers.

    Raises:
        ConfigError: SLURM refuses; what it has got is cancelled.
    """
    numbers: list[str] = []
    try:
        for array in arrays:
            command = ["sbatch", "--parsable", *options(array.indices), *_behind(numbers), str(script)]
            # The answer is the number and, behind a semicolon, the name of one among several clusters.
            numbers.append(call_slurm(command).strip().partition(";")[0])
            note(numbers)
            for update in _updates(array, arrays, numbers):
                call_slurm(update)
    except ConfigError:
        for number in reversed(numbers):
            with contextlib.suppress(ConfigError):
                call_slurm(["scancel", number])
        raise
    return numbers


def told(arrays: Sequence[JobArray], script: Path, options: Callable[[range], Sequence[str]]) -> str:
    """Returns as comments of a shell what is submitted beside the first array; nothing if that is all."""
    if len(arrays) == 1:
        return ""
    names = [f"${{array{number}}}" for number in range(1, len(arrays) + 1)]
    lines = ["Submitted as ${array1}. Runs that start from others are further arrays of the same script:"]
    for number, array in enumerate(arrays[1:], start=1):
        (indices,) = (option for option in options(array.indices) if option.startswith("--array="))
        lines.append(
            f"array{number + 1}=$(sbatch --parsable {indices} {' '.join(_behind(names[:number]))} {script.name})"
        )
        lines += [" ".join(update) for update in _updates(array, arrays, names)]
    return "\n" + "".join(f"# {line}\n" for line in lines)


def _behind(numbers: Sequence[str]) -> list[str]:
    """Returns options that hold an array back until the one before it has ended; each of its jobs is told then for
    which of these it waits, and ends with it if it fails."""
    return [f"--dependency=afterany:{numbers[-1]}", "--kill-on-invalid-dep=yes"] if numbers else []


def _updates(array: JobArray, arrays: Sequence[JobArray], numbers: Sequence[str]) -> list[list[str]]:
    """Returns commands by which the jobs of an array wait for those that they start from, and for no others."""
    of_index = {
        index: f"{number}_{index}" for one, number in zip(arrays, numbers, strict=False) for index in one.indices
    }
    return [
        [
            "scontrol",
            "update",
            f"JobId={','.join(of_index[child] for child in children)}",
            f"Dependency=afterok:{':'.join(of_index[parent] for parent in parents)}",
        ]
        for parents, children in array.waits.items()
    ]
