"""`make campaign`: trials drawn at random, each with an oracle; what fails becomes a case as small as it can be.

docs/campaign.md says what is tried.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.campaign.configs import Configs
from tests.campaign.corpora import Corpora
from tests.campaign.damage import Damage
from tests.campaign.disk_full import DiskFull
from tests.campaign.kills import Kills
from tests.campaign.long_run import train_long
from tests.campaign.pure import NUMBER, run_properties
from tests.campaign.records import Records
from tests.campaign.trials import Part, run_case, run_part
from tests.processes.forkserver import import_ahead

PARTS: dict[str, type[Part]] = {part.name: part for part in (Configs, Corpora, Records, Damage, Kills, DiskFull)}
PURE, LONG = "pure", "long"
# What a report and an analysis import beside what a training does: half of what a small one costs.
IMPORTED_AHEAD = (
    "moe_testbed.launcher.analyze.analyze",
    "moe_testbed.launcher.report.figures.drawing",
    "matplotlib.pyplot",
)


def main() -> int:
    """Returns 0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="make campaign", description=__doc__)
    parser.add_argument(
        "--parts", default="all", help=f"some of {', '.join((*PARTS, PURE, LONG))}, with commas between"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=0.0, help="for each part; 0: as many as it takes")
    parser.add_argument("--number", type=int, default=0, help="trials of each part; 0: as many as a whole campaign has")
    parser.add_argument(
        "--first", type=int, default=0, help="the number of the first trial: a part that was stopped goes on"
    )
    parser.add_argument("--steps", type=int, default=20_000, help="of the long training")
    parser.add_argument("--cases", type=Path, default=Path("runs/campaign"), help="where faults are written")
    parser.add_argument("--case", type=Path, help="try the trial in this folder once more, and nothing else")
    arguments = parser.parse_args()
    import_ahead(*IMPORTED_AHEAD)
    if arguments.case:
        fault = run_case(PARTS, arguments.case)
        print(fault or "nothing is wrong")
        return int(fault is not None)
    names = [*PARTS, PURE, LONG] if arguments.parts == "all" else arguments.parts.split(",")
    found = 0
    for name in names:
        if name == LONG:
            with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
                found += len(train_long(Path(folder), arguments.steps))
            continue
        if name == PURE:
            found += len(run_properties(arguments.number or NUMBER, arguments.seed, arguments.cases))
            continue
        until = time.monotonic() + (60 * arguments.minutes or 1e9)
        found += len(
            run_part(
                PARTS[name],
                arguments.seed,
                arguments.first,
                arguments.number or PARTS[name].number,
                until,
                arguments.cases,
            )
        )
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
