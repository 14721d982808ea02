"""`python -m moe_testbed.launcher.cluster.launch.probe FILE ADDRESS PORT ACCELERATOR`: what a host can offer.

FILE lies in the run's folder, and only its owner can read it.
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Offer:
    """Says what is there on a host.

    Attributes:
        sees_run: the run's folder.
        reads_run: what only the run's owner may read.
        finds_address: whether it finds the address of the place where the processes meet.
        port_is_free: nobody listens at the port.
        gpus: number of GPUs that torch sees; None where they do not matter.
    """

    sees_run: bool
    reads_run: bool
    finds_address: bool
    port_is_free: bool
    gpus: int | None


def probe(file: Path, address: str, port: int, accelerator: str) -> Offer:
    """Returns what this host offers to a run in whose folder the file is."""
    gpus = _num_gpus() if accelerator == "cuda" else None
    return Offer(file.exists(), _is_read(file), _is_found(address), _is_free(port), gpus)


def _is_read(file: Path) -> bool:
    try:
        file.read_bytes()
    except OSError:
        return False
    return True


def _is_found(address: str) -> bool:
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    print(json.dumps(asdict(probe(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]))))
