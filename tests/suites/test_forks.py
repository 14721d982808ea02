"""Forks of the fork server do what new interpreters do, and end when they should."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.suites import processes
from moe_testbed.launcher.suites.fork_server import MODULES, WITH_ABLATION
from moe_testbed.launcher.suites.forks import Forks, ServerLost
from moe_testbed.launcher.suites.scheduling import TRAIN_COMMAND
from tests.distributed.conftest import data, make_experiment

__all__ = ["data", "make_experiment"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a suite forks its trainings on Linux only")

MakeExperiment = Callable[..., dict[str, Any]]
VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
# Tells of its process in the third step, and ends it then as it is told to.
ROUTER = """
    import os, random, sys

    import numpy as np
    import torch

    from moe_testbed.routing.routers.top_k import TopK

    class Ending(TopK):
        def forward(self, x_TM, context):
            if self.training and context.step == 2 and self.setting.layer == 0:
                print("\\nrandom", np.random.random(), random.random())
                print("threads", torch.get_num_threads(), os.environ["OMP_NUM_THREADS"])
                print("group", os.getpgid(0) == os.getpid(), "arguments", sys.argv[1:], "input", sys.stdin.read())
                print("folder", os.getcwd(), flush=True)
                HOW
            return super().forward(x_TM, context)
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """One server for the tests that leave it alive."""
    forks = Forks(VARIABLES)
    yield forks
    forks.close()


@pytest.fixture
def configure(make_experiment: MakeExperiment, write: Callable[[str, str], Path]) -> Callable[[str], list[str]]:
    """What `moe-testbed` gets to train, in the working directory, a router that does ``how`` in the third step."""

    def configure(how: str) -> list[str]:
        write("ending.py", ROUTER.replace("HOW", how))
        routing = {"router": {"name": f"{Path('ending.py').absolute()}:Ending"}, "balance": {}}
        content = make_experiment(routing=routing, training={"steps": 4}, evaluation={"every": 0})
        write("experiment.yaml", yaml.safe_dump(content, sort_keys=False))
        return ["experiment.yaml", "--run-dir", "run"]

    return configure


@pytest.mark.parametrize("module", [*MODULES, *WITH_ABLATION])
def test_what_the_server_imports_is_there(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pass", "raise KeyError('why')", "sys.exit('told')", "os.kill(os.getpid(), 11)"])
def test_a_fork_ends_and_speaks_as_an_interpreter_does(
    how: str, configure: Callable[[str], list[str]], forks: Forks
) -> None:
    arguments = configure(how)
    interpreter = processes.start([*TRAIN_COMMAND, *arguments], Path("interpreter.txt"), VARIABLES)
    status = interpreter.wait(120)
    os.rename("run", "run of the interpreter")
    assert forks.start(["train", *arguments], Path("fork.txt")).wait(120) == status
    expected, found = said("interpreter.txt"), said("fork.txt")
    assert [line for line in expected if line.startswith(("group", "folder"))] == [
        f"group True arguments ['train', {str(arguments)[1:-1]}] input ",
        f"folder {Path.cwd()}",
    ]
    random, others = (lambda line: line.startswith("random")), (lambda line: not line.startswith("random"))
    assert list(filter(random, found)) != list(filter(random, expected))
    if how == "raise KeyError('why')":
        # The traceback begins elsewhere.
        found, expected = found[-3:], expected[-3:]
    assert list(filter(others, found)) == list(filter(others, expected))
    assert losses("run") == losses("run of the interpreter") != []


def test_forks_do_not_share_their_random_numbers_and_the_server_has_one_thread(
    forks: Forks, configure: Callable[[str], list[str]]
) -> None:
    arguments = configure("os._exit(7)")
    children = [forks.start(["train", *arguments[:-1], f"run{n}"], Path(f"{n}.txt")) for n in range(2)]
    assert [child.wait(120) for child in children] == [7, 7]
    drawn = [line.split()[1:] for n in range(2) for line in said(f"{n}.txt") if line.startswith("random")]
    assert len({*drawn[0], *drawn[1]}) == 4
    assert server_of(forks).num_threads() == 1


def test_a_signal_reaches_the_group_and_waiting_has_an_end(forks: Forks, configure: Callable[[str], list[str]]) -> None:
    fork = forks.start(["train", *configure("import time; time.sleep(3600)")], Path("log.txt"))
    assert fork.poll() is None and os.getpgid(fork.pid) == fork.pid
    with pytest.raises(subprocess.TimeoutExpired):
        fork.wait(0.01)
    processes.stop([fork], grace_seconds=0.1)
    assert fork.returncode in (-signal.SIGTERM, -signal.SIGKILL, 75)
    assert not psutil.pid_exists(fork.pid)


def test_a_lost_server_takes_its_forks_along_and_the_next_start_makes_another(
    configure: Callable[[str], list[str]],
) -> None:
    forks = Forks(VARIABLES)
    try:
        arguments = configure("import time; time.sleep(3600)")
        fork = forks.start(["train", *arguments], Path("log.txt"))
        process = psutil.Process(fork.pid)
        until_it_sleeps("log.txt")
        server_of(forks).kill()
        assert fork.wait(60) == -signal.SIGKILL
        assert ended(process)
        again = forks.start(["train", "no such file.yaml"], Path("again.txt"))
        assert again.wait(120) == 2
        assert "no such file.yaml" in Path("again.txt").read_text()
    finally:
        forks.close()


def test_a_server_that_cannot_import_is_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError")
    forks = Forks({"PYTHONPATH": str(tmp_path)})
    with pytest.raises(ServerLost):
        forks.start(["train"], tmp_path / "log.txt")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_fork_outlives_the_comparison(
    number: signal.Signals, configure: Callable[[str], list[str]], write: Callable[[str, str], Path]
) -> None:
    configure("import time; time.sleep(3600)")
    write("suite.yaml", "name: pair\nexperiment: experiment.yaml\nruns:\n  a: {}\n  b: {}\n")
    command = [sys.executable, "-m", "moe_testbed.launcher", "compare", "suite.yaml", "--jobs", "2"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for name in "ab":
            until_it_sleeps(f"runs/pair/{name}-seed1/log.txt")
        (server,) = psutil.Process(parent.pid).children()
        trainings = server.children()
        assert len(trainings) == 2
        parent.send_signal(number)
        assert parent.wait(60) == (143 if number == signal.SIGTERM else -number)
        assert all(map(ended, [server, *trainings]))
    finally:
        parent.kill()


@pytest.mark.slow
def test_a_comparison_that_was_killed_continues_bit_for_bit(
    make_experiment: MakeExperiment, write: Callable[[str, str], Path], forks: Forks
) -> None:
    content = make_experiment(training={"steps": 300}, checkpoint={"every": 20}, evaluation={"every": 100})
    write("experiment.yaml", yaml.safe_dump(content, sort_keys=False))
    write("suite.yaml", "name: pair\nexperiment: experiment.yaml\nseeds: [1, 2]\nruns:\n  a: {}\n")
    command = [sys.executable, "-m", "moe_testbed.launcher", "compare", "suite.yaml", "--jobs", "2"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = [Path("runs/pair/a-seed1"), Path("runs/pair/a-seed2")]
    until(lambda: all(len(losses(run)) > 30 for run in runs))
    processes_of_it = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.wait()
    assert all(map(ended, processes_of_it))
    assert not any((run / "summary.json").exists() for run in runs)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300, check=True)
    for seed, run in enumerate(runs, start=1):
        whole = ["experiment.yaml", f"seed={seed}", "--run-dir", f"whole{seed}"]
        assert forks.start(["train", *whole], Path("whole.txt")).wait(300) == 0
        assert losses(run) == losses(f"whole{seed}") and len(losses(run)) == 303
        assert "continuing after step" in (run / "log.txt").read_text()


def server_of(forks: Forks) -> psutil.Process:
    assert forks._server is not None
    return psutil.Process(forks._server.pid)


def until_it_sleeps(log: str) -> None:
    until(lambda: Path(log).exists() and f"folder {Path.cwd()}" in said(log))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the training did not come so far"
        time.sleep(0.05)


def said(log: str) -> list[str]:
    """What a process has said, without its bar of progress."""
    return [line for line in Path(log).read_text().splitlines() if "step/s" not in line]


def losses(run: str | Path) -> list[float]:
    lines = [line for line in RunFolder(Path(run)).read_metrics() if line.kind != "system"]
    return [line.values["cross_entropy"] for line in lines]


def ended(process: psutil.Process) -> bool:
    _, alive = psutil.wait_procs([process], timeout=30)
    return all(one.status() == psutil.STATUS_ZOMBIE for one in alive)
