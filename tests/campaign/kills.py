"""Kills: a command is killed by SIGKILL at a random moment, once or twice, and started again. Its end is the same."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from tests.campaign.commands import complaint, copied, difference, outcome, prepare, run, start
from tests.campaign.trials import Part, Trial
from tests.distributed.real_ranks import free_port

WORLDS = {
    "build": (),
    "train": ("build",),
    "train on 2 ranks": ("build",),
    "compare": ("build",),
    "report": ("build", "compare"),
    "analyze": ("build", "train"),
    "sync": ("build", "train"),
}
SHARES = {"build": 2, "train": 6, "train on 2 ranks": 5, "compare": 1, "report": 1, "analyze": 2, "sync": 3}
"""How often each is drawn: what holds more state, more often."""
MOST_SECONDS = 240.0


class Kills(Part):
    """A trial is a command, and after which shares of its usual time it is killed."""

    name = "kills"
    number = 200

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._whole: dict[str, tuple[Path, float, dict[str, Any]]] = {}

    def draw(self, generator: random.Random) -> Trial:
        (name,) = generator.choices(list(SHARES), list(SHARES.values()))
        moments = [generator.random() for _ in range(generator.choice((1, 1, 2)))]
        return {"command": name, "moments": moments, "rank": generator.randrange(2)}

    def fault(self, trial: Trial) -> str | None:
        name = trial["command"]
        world, seconds, expected = self._of(name)
        folder = copied(world, self.folder / "trial")
        for moment in trial["moments"]:
            self._killed(name, folder, moment * seconds, trial["rank"])
        if name == "train on 2 ranks":
            statuses, told = _on_two_ranks(folder, None)
            wrong = None if statuses == [0, 0] else f"started again, the ranks end with {statuses}: {told[-400:]}"
        else:
            result = run(name, folder)
            wrong = complaint(result) or (
                f"started again, it refuses: {result.stderr[-400:]}" if result.returncode else None
            )
        return wrong or difference(outcome(name.split()[0], folder), expected)

    def _killed(self, name: str, folder: Path, seconds: float, rank: int) -> None:
        if name == "train on 2 ranks":
            _on_two_ranks(folder, seconds, rank)
            return
        process = start(name, folder, folder / "killed.log")
        time.sleep(seconds)
        process.kill()
        process.wait()

    def _of(self, name: str) -> tuple[Path, float, dict[str, Any]]:
        """Returns the world before a command, its usual seconds, and what it makes."""
        if name not in self._whole:
            world = prepare(self.folder / name.replace(" ", "_"), *WORLDS[name])
            folder = copied(world, self.folder / "undisturbed")
            began = time.monotonic()
            if name == "train on 2 ranks":
                statuses, told = _on_two_ranks(folder, None)
                assert statuses == [0, 0], told
            else:
                result = run(name, folder)
                assert result.returncode == 0, result.stderr
            self._whole[name] = (world, time.monotonic() - began, outcome(name.split()[0], folder))
        return self._whole[name]


def _on_two_ranks(folder: Path, kill_after: float | None, rank: int = 0) -> tuple[list[int], str]:
    """Trains on two ranks, of which one may be killed; the other must then end by itself. Returns their statuses."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [folder / f"rank{number}.log" for number in range(2)]
    ranks = [
        start("train", folder, log, **common, RANK=str(number), LOCAL_RANK=str(number), SLURMD_NODENAME=f"node{number}")
        for number, log in enumerate(logs)
    ]
    try:
        if kill_after is not None:
            time.sleep(kill_after)
            ranks[rank].kill()
        statuses = [process.wait(MOST_SECONDS) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return statuses, "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
