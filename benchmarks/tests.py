"""How long do the tests take? Targets of the Makefile run one after the other; nothing else should run beside them.

    python benchmarks/tests.py [TARGET ...]      # without targets: test, test-all and test-cluster

`test-all` begins with `test`, so that its time contains it. `test-cluster` needs root and Debian's packages.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def measure(target: str) -> list[str]:
    """Returns the row of a target: minutes, and what pytest's closing lines count. Ends the program if it fails."""
    started = time.perf_counter()
    done = subprocess.run(["make", target], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    minutes = (time.perf_counter() - started) / 60
    if done.returncode != 0:
        print(done.stdout[-4000:], file=sys.stderr)
        sys.exit(f"make {target} failed")
    passed = sum(int(number) for number in re.findall(r"(\d+) passed", done.stdout))
    skipped = sum(int(number) for number in re.findall(r"(\d+) skipped", done.stdout))
    return [f"`make {target}`", f"{minutes:.1f}", str(passed), str(skipped)]


def main() -> None:
    """Prints one row for each target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("targets", nargs="*", default=["test", "test-all", "test-cluster"])
    rows = [["command", "minutes", "tests passed", "skipped"]]
    for target in parser.parse_args().targets:
        rows.append(measure(target))
        print(", ".join(rows[-1]), flush=True)
    print(json.dumps({"tables": {"test_times": rows}}))


if __name__ == "__main__":
    main()
