"""`make gpu-check` where there is no GPU: it says so, and its rehearsal runs through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the script without a GPU, on one thread."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_without_a_gpu_one_line_says_so() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu-check needs a GPU: torch ") and line.endswith("finds none")


@pytest.mark.slow
def test_the_rehearsal_compares_every_router_with_itself() -> None:
    done = run("--rehearse")
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    recipes = [path for path in (SCRIPT.parents[1] / "configs" / "routers").glob("*.yaml") if path.stem != "base"]
    assert any(f"0.0e+00, {len(recipes)} routers, {2 * len(recipes)} passes" in row for row in table)
    assert not any("FAULT" in line for line in done.stdout.splitlines())
