"""Stand-ins for `launch`, deepspeed and its ranks: real processes, without torch. Arguments: ROLE FOLDER."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

NUM_RANKS = 2
PATIENCE_SECONDS = 1.0


def launch(folder: Path) -> None:
    """Supervises `deepspeed` and writes how it ended."""
    from moe_testbed.launcher.cluster.launch.supervision import Lifelines, supervise
    from moe_testbed.launcher.ranks.lifeline import LIFELINE_VARIABLE

    # A shell starts what runs in the background, such as these tests, with signals ignored.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    lifelines = Lifelines(everywhere=False, num_ranks=NUM_RANKS)
    environment = os.environ | {LIFELINE_VARIABLE: f"127.0.0.1:{lifelines.port}"}
    end = supervise([sys.executable, __file__, "deepspeed", str(folder)], environment, lifelines, PATIENCE_SECONDS)
    (folder / "end.json").write_text(json.dumps(asdict(end)))


def deepspeed(folder: Path) -> None:
    """Starts ranks once the folder has a file `go`, and ends with the last of them."""
    write_pid(folder, "deepspeed")
    while not (folder / "go").exists():
        time.sleep(0.02)
    # In sessions of their own: what ends deepspeed's process group does not reach them.
    command = [sys.executable, __file__, "rank", str(folder)]
    ranks = [
        subprocess.Popen(command, env=os.environ | {"RANK": str(rank)}, start_new_session=True)
        for rank in range(NUM_RANKS)
    ]
    sys.exit(max(rank.wait() for rank in ranks))


def rank(folder: Path) -> None:
    """Trains, as it were, until the folder has a file `finish`, or one of its own, or a signal comes, which it writes
    down."""
    from moe_testbed.launcher.errors import ASKED_TO_STOP
    from moe_testbed.launcher.ranks.lifeline import end_with_launch

    name = f"rank{os.environ['RANK']}"

    def stop(number: int, frame: FrameType | None) -> None:
        (folder / f"{name}.signal").write_text(signal.Signals(number).name)
        if not (folder / "stubborn").exists():
            sys.exit(ASKED_TO_STOP)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    end_with_launch()
    write_pid(folder, name)
    while not (folder / "finish").exists() and not (folder / f"{name}.finish").exists():
        time.sleep(0.02)


def write_pid(folder: Path, name: str) -> None:
    """As a whole: the test waits for the file."""
    (folder / f".{name}").write_text(str(os.getpid()))
    os.replace(folder / f".{name}", folder / f"{name}.pid")


if __name__ == "__main__":
    {"launch": launch, "deepspeed": deepspeed, "rank": rank}[sys.argv[1]](Path(sys.argv[2]))
