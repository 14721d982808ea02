"""Who knows the names of files in a run's and a suite's folder: `launcher/run`, and nobody else."""

from __future__ import annotations

import ast
from pathlib import Path

from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.suite_folder import SuiteFolder

LAUNCHER = Path(__file__).resolve().parents[2] / "launcher"

FILES = (
    "config.yaml",
    "manifest.json",
    "status.json",
    "metrics.jsonl",
    "summary.json",
    "analysis.npz",
    "complete.json",
    "ends.json",
    "start.json",
    "jobs.json",
    "mlflow.json",
    ".mlflow.lock",
    "suite.yaml",
    "results.json",
    "results.csv",
    "report.html",
    "launch.hosts",
    "launch.sh",
    "log.txt",
    "job.sh",
    "environment.sh",
)
PARTS = ("statistics/", "evaluations/", "checkpoints/", "logs/", "slurm/", "step_", ".npz")
FOLDERS = ("evaluations", "statistics", "probing", "checkpoints", "logs", "slurm", "tables", ".lock")
"""Names that are words of other meanings, too: only where a path is made of them."""
ALLOWED = {("report/page/page.py", "report.html")}
"""The name of the page's template."""
PROSE = ("report/page/definitions.py",)
"""Modules whose strings are text that a user reads, as the command line's help is."""


def joined(path: Path) -> list[object]:
    """What a module puts behind the slash of a path."""
    operations = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.BinOp)]
    slashes = [node for node in operations if isinstance(node.op, ast.Div)]
    return [node.right.value for node in slashes if isinstance(node.right, ast.Constant)]


def strings(path: Path) -> list[str]:
    """The strings of a module that are no docstrings, those within f-strings too."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_nobody_outside_run_spells_the_name_of_a_file() -> None:
    others = {str(path.relative_to(LAUNCHER)): path for path in LAUNCHER.rglob("*.py")}
    others = {name: path for name, path in others.items() if not name.startswith(("run/", "cli/", *PROSE))}
    spelled = {
        (module, text)
        for module, path in others.items()
        for text in strings(path)
        if any(name in text for name in (*FILES, *PARTS))
    }
    assert spelled == ALLOWED
    assert not {(module, text) for module, path in others.items() for text in joined(path) if text in FOLDERS}


def test_every_name_is_spelled_once() -> None:
    texts = [text for path in (LAUNCHER / "run").glob("*.py") for text in strings(path)]
    assert {name: texts.count(name) for name in FILES} == dict.fromkeys(FILES, 1)


def test_paths_are_those_of_old() -> None:
    run, suite = RunFolder(Path("r")), SuiteFolder(Path("s"))
    assert {str(path) for folder in (run, suite) for path in vars(folder).values() if isinstance(path, Path)} == {
        "r",
        "r/config.yaml",
        "r/manifest.json",
        "r/status.json",
        "r/metrics.jsonl",
        "r/summary.json",
        "r/evaluations",
        "r/statistics",
        "r/analysis.npz",
        "r/checkpoints",
        "r/.lock",
        "r/log.txt",
        "r/logs",
        "r/logs/started",
        "r/ends.json",
        "r/start.json",
        "r/probing",
        "r/launch.hosts",
        "r/launch.sh",
        "s",
        "s/suite.yaml",
        "s/results.json",
        "s/results.csv",
        "s/report.html",
        "s/figures",
        "s/tables",
        "s/slurm",
        "s/slurm/job.sh",
        "s/slurm/environment.sh",
        "s/slurm/jobs.json",
        "s/.lock",
    }
    assert str(suite.training("top_k", 2).path) == "s/top_k-seed2"
    assert str(run.rank_log("3")) == "r/logs/rank-3.txt"
    assert str(suite.job_log("12_3")) == "s/slurm/12_3.txt"
