"""Options of sbatch in a cluster's file: those that people have arrive, those that would not do what is meant are
refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.data import build
from moe_testbed.launcher.cluster.slurm.options import check_options, words
from moe_testbed.launcher.cluster.slurm.submit import submit
from moe_testbed.launcher.config.suite import load_suite
from moe_testbed.launcher.errors import ConfigError
from tests.cluster.slurm_clusters import make_cluster

Write = Callable[[str, str], Path]

# As they stand in scripts for sbatch, and the words that sbatch makes of them.
GOOD = {
    "--exclusive": ["--exclusive"],
    "--qos=high --mem=0": ["--qos=high", "--mem=0"],
    "--qos high": ["--qos", "high"],
    "-C h100 -q high": ["-C", "h100", "-q", "high"],
    "-Ch100": ["-Ch100"],
    '--comment="a b"': ["--comment=a b"],
    "--comment='a \"b\"' --hold # of mine": ['--comment=a "b"', "--hold"],
    '--comment="a # b"': ["--comment=a # b"],
    "--gres=gpu:h100:4": ["--gres=gpu:h100:4"],
    "--gpus-per-node=h100:4": ["--gpus-per-node=h100:4"],
    "--constraint='[a100|h100]&nvlink'": ["--constraint=[a100|h100]&nvlink"],
    "--nodelist=node[1-4,7]": ["--nodelist=node[1-4,7]"],
    "--exclude=node5": ["--exclude=node5"],
    "--reservation=mine": ["--reservation=mine"],
    "--mail-user=me@example.org --mail-type=END,FAIL": ["--mail-user=me@example.org", "--mail-type=END,FAIL"],
    "--time-min=1:00:00": ["--time-min=1:00:00"],
    "--no-kill": ["--no-kill"],
    "--export=NONE": ["--export=NONE"],
    "--account=lab": ["--account=lab"],
    "--nice=-5": ["--nice=-5"],
    "--requeue": ["--requeue"],
    "--job-name=mine": ["--job-name=mine"],
}
BAD = {
    "#SBATCH --exclusive": "is '#SBATCH --exclusive', which sbatch reads as no option; write --NAME or --NAME=VALUE",
    "  ": "which sbatch reads as no option",
    "exclusive": "which sbatch reads as no option",
    "\u2013exclusive": "which sbatch reads as no option",
    "--comment=a b": "where 'b' stands apart; put quotes around",
    "--comment='a b": "no closing quotation; write it as in a script for sbatch",
    "--array=0-3": "--array is not for slurm.options; leave it out: slurm.jobs_at_once is how many",
    "-a 0-3": "slurm.jobs_at_once",
    "--mem=0 -N4": "--nodes is not for slurm.options; set nodes",
    "--nodes 4": "set nodes",
    "-n8": "set gpus_per_node",
    "--ntasks-per-node=8": "set gpus_per_node",
    "--out=log.txt": "the logs lie in the suite's folder",
    "-e errors.txt": "the logs lie in the suite's folder",
    "--time=1:00:00": "set slurm.time",
    "-p long": "set slurm.partition",
    "-c 8": "set slurm.cpus_per_gpu",
    "--signal=B:TERM@60": "set slurm.grace_seconds",
    "--no-requeue": "a job whose time ends is queued again",
    "--test-only": "use --dry-run",
    "--wait": "`moe-testbed slurm status`",
    "-D /tmp": "jobs work in the folder in which they are submitted",
}


@pytest.mark.parametrize("line", GOOD)
def test_options_that_people_have_are_taken(line: str) -> None:
    slurm = make_cluster({"options": [line]}).slurm
    assert slurm is not None
    check_options(slurm)
    assert words(slurm.options) == GOOD[line]


@pytest.mark.parametrize("line", BAD)
def test_options_that_would_do_something_else_are_refused(line: str) -> None:
    slurm = make_cluster({"options": ["--exclusive", line]}).slurm
    assert slurm is not None
    with pytest.raises(ConfigError, match=r"slurm\.options\.1 is '") as raised:
        check_options(slurm)
    assert BAD[line] in str(raised.value) and "\n" not in str(raised.value)


def test_options_go_before_what_the_environment_says(
    experiment: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build_store", lambda mix, cache_dir, log: None)
    write("two.yaml", "name: two\nexperiment: small.yaml\nruns: {a: {}, b: {}}\n")
    write("bin/sinfo", "#!/bin/sh\necho gpu\n").chmod(0o755)
    keep = f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('asked.json', 'w'))\nprint(7)\n"
    write("bin/sbatch", keep).chmod(0o755)
    monkeypatch.setenv("PATH", str(Path("bin").resolve()), prepend=":")
    cluster = make_cluster({"options": ('--comment="a b" # c', "-C h100")})
    submit(load_suite("two.yaml"), Path("runs"), cluster, dry_run=False)
    first, *options, script = json.loads(Path("asked.json").read_text())
    # sbatch takes its arguments before SBATCH_PARTITION and the like, and those before its script.
    assert first == "--parsable" and {"--array=0-1%4", "--partition=gpu", "--comment=a b"} <= {*options}
    written = [line.removeprefix("#SBATCH ") for line in Path(script).read_text().splitlines() if "#SBATCH" in line]
    assert options == words(written)
