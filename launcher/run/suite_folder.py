"""The folder of a suite: the folders of its trainings, and the files that are of all of them.

As in `folder`, no other module knows the name of a file in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moe_testbed.launcher.config.names import label_and_seed, training_name
from moe_testbed.launcher.config.yaml_text import to_yaml
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.files import (
    load_yaml,
    read_json,
    read_yaml,
    value_at,
    write_atomically,
    write_privately,
)
from moe_testbed.launcher.run.folder import RunFolder


@dataclass(frozen=True)
class SubmittedJobs:
    """What SLURM was given last.

    Attributes:
        arrays: number of each job array -> names of its trainings. Their indices go on from one array to the next.
    """

    arrays: Mapping[str, Sequence[str]]

    def numbers(self) -> dict[str, str]:
        """Returns name of each training -> number of its job, such as 12_3."""
        jobs = [(array, run) for array, runs in self.arrays.items() for run in runs]
        return {run: f"{array}_{index}" for index, (array, run) in enumerate(jobs)}


class SuiteFolder:
    """Reads and writes the files of a suite. Making one touches no file.

    Attributes:
        path: the path of the folder; the others are paths in it.
        results_table: the numbers of the results, a row each.
        slurm: folder of the batch script and of what SLURM itself says of the jobs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "suite.yaml"
        self.results_file = path / "results.json"
        self.results_table = path / "results.csv"
        self.page = path / "report.html"
        self.figures = path / "figures"
        self.tables = path / "tables"
        self.slurm = path / "slurm"
        self.job_script_file = self.slurm / "job.sh"
        self.job_environment_file = self.slurm / "environment.sh"
        self._jobs_file = self.slurm / "jobs.json"
        self._lock_file = path / ".lock"

    @property
    def is_suite(self) -> bool:
        """Whether the folder is a suite's."""
        return self.config_file.is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the folder, which is made if it is not there; the lock goes with the process, however it ends.

        Raises:
            ConfigError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock_file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"{self.path} is being compared or submitted by another process; wait for it, or choose another "
                "--runs-dir"
            ) from None
        try:
            yield
        finally:
            lock.release()

    # The trainings.

    def training(self, label: str, seed: int) -> RunFolder:
        """Returns the folder of one training."""
        return RunFolder(self.path / training_name(label, seed))

    def trainings(self) -> list[RunFolder]:
        """Returns the folders of the trainings that have a config, in the order of their names."""
        folders = map(RunFolder, sorted(self.path.iterdir())) if self.path.is_dir() else ()
        return [folder for folder in folders if folder.is_run]

    def begun_trainings(self) -> list[RunFolder]:
        """Returns the folders of the trainings that have begun; the others have a config and no status yet."""
        folders = map(RunFolder, sorted(self.path.iterdir())) if self.path.is_dir() else ()
        return [folder for folder in folders if folder.has_begun]

    def children(self, run: RunFolder) -> list[RunFolder]:
        """Returns the folders of the trainings that start from one of the suite."""
        of_run = label_and_seed(run.path.name)
        return [folder for folder in self.trainings() if of_run is not None and _parent(folder) == of_run]

    # What the suite is.

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes what the suite is, as plain values."""
        write_atomically(self.config_file, to_yaml(config))

    def read_config_tree(self) -> dict[str, Any]:
        """Returns what the suite is as it stands in the file, unchecked; empty if it cannot be read."""
        return read_yaml(self.config_file)

    def load_config_tree(self) -> Any:
        """Returns what stands in the file that says what the suite is. Raises ValueError, in one line, if it cannot be
        read."""
        try:
            return load_yaml(self.config_file)
        except (OSError, ValueError) as error:
            words = " ".join(str(error).split())
            raise ValueError(
                f"{self.path} is not a suite's folder: {self.config_file.name} cannot be read ({words})"
            ) from None

    # What a report finds.

    def read_results(self) -> dict[str, Any]:
        """Returns the numbers of the report that was written last; empty if there is none."""
        return read_json(self.results_file)

    def write_results(self, results: Mapping[str, Any], table: str) -> None:
        """Writes the numbers of a report, and the same as a table."""
        write_atomically(self.results_file, json.dumps(dict(results), indent=1, allow_nan=False) + "\n")
        write_atomically(self.results_table, table)

    # What SLURM is given.

    def write_job(self, script: str, environment: str) -> None:
        """Writes the batch script and, so that no other user can read them, the variables of the cluster's file."""
        self.slurm.mkdir(exist_ok=True)
        write_privately(self.job_environment_file, environment)
        write_atomically(self.job_script_file, script)

    def write_jobs(self, jobs: SubmittedJobs) -> None:
        """Remembers what SLURM was given."""
        write_atomically(self._jobs_file, json.dumps(asdict(jobs), indent=1) + "\n")

    def read_jobs(self) -> SubmittedJobs | None:
        """Returns what SLURM was given last; None if nothing."""
        content = read_json(self._jobs_file)
        if not content:
            return None
        # Once there was only one array.
        return SubmittedJobs(content.get("arrays") or {content["array"]: content["runs"]})

    def job_log(self, number: str) -> Path:
        """Returns what SLURM says of a job; its number may be a placeholder of SLURM's or of the shell's."""
        return self.slurm / f"{number}.txt"


def _parent(folder: RunFolder) -> tuple[str, int] | None:
    """Returns label and seed of the training that this one starts from, if that is one of the same suite."""
    start, own = value_at(folder.read_config_tree(), "start", "encoder", "run"), label_and_seed(folder.path.name)
    return (start, own[1]) if own is not None and isinstance(start, str) else None
