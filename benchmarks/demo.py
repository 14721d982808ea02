"""Time, memory and downloads of `make demo` as a new user meets it: an empty folder, an empty home, a new environment.

    python benchmarks/demo.py [--keep FOLDER]

Clones the checkout that this file lies in (what is committed), runs `make demo` there and prints the totals. Memory is
the largest sum over all processes of what is theirs alone (unique set size), looked at every two seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil


def memory_of_tree(pid: int) -> int:
    """Bytes that a process and its descendants hold for themselves."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total


def main() -> int:
    """Prints the totals; the exit status is that of `make demo`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", type=Path, help="clone into this folder and leave it there")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    folder = (arguments.keep or scratch / "clone").resolve()
    home = scratch / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(Path(__file__).parents[1]), str(folder)], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    started = time.perf_counter()
    demo = subprocess.Popen(["make", "demo"], cwd=folder, env=environment | {"HOME": str(home)})
    peak = 0
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(2.0):
            peak = max(peak, memory_of_tree(demo.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = demo.wait()
    over.set()
    watcher.join()
    seconds = time.perf_counter() - started
    archives = sum(path.stat().st_size for path in (folder / "data_cache" / "archives").rglob("*") if path.is_file())
    print(f"make demo: {seconds / 60:.1f} minutes, {peak / 1e9:.1f} GB at most, {archives / 1e6:.0f} MB of text")
    shutil.rmtree(scratch, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
