"""What time, memory and downloads does `make demo` take in an empty folder, with an empty home and a new environment?

    python benchmarks/demo.py [--keep FOLDER] [--pictures docs/images]

Clones the checkout that this file lies in (what is committed), runs `make demo` there and prints the totals and the
tables of README and docs/results.md; ``--pictures`` copies the report's pictures that they show. Memory is
the largest sum over all processes of what is theirs alone (unique set size), looked at every two seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from suite_tables import loss, recovered, routing, text

from moe_testbed.launcher.report.numbers.results import ranked, read_results

PICTURES = (
    "scatter",
    "routing_top_k_global",
    "routing_top_k_sequence",
    "causal_top_k_global",
    "causal_top_k_sequence",
)
SHOWN = {
    "reference_hash": "reference, a table by token id inside the groups",
    "reference_learned": "reference, learned top-k inside the groups",
    "permuted_reference": "the reference with permuted labels: its control",
    "top_k_global": "learned top-k, balanced over the global batch",
    "top_k_sequence": "learned top-k, balanced within every sequence",
    "top_k_loss_free": "sigmoid scores, loss-free bias over the global batch",
    "hash": "a table by token id",
    "random": "fresh random experts for every token",
}
FORCED = ("top_k_global", "top_k_sequence", "reference_hash")
FIRST = {
    "reference_hash": "the reference: it is told the domain",
    "top_k_global": "learned, its load even over the whole batch",
    "top_k_sequence": "learned, its load even within every sequence",
    "permuted_reference": "the control: the reference with shuffled domains",
}


def memory_of_tree(pid: int) -> int:
    """Returns the bytes that a process and its descendants hold for themselves."""
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


def said_of(suite: Path) -> dict[str, Any]:
    """Returns the table of docs/results.md, the four rows of it that README begins with, and what forcing costs."""
    runs = {run["label"]: run for run in ranked(read_results(suite))}
    columns = [("domain_information", 2), ("purity", 2), ("normalised_effective_experts", 2)]
    head = ["run", "router and balance", "validation loss", "recovered", "domain information", "purity"]
    rows = [[*head, "effective experts"]]
    for label, run in runs.items():
        metrics = [text(routing(name)(run), digits) for name, digits in columns]
        rows.append([f"`{label}`", SHOWN[label], text(loss(run), 3), recovered(run), *metrics])
    first = [["router", "recovered", "domain information"]]
    for label, shown in FIRST.items():
        share, information = runs[label]["recovered"]["value"], routing("domain_information")(runs[label])
        first.append([shown, "–" if share is None else f"{100 * share:.0f} %", text(information, 2)])
    forced = {f"forced_{label}": f"{runs[label]['causes']['forced_elsewhere']['mean']:.2f}" for label in FORCED}
    return {"figures": forced, "tables": {"demo": rows, "first": first}}


def main() -> int:
    """Prints the totals; the exit status is that of `make demo`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", type=Path, help="clone into this folder and leave it there")
    parser.add_argument("--pictures", type=Path, help="copy the pictures of the report into this folder")
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
    said = f"{seconds / 60:.1f} minutes, {peak / 1e9:.1f} GB of memory at most, {archives / 1e6:.0f} MB of text"
    print(f"make demo: {said}")
    suite = folder / "runs" / "demo"
    if status == 0 and arguments.pictures:
        for name in PICTURES:
            shutil.copy(suite / "figures" / f"{name}.png", arguments.pictures)
    if status == 0:
        found = said_of(suite)
        print(json.dumps({**found, "figures": {"demo": said, **found["figures"]}}, ensure_ascii=False))
    shutil.rmtree(scratch, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
