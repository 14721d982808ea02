"""`python -m moe_testbed.launcher.cluster.probe RUN_DIR PORT ACCELERATOR` prints what a host can offer a training."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Offer:
    """What is there on a host.

    Attributes:
        sees_run: the run's folder with its config.
        port_is_free: nobody listens at the port.
        gpus: that torch sees; None where they do not matter.
    """

    sees_run: bool
    port_is_free: bool
    gpus: int | None


def probe(run_dir: Path, port: int, accelerator: str) -> Offer:
    """What this host offers."""
    return Offer((run_dir / "config.yaml").exists(), _is_free(port), _num_gpus() if accelerator == "cuda" else None)


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
    print(json.dumps(asdict(probe(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))))
