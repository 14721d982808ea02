"""Damage: a file of a store, a checkpoint, a run or MLflow's state is cut, changed or gone.

The command continues and comes to the same bits, or refuses in one line; what is whole stays as it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.campaign.commands import RUN, complaint, contents, copied, difference, outcome, prepare, run
from tests.campaign.trials import Part, Trial, without_one

ACTS = ("cut", "flip", "delete", "empty", "zeros", "longer", "swap")
WORLDS = {
    # What has been done -> what is done after the damage.
    "a store": (("build",), ("build", "train")),
    "a training that was killed": (("build", "interrupted"), ("train", "train", "train", "analyze")),
    "a finished training": (("build", "train", "sync"), ("train", "sync", "analyze")),
    "a finished suite": (("build", "compare"), ("compare", "report", "report")),
}
RECORDS = ("metrics.jsonl", "status.json", "summary.json", ".npz", "log.txt", "mlflow.json", "results.json")
"""What tells of the past. Nothing computes it anew, and nothing can tell that a digit in it has changed."""


class Damage(Part):
    """A trial is a world, the damages of some of its files, and the command that follows."""

    name = "damage"
    number = 1_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._worlds: dict[str, Path] = {}
        self._whole: dict[str, dict[str, Any]] = {}

    def draw(self, generator: random.Random) -> Trial:
        name = generator.choice(
            ("a store", *["a training that was killed"] * 4, "a finished training", "a finished suite")
        )
        commands = WORLDS[name][1]
        command = generator.choice(commands)
        files = self._damageable(name, command)
        damages = [
            {
                "file": generator.choice(files),
                "act": generator.choice(ACTS),
                "at": generator.random(),
                "bit": generator.randrange(8),
            }
            for _ in range(generator.choice((1, 1, 1, 2)))
        ]
        return {"world": name, "command": command, "damages": damages}

    def smaller(self, trial: Trial) -> Iterator[Trial]:
        if len(trial["damages"]) > 1:
            for fewer in without_one(trial["damages"]):
                yield {**trial, "damages": fewer}

    def fault(self, trial: Trial) -> str | None:
        command, world = trial["command"], copied(self._world(trial["world"]), self.folder / "trial")
        for one in trial["damages"]:
            _damage(world / one["file"], one["act"], one["at"], one["bit"])
        damaged = {one["file"] for one in trial["damages"]}
        before = contents(world)
        result = run(command, world)
        if wrong := complaint(result):
            return wrong
        after = contents(world)
        if lost := _lost(before, after, damaged, result.returncode, command):
            return lost
        if result.returncode == 2:
            return None
        exempt = frozenset(
            part for file in damaged if file.endswith(RECORDS) for part in (file.removeprefix(f"{RUN}/"), file)
        )
        if command in ("report", "analyze", "sync", "compare") and any(file.endswith(RECORDS) for file in damaged):
            return None
        if command == "analyze" and "is passed over" in result.stderr:
            # An older checkpoint is analysed, which is told, and stands in the report.
            return None
        finished = trial["world"].startswith("a finished")
        if finished and command != "analyze" and any("/checkpoints/" in file for file in damaged):
            # What is finished reads no checkpoint again.
            return None
        if finished and command == "train" and any(file.endswith(RECORDS) for file in damaged):
            # Nor does it read its records.
            return None
        try:
            found = outcome(command, world)
        except Exception as error:
            return f"status 0, and what it left cannot be read: {type(error).__name__}: {error}"
        return difference(found, self._expected(trial["world"], command), exempt)

    def _world(self, name: str) -> Path:
        if name not in self._worlds:
            self._worlds[name] = prepare(self.folder / name.replace(" ", "_"), *WORLDS[name][0])
        return self._worlds[name]

    def _expected(self, name: str, command: str) -> dict[str, Any]:
        """Returns the outcome of the command in a world without damage."""
        key = f"{name}: {command}"
        if key not in self._whole:
            world = copied(self._world(name), self.folder / "undamaged")
            result = run(command, world)
            assert result.returncode == 0, result.stderr
            self._whole[key] = outcome(command, world)
        return self._whole[key]

    def _damageable(self, name: str, command: str) -> list[str]:
        """Returns the files that the command may read, but for those that a user has written."""
        folders = {
            "build": ("data_cache",),
            "train": ("data_cache/stores", RUN),
            "sync": (RUN, "mlflow.db"),
            "analyze": (RUN, "data_cache/stores"),
        }
        within = folders.get(command, ("runs/pair",))
        return [file for file in contents(self._world(name)) if file.startswith(within) and not file.endswith(".lock")]


def _damage(path: Path, act: str, at: float, bit: int) -> None:
    if not path.exists():
        return
    content = bytearray(path.read_bytes())
    place = int(at * len(content))
    if act == "delete":
        path.unlink()
        return
    if act == "cut":
        content = content[:place]
    elif act == "flip" and content:
        content[place] ^= 1 << bit
    elif act == "empty":
        content = bytearray()
    elif act == "zeros":
        content[place:] = bytes(len(content) - place)
    elif act == "longer":
        content += content[place:] or b"\0"
    elif act == "swap":
        content = content[place:] + content[:place]
    path.write_bytes(content)


def _lost(
    before: dict[str, bytes], after: dict[str, bytes], damaged: set[str], status: int, command: str
) -> str | None:
    """Returns what was whole and is so no more: anything if the command has refused, else what it does not write."""
    for name, content in before.items():
        if name in damaged or name.endswith(("status.json", "log.txt", ".log", ".db")):
            continue
        if after.get(name) != content and (status == 2 or not name.startswith(("runs", "data_cache"))):
            how = "changed" if name in after else "gone"
            return f"{name} was whole and is {how} after {command} ended with status {status}"
    return None
