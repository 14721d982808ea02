"""The folder of one run: the truth about it, which MLflow and the reports mirror.

No other module knows the name of a file in it. Reading is lenient: a file that is missing or was cut off counts as
empty, since others may look while a training writes, or after it has died.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from numpy.typing import NDArray

from moe_testbed.launcher.config.yaml_text import to_yaml
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.array_file import ArrayFile, load_arrays
from moe_testbed.launcher.run.arrays import Ablation, Evaluation, RoutingProbe
from moe_testbed.launcher.run.files import read_json, read_json_lines, read_yaml, write_bytes_atomically
from moe_testbed.launcher.run.ownership import refuse_foreign, writable_by_owner
from moe_testbed.launcher.run.probing import ProbingRecord
from moe_testbed.launcher.run.records import JobEnds, Manifest, MetricsLine, Progress, StartRecord, Status, Summary
from moe_testbed.launcher.run.steps import step_name, step_of, steps_in

if TYPE_CHECKING:
    from moe_testbed.launcher.config.experiment import ExperimentConfig

# What decides a run's result. The rest (where it runs and on how many ranks, how often it saves) may change between two
# starts.
_DECIDING = ("seed", "data", "model", "routing", "objective", "start", "freeze", "training", "evaluation")

_TAIL_BYTES = 16_384
_EXPERT_TABLE = ("layer", "domain", "expert")


class RunFolder:
    """Reads and writes the files of a run. Making one touches no file.

    Attributes:
        path: the path of the folder; the others are paths in it.
        checkpoints: folder of the checkpoints.
        log_file: what the process says that trains, where a suite has started it.
        rank_logs: folder of what each rank says, where SLURM has started it.
        job_start_file: written when a job of SLURM starts.
        launch_hosts_file, launch_script_file: the hosts, and what starts a process on one with its variables.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.manifest_file = path / "manifest.json"
        self.status_file = path / "status.json"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.evaluations = path / "evaluations"
        self.probes = path / "statistics"
        self.ablation_file = path / "analysis.npz"
        self.start_file = path / "start.json"
        self.probing = path / "probing"
        self.checkpoints = path / "checkpoints"
        self.log_file = path / "log.txt"
        self.rank_logs = path / "logs"
        self.job_start_file = self.rank_logs / "started"
        self.job_ends_file = path / "ends.json"
        self.launch_hosts_file = path / "launch.hosts"
        self.launch_script_file = path / "launch.sh"
        self._lock_file = path / ".lock"
        self._lock: FileLock | None = None

    # A new folder, and whose it is.

    @classmethod
    def claim(cls, path: Path, config: ExperimentConfig, manifest: Manifest, trust: bool = False) -> RunFolder:
        """Returns the folder of a new run, or of the same run begun earlier, locked until `release`.

        Args:
            manifest: the manifest of the token store that the run reads.
            trust: as `prepare` has it.

        Raises:
            ConfigError: the folder is another user's, holds a run of another config or on other data, or is in use.
        """
        folder = cls(path)
        folder.create()
        folder._lock = FileLock(folder._lock_file, timeout=0)
        try:
            folder._lock.acquire()
        except Timeout:
            raise ConfigError(f"{path} is in use by another process; wait for it, or choose another folder") from None
        try:
            # Not before: the config of a training that is going on stays as it is.
            folder.prepare(config, trust)
            if folder.is_on_other_data(manifest):
                raise ConfigError(
                    f"{path} holds a run on other data (domains then: "
                    f"{', '.join(folder.read_manifest().domains)}; now: {', '.join(manifest.domains)}; "
                    f"see its {folder.manifest_file.name}); choose another folder, or remove it"
                )
            folder.write_manifest(manifest)
        except BaseException:
            folder.release()
            raise
        return folder

    def release(self) -> None:
        """Lets other processes write the folder."""
        if self._lock is not None:
            self._lock.release()

    def create(self) -> None:
        """Makes the folder, if it is not there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with writable_by_owner():
            self.path.mkdir(exist_ok=True)
        for series in (self.evaluations, self.probes):
            series.mkdir(exist_ok=True)

    def prepare(self, config: ExperimentConfig, trust: bool = False) -> None:
        """Writes the config into a folder that is new or holds the same run, whose checkpoints may then be unpickled.

        Raises:
            ConfigError: the folder holds a run of another config, or of another user whom the user does not `trust`.
        """
        # Not at the top: it imports torch, which takes seconds, and much of this module is for commands that are quick.
        from moe_testbed.launcher.config.experiment import dump_config

        self.create()
        if not trust:
            refuse_foreign(self.path, self.config_file, self.checkpoints)
        if self.config_file.exists():
            earlier = self.read_config()
            differing = [part for part in _DECIDING if _deciding(earlier, part) != _deciding(config, part)]
            if differing:
                raise ConfigError(
                    f"{self.path} holds a run that differs in {', '.join(differing)}; choose another folder, or remove "
                    "it to train anew"
                )
        with writable_by_owner():
            self._write(self.config_file, dump_config(config).encode())

    # What was trained, on what.

    @property
    def is_run(self) -> bool:
        """Whether the folder is a run's."""
        return self.config_file.is_file()

    @property
    def has_begun(self) -> bool:
        """Whether the training has begun: before, it has a config and no status."""
        return self.status_file.is_file()

    def read_config(self) -> ExperimentConfig:
        """Returns the checked config. Raises ConfigError."""
        from moe_testbed.launcher.config.experiment import load_experiment

        return load_experiment(self.config_file)

    def read_config_tree(self) -> dict[str, Any]:
        """Returns the config as it stands in the file, unchecked."""
        return read_yaml(self.config_file)

    def write_config_tree(self, tree: Mapping[str, Any]) -> None:
        """Writes a config that no training will read: what an analysis knows of a checkpoint."""
        self._write(self.config_file, to_yaml(tree).encode())

    def read_manifest(self) -> Manifest:
        """Returns what the run's data is; an empty manifest if there is none."""
        return Manifest(read_json(self.manifest_file))

    def write_manifest(self, manifest: Manifest) -> None:
        """Writes what the run's data is."""
        self._write_json(self.manifest_file, manifest.content)

    def is_on_other_data(self, manifest: Manifest) -> bool:
        """Tells whether the folder has a manifest, and another one than this."""
        earlier = self.read_manifest().content
        return bool(earlier) and earlier != json.loads(json.dumps(manifest.content))

    # How it goes.

    def read_status(self) -> Status:
        """Returns the status; one whose state is `MISSING` if there is none."""
        return Status.of(read_json(self.status_file))

    def write_status(self, status: Status) -> None:
        """Replaces the status."""
        self._write_json(self.status_file, status.content())

    def note_end(self, state: str, reason: str) -> None:
        """Notes that a running training has come to an end, on any rank: the first reason counts, since another rank
        may have found out more."""
        status = self.read_status()
        if status.state == "running":
            self.write_status(replace(status, state=state, reason=reason))

    def note_failure(self, steps: int, reason: str) -> None:
        """Notes why a training of so many steps has failed. One that has diverged may have left this reason itself."""
        status = self.read_status()
        state = "diverged" if (status.state, status.reason) == ("diverged", reason) else "failed"
        self.write_status(Status(state, self.read_progress(steps).step, steps, reason))

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.read_status().state == "finished"

    @property
    def status_time_ns(self) -> int:
        """When the status was written, in nanoseconds since 1970; 0 if there is none."""
        try:
            return self.status_file.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def append_metrics(self, line: MetricsLine) -> None:
        """Adds one line to the metrics."""
        self._append(self.metrics_file, json.dumps(line.content()) + "\n")

    def read_metrics(self, last_bytes: int | None = None) -> list[MetricsLine]:
        """Returns the lines of the metrics in the order in which they were written.

        Args:
            last_bytes: only the lines that begin within so many bytes of the end; None: all.
        """
        lines = map(MetricsLine.of, read_json_lines(self.metrics_file, last_bytes))
        return [line for line in lines if line is not None]

    def read_metrics_from(self, offset: int) -> Iterator[tuple[MetricsLine | None, int]]:
        """Yields the whole lines of the metrics from a byte on, each with the byte behind it; from the start if the
        file was cut since. A line that says nothing is None."""
        if not self.metrics_file.exists():
            return
        with self.metrics_file.open("rb") as file:
            if offset:
                file.seek(offset - 1)
                if file.read(1) != b"\n":
                    offset = 0
            file.seek(offset)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                offset += len(text)
                yield MetricsLine.of_text(text), offset

    def read_progress(self, steps: int) -> Progress:
        """Returns how far a training of so many steps is, by the last line that it has written of a step."""
        for line in reversed(self.read_metrics(_TAIL_BYTES)):
            if line.kind == "train" and isinstance(loss := line.values.get("loss"), int | float):
                return Progress(line.step, steps, float(loss))
        return Progress(0, steps, None)

    def rewind(self, step: int) -> float:
        """Forgets what was written after ``step``, where training continues.

        Returns:
            Seconds of training up to there.
        """
        kept = [line for line in self.read_metrics() if line.step <= step]
        self._write(self.metrics_file, "".join(json.dumps(line.content()) + "\n" for line in kept).encode())
        for path in (path for series in (self.evaluations, self.probes) for path in steps_in(series)):
            if step_of(path) > step:
                self._remove(path)
        self._remove(self.ablation_file)
        return max((line.seconds for line in kept if line.seconds is not None), default=0.0)

    # What was found.

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Writes an evaluation beside those of other steps."""
        self._write_arrays(self.evaluations / f"{step_name(evaluation.step)}.npz", evaluation)

    def read_evaluation(self) -> tuple[Evaluation, list[str]]:
        """Returns the last evaluation, and a line for each of its arrays that does not fit. Raises one of `DAMAGED`."""
        files = steps_in(self.evaluations)
        if not files:
            raise ValueError("there is none")
        return Evaluation.read(files[-1])

    def write_probe(self, probe: RoutingProbe) -> None:
        """Writes a probe of the routing beside those of other steps."""
        self._write_arrays(self.probes / f"{step_name(probe.step)}.npz", probe)

    def probe_files(self) -> list[Path]:
        """Returns what `read_probe` reads, in the order of the steps."""
        return steps_in(self.probes)

    def write_ablation(self, ablation: Ablation) -> None:
        """Writes the ablation of the experts after the last step."""
        self._write_arrays(self.ablation_file, ablation)

    def read_ablation(self) -> tuple[Ablation, list[str]]:
        """Returns the ablation of the experts, and a line for each of its arrays that does not fit. Raises one of
        `DAMAGED`."""
        return Ablation.read(self.ablation_file)

    def read_expert_tables(self) -> tuple[list[str], dict[str, NDArray[Any]]]:
        """Returns the domains, and by name the tables [Y, D, E] of the last evaluation, whatever else it lacks. Raises
        one of `DAMAGED`."""
        files = steps_in(self.evaluations)
        if not files:
            raise ValueError("there is none")
        fields = Evaluation.fields()
        arrays = load_arrays(files[-1], [name for name, known in fields.items() if known.axes == _EXPERT_TABLE])
        return [str(domain) for domain in load_arrays(files[-1], ["domains"])["domains"]], arrays

    def read_summary(self) -> Summary:
        """Returns what was told of the training after its end; an empty one if nothing was."""
        return Summary.of(read_json(self.summary_file))

    def write_summary(self, summary: Summary) -> None:
        """Writes what is told of the training after its end."""
        self._write_json(self.summary_file, summary.content())

    def read_start(self) -> StartRecord | None:
        """Returns what the training has started from; None if it has drawn all its weights, or has not begun."""
        return StartRecord.of(read_json(self.start_file))

    def write_start(self, start: StartRecord) -> None:
        """Writes what the training has started from."""
        self._write_json(self.start_file, start.content())

    def write_probing(self, record: ProbingRecord) -> None:
        """Writes what a probing task has found."""
        self.probing.mkdir(exist_ok=True)
        self._write_json(self.probing / f"{record.task}.json", record.content())

    def read_probing(self) -> list[ProbingRecord]:
        """Returns what probing tasks have found, by the task's name."""
        records = map(ProbingRecord.of, map(read_json, sorted(self.probing.glob("*.json"))))
        return list(filter(None, records))

    # What SLURM's jobs have come to.

    def rank_log(self, rank: str) -> Path:
        """Returns what a rank says; its number may be a placeholder of SLURM's."""
        return self.rank_logs / f"rank-{rank}.txt"

    def read_job_ends(self) -> JobEnds:
        """Returns how the jobs have ended since the run was submitted."""
        return JobEnds.of(read_json(self.job_ends_file))

    def write_job_ends(self, ends: JobEnds) -> None:
        """Notes how the jobs have ended since the run was submitted."""
        self._write_json(self.job_ends_file, ends.content())

    def prepare_jobs(self) -> None:
        """Makes what jobs expect, and gives a run that has failed before a new chance."""
        self.rank_logs.mkdir(exist_ok=True)
        self._remove(self.job_ends_file)

    # All that writes.

    def _write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        self._write(path, (json.dumps(dict(content), indent=1) + "\n").encode())

    def _write_arrays(self, path: Path, record: ArrayFile) -> None:
        self._write(path, record.to_bytes())

    def _write(self, path: Path, content: bytes) -> None:
        write_bytes_atomically(path, content)

    def _append(self, path: Path, text: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


class SilentRunFolder(RunFolder):
    """The folder of a run as the ranks other than the first have it: they read it, and what they write is nothing."""

    def create(self) -> None:
        pass

    def _write(self, path: Path, content: bytes) -> None: ...

    def _append(self, path: Path, text: str) -> None: ...

    def _remove(self, path: Path) -> None: ...


def mlflow_file(folder: Path) -> Path:
    """Returns the file in a run's or suite's folder that says what an MLflow store has been sent of it."""
    return folder / "mlflow.json"


def mlflow_lock_file(folder: Path) -> Path:
    """Returns the file in a run's or suite's folder that is locked by whoever talks with an MLflow store about it."""
    return folder / ".mlflow.lock"


def _deciding(config: ExperimentConfig, part: str) -> Any:
    value = getattr(config, part)
    # The same data may lie in another place.
    return value.model_copy(update={"cache_dir": ""}) if part == "data" else value
