"""The folder of one run: the truth about it, which MLflow and the reports mirror."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from moe_testbed.launcher.config.experiment import ExperimentConfig, dump_config, load_experiment
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.files import read_json, read_json_lines, write_atomically, write_bytes_atomically

Arrays = Mapping[str, npt.NDArray[Any]]

# What decides a run's result. The rest (where it runs and on how many ranks, how often it saves) may change between two
# starts.
_DECIDING = ("seed", "data", "model", "routing", "training", "evaluation")

# Folders with one file of arrays for each step that was looked at.
_SERIES = ("evaluations", "statistics")
_ANALYSIS = "analysis.npz"


def is_finished(run_dir: Path) -> bool:
    """The folder holds a run that has come to its end."""
    return read_json(run_dir / "status.json").get("state") == "finished"


class RunFolder:
    """Reads and writes the files of a run; only rank 0 holds one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for kind in _SERIES:
            (path / kind).mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / ".lock", timeout=0)

    @classmethod
    def claim(cls, path: Path, config: ExperimentConfig, manifest: Mapping[str, Any]) -> RunFolder:
        """The folder of a new run, or of the same run begun earlier, locked until :meth:`release`.

        Args:
            manifest: of the token store that the run reads.

        Raises:
            ConfigError: the folder holds a run of another config or on other data, or another process is at it.
        """
        folder = cls(path)
        try:
            folder._lock.acquire()
        except Timeout:
            raise ConfigError(f"{path} is in use by another process; wait for it, or choose another folder") from None
        try:
            # Not before: the config of a training that is going on stays as it is.
            cls.prepare(path, config)
            earlier = read_json(path / "manifest.json")
            if earlier and earlier != json.loads(json.dumps(manifest)):
                raise ConfigError(
                    f"{path} holds a run on other data (domains then: {', '.join(earlier['domains'])}; now: "
                    f"{', '.join(manifest['domains'])}; see its manifest.json); choose another folder, or remove it"
                )
            folder.write_json("manifest.json", dict(manifest))
        except BaseException:
            folder.release()
            raise
        return folder

    @classmethod
    def prepare(cls, path: Path, config: ExperimentConfig) -> None:
        """Writes the config into a folder that is new or holds the same run.

        Raises:
            ConfigError: the folder holds a run of another config.
        """
        written = cls(path).path / "config.yaml"
        if written.exists():
            earlier = load_experiment(written)
            differing = [part for part in _DECIDING if _deciding(earlier, part) != _deciding(config, part)]
            if differing:
                raise ConfigError(
                    f"{path} holds a run that differs in {', '.join(differing)}; choose another folder, or remove it "
                    "to train anew"
                )
        write_atomically(written, dump_config(config))

    def release(self) -> None:
        """Lets other processes write the folder."""
        self._lock.release()

    @property
    def last_step(self) -> int:
        """Optimizer steps that the status file tells of."""
        return int(read_json(self.path / "status.json").get("step", 0))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes one JSON file as a whole."""
        write_atomically(self.path / name, json.dumps(content, indent=1) + "\n")

    def write_status(self, state: str, step: int, steps: int, reason: str | None = None) -> None:
        """``state`` is running, finished, stopped (asked to, with a checkpoint) or failed."""
        self.write_json("status.json", {"state": state, "step": step, "steps": steps, "reason": reason})

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write_arrays(self, kind: Literal["evaluations", "statistics"], step: int, arrays: Arrays) -> None:
        """Writes what was seen after ``step`` optimizer steps."""
        self._write_npz(f"{kind}/step_{step:08d}.npz", {"step": np.array(step), **arrays})

    def write_analysis(self, arrays: Arrays) -> None:
        """Writes what was found after the last step."""
        self._write_npz(_ANALYSIS, arrays)

    def _write_npz(self, name: str, arrays: Arrays) -> None:
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
        write_bytes_atomically(self.path / name, content.getvalue())

    def rewind(self, step: int) -> float:
        """Forgets what was written after ``step``, where training continues.

        Returns:
            Seconds of training up to there.
        """
        metrics = self.path / "metrics.jsonl"
        kept = [line for line in read_json_lines(metrics) if line["step"] <= step]
        write_atomically(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        for path in (path for kind in _SERIES for path in (self.path / kind).glob("step_*.npz")):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        (self.path / _ANALYSIS).unlink(missing_ok=True)
        return max((float(line["seconds"]) for line in kept if "seconds" in line), default=0.0)


def _deciding(config: ExperimentConfig, part: str) -> Any:
    value = getattr(config, part)
    # The same data may lie in another place.
    return value.model_copy(update={"cache_dir": ""}) if part == "data" else value
