"""What the parts of the campaign have in common: a trial is drawn, tried and, where it fails, made small."""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

Trial = dict[str, Any]
"""What is tried, as JSON: nothing else decides the outcome."""

MOST_SMALLER = 300
"""So many smaller trials are tried for each fault at most."""
LINES = 40
"""So many lines say on the way how many trials have been tried."""


class Part(ABC):
    """One kind of trials. A part may keep what all its trials start from; `fault` leaves it as it was.

    Attributes:
        name: of the part, on the command line.
        number: trials in a whole campaign.
    """

    name: ClassVar[str]
    number: ClassVar[int]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def draw(self, generator: random.Random) -> Trial:
        """Returns a trial."""

    @abstractmethod
    def fault(self, trial: Trial) -> str | None:
        """Returns what is wrong with the outcome; None if nothing is."""

    def smaller(self, trial: Trial) -> Iterator[Trial]:
        """Yields trials that are smaller, the smallest first."""
        yield from ()


def run_part(kind: type[Part], seed: int, first: int, number: int, until: float, cases: Path) -> dict[str, str]:
    """Tries as many trials as there is time for, and writes a folder for each fault that is of a kind of its own.

    Args:
        seed: with the number of a trial, it decides the trial.
        first: number of the first trial.
        number: of the trial after the last.
        until: `time.monotonic()` after which no trial is begun.
        cases: where the folders of faults are written.

    Returns:
        The faults, by the folder of their case.
    """
    found: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    started, done = time.monotonic(), first
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        part = kind(Path(folder))

        def tell() -> None:
            seconds, faults = time.monotonic() - started, f"{kinds.total()} faults of {len(kinds)} kinds"
            tried = f"trials {first} to {done} of {number}" if first else f"{done} of {number} trials"
            print(f"{kind.name}: seed {seed}, {tried} in {seconds:.0f} s, {faults}", flush=True)

        while done < number and time.monotonic() < until:
            trial = part.draw(random.Random(f"{kind.name} {seed} {done}"))
            fault = part.fault(trial)
            if fault is not None:
                kinds[_kind(fault)] += 1
                if kinds[_kind(fault)] == 1:
                    trial, fault = _shrunk(part, trial, fault, until)
                    case = cases / f"{kind.name}-{seed}-{done}"
                    _write_case(case, kind.name, trial, fault)
                    found[str(case)] = fault
                    print(f"{case}: {fault}", flush=True)
            done += 1
            if done % max(number // LINES, 1) == 0:
                tell()
    tell()
    return found


def run_case(kinds: dict[str, type[Part]], case: Path) -> str | None:
    """Tries the trial of a case's folder once more and returns its fault."""
    content = json.loads((case / "trial.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        return kinds[content["part"]](Path(folder)).fault(content["trial"])


def _shrunk(part: Part, trial: Trial, fault: str, until: float) -> tuple[Trial, str]:
    """Returns the smallest trial that was found to have a fault of the same kind, and its fault."""
    tried, progress = 0, True
    while progress:
        progress = False
        for smaller in part.smaller(trial):
            tried += 1
            if tried > MOST_SMALLER or time.monotonic() > until:
                return trial, fault
            again = part.fault(smaller)
            if again is not None and _kind(again) == _kind(fault):
                trial, fault, progress = smaller, again, True
                break
    return trial, fault


def _kind(fault: str) -> str:
    """Returns a fault without what differs from one trial to the next: names in quotes, numbers."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+|/\S+", "", fault)[:60]


def _write_case(case: Path, part: str, trial: Trial, fault: str) -> None:
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir(parents=True)
    (case / "trial.json").write_text(json.dumps({"part": part, "trial": trial}, indent=1) + "\n", encoding="utf-8")
    (case / "fault.txt").write_text(f"{fault}\n", encoding="utf-8")


def without_one(items: list[Any]) -> Iterator[list[Any]]:
    """Yields the list without a part of it: halves first, then single items."""
    size = len(items) // 2
    while size:
        for start in range(0, len(items), size):
            yield items[:start] + items[start + size :]
        size //= 2
