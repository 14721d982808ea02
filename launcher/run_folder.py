"""The folder of one run: the truth about it, which MLflow and the reports mirror."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from moe_testbed.launcher.config import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError

# The parts of a config that decide a run's result; the others (where it runs, how often it saves) may change between
# two starts.
_DECIDING = ("seed", "data", "model", "routing", "training", "parallel", "evaluation")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a later start after a crash, sees the old or the new one and never a
    half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class RunFolder:
    """Reads and writes the files of a run; only rank 0 holds one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "evaluations").mkdir(parents=True, exist_ok=True)

    @classmethod
    def claim(cls, path: Path, config: ExperimentConfig) -> RunFolder:
        """The folder of a new run, or of the same run begun earlier.

        Raises:
            ConfigError: the folder holds a run of another config.
        """
        folder = cls(path)
        resolved = config.model_dump(mode="json")
        written = path / "config.yaml"
        if written.exists():
            earlier = yaml.safe_load(written.read_text(encoding="utf-8"))
            differing = [part for part in _DECIDING if earlier.get(part) != resolved[part]]
            if differing:
                raise ConfigError(
                    f"{path} holds a run that differs in {', '.join(differing)}; choose another --run-dir, "
                    "or remove the folder to train anew"
                )
        write_atomically(written, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        return folder

    def last_step(self) -> int:
        """Optimizer steps that the status file tells of."""
        try:
            return int(json.loads((self.path / "status.json").read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError):
            return 0

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes one JSON file as a whole."""
        write_atomically(self.path / name, json.dumps(content, indent=1, sort_keys=True) + "\n")

    def write_status(self, state: str, step: int, steps: int, reason: str | None = None) -> None:
        """``state`` is running, finished or failed."""
        self.write_json("status.json", {"state": state, "step": step, "steps": steps, "reason": reason})

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write_evaluation(self, step: int, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Writes the evaluation after ``step`` optimizer steps."""
        path = self.path / "evaluations" / f"step_{step:08d}.npz"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            np.savez_compressed(file, **{"step": np.array(step), **arrays})  # type: ignore[arg-type]
        os.replace(temporary, path)

    def rewind(self, step: int) -> float:
        """Forgets what was written after ``step``, where training continues.

        Returns:
            Seconds of training up to there.
        """
        metrics = self.path / "metrics.jsonl"
        kept = []
        if metrics.exists():
            for text in metrics.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    break  # the last line of a process that was killed while writing
                if line["step"] <= step:
                    kept.append(line)
            write_atomically(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        for path in (self.path / "evaluations").glob("step_*.npz"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        return max((float(line["seconds"]) for line in kept if "seconds" in line), default=0.0)
