"""Variables over ssh: what processes on other hosts get, and that no command line shows it. deepspeed is the real one,
pdsh a stand-in that keeps what it is asked to run."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from moe_testbed.launcher.cluster.config import ClusterConfig, load_cluster
from moe_testbed.launcher.cluster.launch.command import Command, deepspeed_command
from moe_testbed.launcher.cluster.launch.variables import FOR_PYTHON, PASSED_ON
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.folder import RunFolder
from tests.cluster.awkward import VALUES
from tests.cluster.two_hosts import CLUSTER, HOSTS
from tests.processes.python import run_python

Write = Callable[[str, str], Path]

PYTHON = """
    #!/bin/sh
    exec {python} -c 'import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))' "$@"
"""
PDSH = """
    #!/bin/sh
    for argument; do printf '%s\\0' "$argument"; done > pdsh.arguments
"""


@pytest.fixture
def cluster(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ClusterConfig:
    """Two hosts, the stand-in for pdsh, and one for Python that prints its arguments and variables."""
    write("hosts", HOSTS)
    write("cluster.yaml", CLUSTER)
    write("bin/pdsh", PDSH).chmod(0o755)
    write("bin/python", PYTHON.format(python=sys.executable)).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith(PASSED_ON)]:
        monkeypatch.delenv(name)
    return load_cluster("cluster.yaml")


def command_of(cluster: ClusterConfig, environment: dict[str, str], folder: Path) -> Command:
    cluster = cluster.model_copy(update={"environment": environment})
    command = deepspeed_command(cluster, ["node1", "node2"], None, RunFolder(folder), {})
    command.write_files()
    return command


def start(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Runs what starts a rank among the variables of a host; its arguments and variables."""
    done = subprocess.run(arguments, env={"PATH": os.environ["PATH"], "RANK": "3"}, capture_output=True, check=True)
    given, variables = json.loads(done.stdout)
    return given, variables


def test_variables_arrive_as_they_are_and_no_command_line_shows_them(
    cluster: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inherited = {f"{prefix}_{name}": value for prefix in PASSED_ON for name, value in VALUES.items() if value}
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", "/shared/my packages")
    command = command_of(cluster, VALUES, tmp_path)
    # With these arguments and variables `launch` starts it.
    done = run_python("-m", "deepspeed.launcher.runner", *command.arguments[1:], environment=command.environment)
    assert done.returncode == 0, done.stderr
    asked = Path("pdsh.arguments").read_bytes().decode().split("\0")[:-1]
    assert asked[asked.index("-w") + 1] == "node1,node2"
    (exports,) = (word for word in asked if "export" in word)
    assert exports == f'export PYTHONPATH="{tmp_path}:/shared/my packages"; '
    given, variables = start(asked[asked.index("/bin/sh") :])
    assert given == ["-u", "-m", "moe_testbed.launcher", "train", f"{tmp_path}/config.yaml", "--run-dir", str(tmp_path)]
    assert {name: variables.get(name) for name in {**VALUES, **inherited}} == VALUES | inherited
    assert (variables["RANK"], variables["DS_ACCELERATOR"]) == ("3", "cpu")


def test_deepspeed_passes_on_by_itself_what_is_kept_from_it() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    accelerator = pytest.importorskip("deepspeed.accelerator.cuda_accelerator").CUDA_Accelerator
    assert [*PASSED_ON] == [*runner.EXPORT_ENVS, *accelerator.export_envs(None)]
    assert all(name.startswith(PASSED_ON) for name in FOR_PYTHON)


def test_only_its_owner_reads_the_script_which_goes_with_the_launch(cluster: ClusterConfig, tmp_path: Path) -> None:
    script = tmp_path / "launch.sh"
    script.touch(mode=0o644)
    first = command_of(cluster, {"TOKEN": "first"}, tmp_path)
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
    second = command_of(cluster, {"TOKEN": "second"}, tmp_path)
    # The second has begun before the first has come to its end.
    first.remove_script()
    assert "second" in script.read_text()
    second.remove_script()
    second.remove_script()
    assert not script.exists()


def test_deepspeeds_files_of_variables_are_read_as_it_reads_them(
    cluster: ClusterConfig, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("home/.deepspeed_env", "A=home\nB=home\n")
    write(".deepspeed_env", "\ufeffB = two words\nC=$PATH:/x\n\n# a comment\nD=1=2\nE=\nUCX_TLS=tcp\nOWN=file\n")
    monkeypatch.setenv("UCX_TLS", "all")
    command = command_of(cluster, {"OWN": "cluster"}, tmp_path)
    _, variables = start(["/bin/sh", str(tmp_path / "launch.sh")])
    expected = {"A": "home", "B": "two words", "C": f"{os.environ['PATH']}:/x", "D": "1=2", "E": "", "UCX_TLS": "tcp"}
    assert {name: variables[name] for name in expected} == expected
    assert variables["OWN"] == "cluster"
    # deepspeed itself finds none.
    assert command.environment["DS_ENV_FILE"] == os.devnull

    monkeypatch.setenv("DS_ENV_FILE", str(write("other", "F=1\nno variable\n")))
    with pytest.raises(ConfigError, match=r"other, line 2: it sets no variable; write NAME=VALUE, or remove it"):
        command_of(cluster, {}, tmp_path)
