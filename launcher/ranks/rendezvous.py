"""How the processes of a training meet: the device of each, and the process group of all.

They were started alone, or by deepspeed, torchrun or a scheduler that sets RANK and WORLD_SIZE.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.ranks.ranks import Ranks, is_alone

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Returns the device of this process; must run before DeepSpeed is imported, which chooses its accelerator once.

    Raises:
        ConfigError: a GPU is wanted and there is none, or none for this process.
    """
    _check_environment()
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device is cuda, but torch sees no GPU; set runtime.device to cpu or auto, or mend the CUDA "
            "installation"
        )
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if wanted == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    # Some schedulers show each process its own GPU only.
    count = torch.cuda.device_count()
    index = local_rank if count > 1 else 0
    if index >= count:
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, but torch sees {count} GPUs, numbered from 0; start no more processes on a "
            "host than it has GPUs"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check_environment() -> None:
    """Raises ConfigError if some of a launcher's variables are missing: each process would train alone."""
    missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    if not is_alone() and missing and not dist.is_initialized():
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start the processes with "
            "deepspeed or torchrun, which set them all, or set them in your script"
        )


def join(device: torch.device, timeout_seconds: float) -> Ranks:
    """Joins the process group that the environment describes, or makes one of a single process without a network.

    Args:
        timeout_seconds: how long to wait for the others, and how long they may wait for one another in any group made
            from now on.

    Raises:
        ConfigError: another program listens where the ranks are to meet, or some did not come.
        RuntimeError: another program listens there, and SLURM starts the job again at another port.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed makes its groups without a word about time.
    defaults: Any = dist.distributed_c10d
    defaults.default_pg_timeout = defaults.default_pg_nccl_timeout = timeout
    if not dist.is_initialized():
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            _meet(backend, timeout, device if device.type == "cuda" else None)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    size = dist.get_world_size()
    return Ranks(dist.get_rank(), size, device, dist.group.WORLD if size > 1 else None)


def _meet(backend: str, timeout: timedelta, gpu: torch.device | None) -> None:
    port, address = os.environ["MASTER_PORT"], os.environ["MASTER_ADDR"]
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=gpu)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        in_use = f"MASTER_PORT is {port}, which is in use by another program on {address}"
        if "SLURM_JOB_ID" in os.environ:
            raise RuntimeError(f"{in_use}; the job is started again at another port") from None
        raise ConfigError(f"{in_use}; choose a free port") from error
    except dist.DistStoreError as error:
        raise ConfigError(
            f"not all of the {os.environ['WORLD_SIZE']} ranks came to port {port} of {address} within "
            f"{timeout.total_seconds():g} s (parallel.slow_timeout_seconds); see what became of the others"
        ) from error
