"""Launches on several hosts: over ssh and without, experts shared across hosts, losses as of one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.run.files import read_json_lines
from tests.hosts.network import Network, wait_until
from tests.hosts.trial import START_SECONDS, Trial
from tests.train import driver

pytestmark = pytest.mark.daemons

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]


def experiment(make_experiment: MakeExperiment, expert_parallel_size: int) -> dict[str, Any]:
    return make_experiment(
        parallel={"expert_parallel_size": expert_parallel_size, "expert_parallel_across_nodes": True}
    )


def losses_of_one_process(content: dict[str, Any], run_on_ranks: Run, folder: Path) -> list[float]:
    run_on_ranks(driver.train, 1, content | {"parallel": {}}, str(folder))
    return [line["loss"] for line in read_json_lines(folder / "metrics.jsonl") if line["kind"] == "train"]


def assert_trained(trial: Trial, oracle: list[float]) -> None:
    assert trial.status["state"] == "finished", trial.log
    assert list(trial.losses().values()) == pytest.approx(oracle, rel=1e-4)
    trial.assert_nothing_is_left()


def test_two_hosts_over_ssh(
    two_hosts: Network,
    make_experiment: MakeExperiment,
    run_on_ranks: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = experiment(make_experiment, expert_parallel_size=4)
    values = {"MOE_TRIAL": "harmless: two words, $HOME, `id`, 50%, %h \"quoted\" 'single' back\\slash,\n two lines"}
    inherited = {"MLFLOW_TRIAL": f"{values['MOE_TRIAL']}, too", "UCX_TRIAL": "harmless"}
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    trial = Trial(two_hosts, tmp_path, content, gpus_per_node=2, environment=values)
    # As whom to log in is no part of the address where ranks meet.
    first, second = two_hosts.hosts
    lines = f"root@{first.address_6} slots=2 # IPv6\r\n{second.name} slots=2 max_slots=2\r\n"
    (tmp_path / "hosts").write_text(lines, encoding="utf-8-sig", newline="")
    process = trial.start(first)
    wait_until(lambda: {0, 1} == {*first.ranks()} and {2, 3} == {*second.ranks()}, START_SECONDS, "four ranks")
    ranks = [*first.ranks().values(), *second.ranks().values()]
    told = [rank.environ() for rank in ranks]
    assert [{name: one.get(name) for name in (*values, *inherited)} for one in told] == [values | inherited] * 4
    shown = [word for host in two_hosts.hosts for command in host.commands().values() for word in command]
    assert shown and not [word for word in shown if "harmless" in word]
    assert process.wait(START_SECONDS) == 0, trial.log
    assert_trained(trial, losses_of_one_process(content, run_on_ranks, tmp_path / "one"))
    assert not [path for path in trial.run_dir.rglob("*") if path.is_file() and b"harmless" in path.read_bytes()]


def test_four_hosts_over_ssh(
    four_hosts: Network, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    content = experiment(make_experiment, expert_parallel_size=2)
    trial = Trial(four_hosts, tmp_path, content)
    assert trial.launch() == 0, trial.log
    assert_trained(trial, losses_of_one_process(content, run_on_ranks, tmp_path / "one"))


def test_two_hosts_without_ssh(
    two_hosts: Network, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    content = experiment(make_experiment, expert_parallel_size=2)
    trial = Trial(two_hosts, tmp_path, content)
    processes = [trial.start(host, "--node-rank", str(number)) for number, host in enumerate(two_hosts.hosts)]
    assert [process.wait(START_SECONDS) for process in processes] == [0, 0], trial.log
    assert_trained(trial, losses_of_one_process(content, run_on_ranks, tmp_path / "one"))


def test_what_a_host_lacks_is_told_before_training(
    two_hosts: Network, make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    trial = Trial(two_hosts, tmp_path, experiment(make_experiment, expert_parallel_size=1))
    first, second = two_hosts.hosts

    def refusal() -> str:
        (tmp_path / "launch.log").unlink(missing_ok=True)
        assert trial.launch() == 2, trial.log
        told = trial.log.splitlines()
        assert len(told) == 1, trial.log
        return told[0]

    hosts = (tmp_path / "hosts").read_text()
    (tmp_path / "hosts").write_text(hosts.replace("node2", "node7"))
    assert "names node7, which ssh cannot reach" in (told := refusal()) and "resolve" in told
    (tmp_path / "hosts").write_text(hosts)

    second.run(["mount", "--bind", "/dev/null", "/etc/hosts"], check=True)
    assert "node2 does not know node1, where the processes would meet" in refusal()
    second.run(["umount", "/etc/hosts"], check=True)

    second.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True)
    assert f"node2 does not see {trial.run_dir}; choose --run-dir on a disk that all hosts share" in refusal()

    second.run(["mount", "--bind", "/dev/null", "/etc/ssh/key.pub"], check=True)
    assert "names node2, which ssh cannot reach" in (told := refusal()) and "Permission denied" in told

    listen = "import socket; server = socket.create_server(('', 29500)); print(flush=True); server.accept()"
    listener = first.start([sys.executable, "-c", listen], stdout=subprocess.PIPE)
    assert listener.stdout and listener.stdout.readline() == "\n"
    assert "port 29500 is in use on node1" in refusal()
