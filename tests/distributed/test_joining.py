"""Where a rank computes, and the ways in which it cannot meet the others."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.ranks.rendezvous import choose_device
from tests.processes.python import run_python


@pytest.mark.parametrize(("local_rank", "gpus", "index"), [(0, 8, 0), (5, 8, 5), (5, 1, 0)])
def test_a_rank_takes_its_gpu_or_the_only_one_that_it_sees(
    local_rank: int, gpus: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("auto") == torch.device("cuda", index)
    assert chosen == [index]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match="LOCAL_RANK is 4, but torch sees 4 GPUs, numbered from 0; start no more"):
        choose_device("cuda")


def test_under_slurm_a_port_in_use_is_a_failure_that_another_start_mends() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        variables = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "SLURM_JOB_ID": "7",
        }
        script = "import torch; from moe_testbed.launcher.ranks.rendezvous import join; join(torch.device('cpu'), 5.0)"
        done = run_python("-c", script, environment=os.environ | variables, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"RuntimeError: MASTER_PORT is {port}, which is in use by another program on 127.0.0.1; the job is started "
        "again at another port"
    )
