"""Tells where a run was made: versions, commit, hardware, memory."""

from __future__ import annotations

import platform
import resource
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("moe-testbed", "torch", "deepspeed", "datasets", "sentencepiece", "mlflow", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """Returns the commit of the checkout that the code was imported from, marked if it has changes; None outside
    one."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def hardware(device: torch.device) -> str:
    """Returns the processor and the number of threads, or the GPU, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} thread(s)"


def peak_memory_bytes() -> int:
    """Returns the largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def command() -> str:
    """Returns the command that started this process."""
    return shlex.join(["moe-testbed", *sys.argv[1:]])
