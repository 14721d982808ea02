"""The processes of a run: started alone, or by deepspeed, torchrun or a scheduler that sets RANK and WORLD_SIZE."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from moe_testbed.launcher.errors import ConfigError

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_first_rank() -> bool:
    """This process is, or will be, rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank, size: number of this process, number of processes.
        device: where it computes.
        group: all processes; None if there is only one, so that formulas skip their collectives.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process; must run before DeepSpeed is imported, which chooses its accelerator once.

    Raises:
        ConfigError: a GPU is wanted and there is none.
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
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _check_environment() -> None:
    """Raises ConfigError if some of a launcher's variables are missing: each process would train alone."""
    missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and missing and not dist.is_initialized():
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start the processes with "
            "deepspeed or torchrun, which set them all, or set them in your script"
        )


def join(device: torch.device) -> Ranks:
    """Joins the process group that the environment describes, or makes one of a single process without a network."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    size = dist.get_world_size()
    return Ranks(dist.get_rank(), size, device, dist.group.WORLD if size > 1 else None)
