"""Reruns the benchmarks behind the figures of README and docs, stamps what they say, and fills the pages with it.

    python benchmarks/figures.py [quick | tests | demo | seeds | recipes | study | NAME ...]  # or make figures
    python benchmarks/figures.py pages                                               # only fills the pages anew

Each benchmark prints lines for people, and as its last line one JSON object with what the pages say:
`{"figures": {name: text}, "tables": {name: [head, row, ...]}}`. It goes into docs/figures.json with the command, the
commit, the hardware and the date. In a page, what stands between `<!-- figure: NAME -->` or `<!-- table: NAME -->` and
`<!-- end -->` is filled from there, and `stamp` with the commit and hardware of a benchmark; the table `figures` has
one row for each figure. A benchmark that fails leaves what was there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "figures.json"
PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/figures.md",
        "docs/catalogue.md",
        "docs/checkpoints.md",
        "docs/clusters.md",
        "docs/metrics.md",
        "docs/recipes.md",
        "docs/results.md",
    )
)
_PLACE = re.compile(r"(<!-- (figure|table|stamp): (\w+) -->).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark is one command of benchmarks/, and the question that each of its figures answers."""

    name: str
    group: str
    command: str
    questions: dict[str, str]


_MEAN_STEP = "How long does a training step take"
BENCHMARKS = (
    Benchmark(
        "startup",
        "quick",
        "benchmarks/startup.py",
        {
            "help": "How long does `moe-testbed --help` take?",
            "first_step": "How long does `moe-testbed train` take to its first step?",
        },
    ),
    Benchmark("tokenise", "quick", "benchmarks/tokenise.py", {"tokenise": "How fast is text tokenised?"}),
    Benchmark(
        "moe_layer",
        "quick",
        "benchmarks/moe_layer.py",
        {"moe_layer": "What does the MoE layer cost (forward, backward) beside a dense one of equal FLOPs?"},
    ),
    Benchmark(
        "training_step",
        "quick",
        "benchmarks/training_step.py",
        {"training_step": f"{_MEAN_STEP} when freed memory is kept?"},
    ),
    Benchmark(
        "olmoe_step",
        "quick",
        "benchmarks/olmoe_step.py",
        {"olmoe_step": f"{_MEAN_STEP} of `tiny.yaml`, on one thread?"},
    ),
    Benchmark(
        "output_layer",
        "quick",
        "benchmarks/output_layer.py",
        {"output_layer": "How long do output layer and loss take beside `linear` and `cross_entropy`?"},
    ),
    Benchmark(
        "scopes",
        "quick",
        "benchmarks/scopes.py configs/experiments/tiny.yaml training.micro_batch_size=8 --rounds 3 --steps 10",
        {"scopes": f"{_MEAN_STEP} in another balancing scope than `micro_batch`, in one process?"},
    ),
    Benchmark(
        "scopes_two_ranks",
        "quick",
        "benchmarks/scopes.py configs/experiments/tiny.yaml training.micro_batch_size=8 --ranks 2 --rounds 3 --steps 8",
        {"scopes_two_ranks": "The same with two ranks over gloo?"},
    ),
    Benchmark(
        "estimators",
        "quick",
        "benchmarks/estimators.py",
        {"estimators": "How far is the gradient of a balancing estimator from that of `exact`? (deviations)"},
    ),
    Benchmark(
        "routing_statistics",
        "quick",
        "benchmarks/routing_statistics.py configs/experiments/tiny.yaml",
        {"routing_statistics": "What does looking at the routing add to a training?"},
    ),
    Benchmark(
        "metrics",
        "quick",
        "benchmarks/metrics.py",
        {
            "metrics": "How long do all count metrics of 64 layers x 256 experts x 64 domains take?",
            "coverage": "How many of 200 intervals of domain information hold the true value?",
            "percentile_coverage": "How many of 200 percentile intervals do?",
        },
    ),
    Benchmark(
        "report",
        "quick",
        "benchmarks/report.py",
        {"report": "How long does a report of 50 runs take, how large is it?"},
    ),
    Benchmark(
        "checkpoint_memory",
        "quick",
        "benchmarks/checkpoint_memory.py 64",
        {"checkpoint_memory": "How much memory does analysing a checkpoint take, for n and 4 n tokens?"},
    ),
    Benchmark("plan", "quick", "benchmarks/plan.py", {"plan": "How long does the plan of 512 GPUs take?"}),
    Benchmark("planned_layouts", "quick", "benchmarks/plan.py --table", {}),
    Benchmark("tests", "tests", "benchmarks/tests.py", {}),
    Benchmark(
        "demo",
        "demo",
        "benchmarks/demo.py --pictures docs/images",
        {
            "demo": "What does `make demo` take in an empty clone, with an empty home?",
            **{
                f"forced_{run}": f"By how many nats does the loss of `{run}` rise with other domains' experts only?"
                for run in ("top_k_global", "top_k_sequence", "reference_hash")
            },
        },
    ),
    Benchmark("seeds", "seeds", "benchmarks/seeds.py", {"seeds": "What do three seeds say of the reference's lead?"}),
    Benchmark("recipes", "recipes", "benchmarks/recipes.py", {}),
    Benchmark("study", "study", "benchmarks/study.py --pictures docs/images", {}),
)


def chosen(names: list[str]) -> list[Benchmark]:
    """Returns the benchmarks of these groups and names, in order. Raises ValueError for a name that is neither."""
    known = {name for benchmark in BENCHMARKS for name in (benchmark.name, benchmark.group)}
    if unknown := set(names) - known:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    return [benchmark for benchmark in BENCHMARKS if {benchmark.name, benchmark.group} & set(names)]


def measure(command: str) -> dict[str, Any]:
    """Runs one benchmark, shows its lines, and returns what its last line says.

    Raises:
        ValueError: the benchmark failed, or its last line is not the JSON object that is asked for.
    """
    lines = []
    with subprocess.Popen(
        [sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip("\n"))
            print(f"    {lines[-1]}", flush=True)
    if process.returncode != 0:
        raise ValueError(f"python {command} ended with status {process.returncode}: run it by itself to see why")
    try:
        said = json.loads(lines[-1])
        tables = {name: [" | ".join(row) for row in rows] for name, rows in said.get("tables", {}).items()}
        return {"figures": dict(said.get("figures", {})), "tables": tables}
    except (IndexError, ValueError, AttributeError, TypeError):
        raise ValueError(f"the last line of python {command} is not a JSON object of figures and tables") from None


def commit() -> str:
    """Returns the commit that is checked out, and whether more than the pages differs from it."""
    named = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    pages = [f":!{page.relative_to(ROOT)}" for page in (*PAGES, RESULTS)]
    status = ["git", "status", "--porcelain", "--", ".", ":!docs/images", *pages]
    changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return named.stdout.strip() + (" with changes" if changed else "")


def hardware() -> str:
    """Returns how many cores this process may use, their model, and the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores} cores of {found[1] if found else platform.machine()}, {memory:.0f} GiB"


def markdown(rows: list[str]) -> str:
    """Returns a table whose first row is its head."""
    head, *body = rows
    rule = " | ".join("---" for _ in head.split(" | "))
    return "\n".join(f"| {row} |" for row in (head, rule, *body))


def table_of_figures(results: dict[str, Any]) -> list[str]:
    """Returns one row for each figure: question, figure, command, and where it was measured."""
    rows = ["question | figure | command | commit | hardware"]
    for benchmark in BENCHMARKS:
        result = results.get(benchmark.name)
        for name, question in benchmark.questions.items() if result else ():
            command = f"`python {benchmark.command}`"
            row = (question, result["figures"][name], command, result["commit"], result["hardware"])
            rows.append(" | ".join(row))
    return rows


def filled(page: str, results: dict[str, Any]) -> str:
    """Returns the text of a page with every place filled.

    Raises:
        ValueError: a place has a name that no benchmark tells of.
    """
    figures = {name: text for result in results.values() for name, text in result["figures"].items()}
    tables = {name: rows for result in results.values() for name, rows in result["tables"].items()}
    tables["figures"] = table_of_figures(results)
    stamps = {name: f"commit {result['commit']}, {result['hardware']}" for name, result in results.items()}
    texts = {"figure": figures, "stamp": stamps, "table": {n: f"\n{markdown(rows)}\n" for n, rows in tables.items()}}

    def fill(place: re.Match[str]) -> str:
        begin, kind, name, end = place.groups()
        known = texts[kind]
        if name not in known:
            raise ValueError(f"no benchmark tells of the {kind} {name}; known are {', '.join(sorted(known))}")
        return begin + known[name] + end

    return _PLACE.sub(fill, page)


def fill_pages(results: dict[str, Any]) -> None:
    """Writes the pages anew, where they differ."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text, results)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: filled anew")


def main() -> int:
    """Runs what is asked for; the exit status is 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", default=["quick"], help="groups or benchmarks (default: quick), or pages")
    names = [name for name in parser.parse_args().names if name != "pages"]
    try:
        asked = chosen(names)
    except ValueError as error:
        parser.error(str(error))
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    stamp = {"commit": commit(), "hardware": hardware(), "date": datetime.date.today().isoformat()}
    failed = 0
    for benchmark in asked:
        print(f"python {benchmark.command}", flush=True)
        started = time.perf_counter()
        try:
            said = measure(benchmark.command)
        except ValueError as error:
            print(f"{benchmark.name}: {error}", file=sys.stderr)
            failed += 1
            continue
        print(f"    ({time.perf_counter() - started:.0f} s)", flush=True)
        results[benchmark.name] = {"command": f"python {benchmark.command}", **stamp, **said}
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fill_pages(results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
