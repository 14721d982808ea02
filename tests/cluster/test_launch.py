"""`moe-testbed launch`: the command that it prints, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from moe_testbed.launcher.cli.main import main
from moe_testbed.launcher.cluster.launch.probe import Offer
from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.errors import ASKED_TO_STOP, WRONG_INPUT
from moe_testbed.launcher.run.files import read_json
from tests.cluster.two_hosts import CLUSTER, HOSTS

Write = Callable[[str, str], Path]
Launch = Callable[..., int]

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))

HERE = ["--set", "nodes=1", "--set", "hostfile=null"]


@pytest.fixture
def launch(experiment: Path, write: Write) -> Launch:
    """``launch(*options)`` -> exit status of a launch of small.yaml on two hosts of two processes."""
    write("cluster.yaml", f"{CLUSTER}    environment: {{GLOO_SOCKET_IFNAME: eth0}}\n")
    write("hosts", HOSTS)
    command = ["launch", str(experiment), "--cluster", "cluster.yaml", "--run-dir", "runs/trial"]
    return lambda *options: main([*command, *options])


def words(text: str) -> list[str]:
    """Of the command that was printed, as a shell reads it."""
    return shlex.split(text.splitlines()[-1])


def training(folder: Path) -> list[str]:
    run_dir = folder / "runs" / "trial"
    return ["train", f"{run_dir}/config.yaml", "--run-dir", str(run_dir)]


def test_a_dry_run_over_ssh(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--dry-run", "--set", "ssh_port=2222", "--set", "master_port=29777") == 0
    variables, command = split_variables(words(capsys.readouterr().out))
    run_dir = tmp_path / "runs" / "trial"
    hosts = ["--hostfile", f"{run_dir}/launch.hosts", "--force_multi", "--no_ssh_check", "--ssh_port", "2222"]
    place = ["--master_addr", "node1", "--master_port", "29777"]
    script = ["--no_python", "--no_local_rank", "/bin/sh", f"{run_dir}/launch.sh"]
    assert command == [DEEPSPEED, "--quiet", *hosts, *place, *script, *training(tmp_path)]
    assert variables["DS_ENV_FILE"] == "/dev/null" and "BatchMode=yes" in variables["PDSH_SSH_ARGS_APPEND"]


@pytest.mark.parametrize("options", [[], ["--node-rank", "0"], HERE])
def test_a_dry_run_shows_no_values(
    options: list[str], launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret-1")
    assert launch("--dry-run", *options, "--set", "environment={TOKEN: secret-2}") == 0
    told = capsys.readouterr()
    assert "secret" not in told.out + told.err
    # What deepspeed does not see it cannot write into command lines.
    assert ("-u MLFLOW_TRACKING_PASSWORD" in told.out) == (not options)


@pytest.mark.parametrize("options", [[], ["--node-rank", "0"], HERE])
def test_a_dry_run_writes_nothing(options: list[str], launch: Launch, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert launch("--dry-run", *options) == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("options", [[], ["--node-rank", "0"]])
def test_processes_meet_where_the_cluster_says(
    options: list[str], launch: Launch, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    def address(*more: str) -> str:
        assert launch("--dry-run", *options, *more) == 0
        command = words(capsys.readouterr().out)
        return command[command.index("--master_addr") + 1]

    write("hosts", "me@node1 slots=2\nnode2 slots=2\n")
    assert address() == "node1"
    assert address("--set", "master_addr=10.0.0.1") == "10.0.0.1"


def test_a_dry_run_without_ssh(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--dry-run", "--node-rank", "1") == 0
    variables, command = split_variables(words(capsys.readouterr().out))
    hosts = ["--hostfile", str(tmp_path / "runs" / "trial" / "launch.hosts"), "--no_ssh", "--node_rank", "1"]
    place = ["--master_addr", "node1", "--master_port", "29500", "--module", "moe_testbed.launcher"]
    assert command == [DEEPSPEED, "--quiet", *hosts, *place, *training(tmp_path)]
    assert variables["GLOO_SOCKET_IFNAME"] == "..." and variables["DS_ACCELERATOR"] == "cpu"


def test_a_dry_run_on_this_machine(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--dry-run", *HERE, "--set", "environment={OMP_NUM_THREADS: '3'}") == 0
    variables, command = split_variables(words(capsys.readouterr().out))
    processes = ["--hostfile", "/dev/null", "--num_accelerators", "2", "--master_port", "29500"]
    assert command == [DEEPSPEED, "--quiet", *processes, "--module", "moe_testbed.launcher", *training(tmp_path)]
    assert variables == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "...", "GLOO_SOCKET_IFNAME": "..."}


@pytest.mark.parametrize("options", [[], HERE])
def test_trust_reaches_the_processes(options: list[str], launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--dry-run", *options, "--trust") == 0
    assert words(capsys.readouterr().out)[-1] == "--trust"


def split_variables(words: list[str]) -> tuple[dict[str, str], list[str]]:
    command = words.index(DEEPSPEED)
    return dict(word.split("=", 1) for word in words[:command] if "=" in word), words[command:]


FAKE_DEEPSPEED = """
    #!/bin/sh
    for last; do :; done
    [ -z "$STATE" ] || printf '{"state": "%s", "step": 2, "steps": 4, "reason": "why"}' "$STATE" > "$last/status.json"
    exit "$CODE"
"""


@pytest.fixture
def fake_deepspeed(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Instead of a training: ends with status $CODE after it has written $STATE, if any, as the run's state."""
    write("bin/deepspeed", FAKE_DEEPSPEED).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    store = SimpleNamespace(manifest={"domains": {}})
    monkeypatch.setattr("moe_testbed.launcher.cluster.launch.launch.build_store", lambda *_: store)
    monkeypatch.setenv("STATE", "finished")
    monkeypatch.setenv("CODE", "0")


@pytest.mark.usefixtures("fake_deepspeed")
def test_the_run_is_the_experiment_on_the_accelerator_of_the_cluster(launch: Launch, tmp_path: Path) -> None:
    options = ["--set", "nodes_reach_mlflow=false", "--set", f"master_port={free_port()}", "tracking.mlflow=true"]
    assert launch(*HERE, *options) == 0
    written = load_experiment(tmp_path / "runs" / "trial" / "config.yaml")
    wanted = load_experiment(tmp_path / "small.yaml", ["runtime.device=cpu", "tracking.mlflow=false"])
    assert written == wanted


@pytest.mark.usefixtures("fake_deepspeed")
def test_a_run_that_is_going_on_is_left_alone(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*HERE, "--set", f"master_port={free_port()}"]
    assert launch(*options) == 0
    config = tmp_path / "runs" / "trial" / "config.yaml"
    before = config.stat()
    with FileLock(config.with_name(".lock")):
        assert launch(*options) == WRONG_INPUT
    assert "runs/trial is in use by another process" in capsys.readouterr().err
    assert config.stat() == before


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [
        ("finished", 0, 0),
        # What a rank does after its last word does not matter.
        ("finished", 1, 0),
        ("stopped", ASKED_TO_STOP, ASKED_TO_STOP),
        # Nobody has asked: a rank was killed, for which deepspeed told the others to stop.
        ("stopped", 247, 1),
        ("failed", 1, 1),
        ("failed", 247, 1),
        ("failed", WRONG_INPUT, WRONG_INPUT),
        # deepspeed ends with 0 when its own launcher is killed.
        ("", 0, 1),
        ("running", 0, 1),
    ],
)
@pytest.mark.usefixtures("fake_deepspeed")
def test_the_exit_status_is_what_the_folder_says(
    state: str, code: int, status: int, launch: Launch, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STATE", state)
    monkeypatch.setenv("CODE", str(code))
    # Of an earlier start, and no word of this one.
    write("runs/trial/status.json", '{"state": "stopped", "step": 1, "steps": 4, "reason": null}')
    assert launch(*HERE, "--set", f"master_port={free_port()}") == status
    told = read_json(tmp_path / "runs" / "trial" / "status.json")
    if status == 1 and state != "failed":
        assert told["state"] == "failed" and f"deepspeed ended with exit status {code}" in told["reason"]
    else:
        assert told["state"] == state


LATE_DEEPSPEED = """
    #!/bin/sh
    for last; do :; done
    echo '{"state": "running", "step": 2}' > "$last/status.json"
    setsid sh -c "touch '$last/apart'; sleep 0.5; echo '{\\"state\\": \\"finished\\"}' > '$last/status.json'" &
    # As on another host, it does not end with this process and its group.
    until [ -e "$last/apart" ]; do sleep 0.02; done
    exit 1
"""


@pytest.mark.usefixtures("fake_deepspeed")
def test_a_last_word_of_another_host_is_waited_for(
    launch: Launch, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write("bin/deepspeed", LATE_DEEPSPEED)
    offer = json.dumps(asdict(Offer(sees_run=True, reads_run=True, finds_address=True, port_is_free=True, gpus=None)))
    for program in ("ssh", "pdsh"):
        write(f"bin/{program}", f"#!/bin/sh\necho '{offer}'\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert launch() == 0
    assert read_json(tmp_path / "runs" / "trial" / "status.json") == {"state": "finished"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--node-rank", "2"], "--node-rank is 2; it is 0 to 1, the hosts of "),
        (["--node-rank", "0", *HERE], "--node-rank is 0; it is for clusters with a hostfile"),
        (["--set", "launcher=slurm", "--set", "slurm.partition=gpu"], "launcher of cluster trial is slurm; use "),
        (["--set", "nodes=3"], "names 2 hosts, but nodes of cluster trial is 3"),
        (["--set", "gpus_per_node=1"], "node1 has slots=2, but gpus_per_node of cluster trial is 1"),
        (["--set", "hostfile=nowhere"], "nowhere cannot be read"),
        (["parallel.expert_parallel_size=8"], "is 8, which does not divide the number of ranks, 4"),
        (["parallel.expert_parallel_size=4"], "across the nodes 0, 1"),
        (["training.global_batch_size=6"], "global_batch_size is 6"),
        (["--set", "environment={RANK: 0}"], "environment has RANK, which is another one in each process"),
        (["--set", "environment={MASTER_PORT: 1}"], "environment has MASTER_PORT, which deepspeed sets; write master_"),
    ],
)
def test_wrong_input_is_one_line(
    options: list[str], message: str, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--dry-run", *options) == WRONG_INPUT
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and message in told[0]


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_a_port_in_use_is_told_before_anything_starts(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert launch(*HERE, "--set", f"master_port={port}") == WRONG_INPUT
    assert f"port {port} is in use on this machine" in capsys.readouterr().err


def test_too_few_gpus_are_told_before_anything_starts(
    launch: Launch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert launch(*HERE, "--set", "accelerator=cuda") == WRONG_INPUT
    message = "gpus_per_node of cluster trial is 2, but torch sees 1 on this machine"
    assert message in capsys.readouterr().err


def test_an_address_that_is_not_known_is_told(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--node-rank", "0", "--set", "master_addr=nowhere.invalid") == WRONG_INPUT
    assert "this machine does not know nowhere.invalid, where the processes would meet" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["", "Bye.", "[1]", '{"sees_run": true, "memory": 7}'])
def test_an_answer_of_another_version_is_one_line(
    answer: str, launch: Launch, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("ssh", "pdsh"):
        path = write(f"bin/{program}", f"#!/bin/sh\necho 'Welcome.'\nprintf '%s\\n' '{answer}'\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    assert launch() == WRONG_INPUT
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"node1 answered '{answer}' when asked what it offers" in told[0]


def test_without_pdsh_the_other_form_is_told(
    launch: Launch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ssh").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch() == WRONG_INPUT
    assert "pdsh is not on the PATH" in (told := capsys.readouterr().err) and "--node-rank" in told


@pytest.fixture
def ssh_and_pdsh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No other programs are on the PATH, and these do nothing."""
    for program in ("ssh", "pdsh"):
        (tmp_path / program).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("ssh_and_pdsh")
def test_paths_that_deepspeed_cannot_pass_on_are_told(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--run-dir", "runs/my run; ls") == WRONG_INPUT
    assert "runs/my run; ls' has characters that deepspeed cannot pass on" in capsys.readouterr().err


@pytest.mark.usefixtures("ssh_and_pdsh")
def test_a_pythonpath_that_would_arrive_changed_is_told(
    launch: Launch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/shared/$USER")
    assert launch() == WRONG_INPUT
    assert "PYTHONPATH is '/shared/$USER', of which deepspeed cannot pass on" in capsys.readouterr().err


def test_another_user_on_a_host_is_told(
    launch: Launch, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = json.dumps(asdict(Offer(sees_run=True, reads_run=False, finds_address=True, port_is_free=True, gpus=None)))
    for program in ("ssh", "pdsh"):
        path = write(f"bin/{program}", f"#!/bin/sh\necho '{offer}'\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    assert launch() == WRONG_INPUT
    assert "node1 may not read what only you can read in " in capsys.readouterr().err
