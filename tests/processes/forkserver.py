"""Processes that start in milliseconds: forks of one that has imported torch, DeepSpeed and the training.

Each pytest process has one such server, started when the first test needs it. A child runs a file, which must not
import from ``tests``: the server does not know that package.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# What a training imports before its first step. The server passes over what cannot be imported; a test does not.
OUR_MODULES = [
    "moe_testbed.launcher.cli.main",
    "moe_testbed.launcher.train.train",
    "moe_testbed.launcher.train.loop",
    "moe_testbed.launcher.train.engine",
    "moe_testbed.launcher.train.ablation",
    "moe_testbed.launcher.checkpoint.checkpoints",
    "moe_testbed.model.language_model",
]
# What `deepspeed.initialize` imports.
DEEPSPEED_MODULES = [
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]
# What the ablation at the end of a training matches experts to domains with: its import is half of a small training.
# What files of tests import whose functions run on ranks.
OTHER_MODULES = ["scipy.optimize", "pytest"]


def import_ahead(*modules: str) -> None:
    """Lets the server import these too. It must not have been started yet."""
    OTHER_MODULES.extend(modules)


def fork(file: Path, variables: dict[str, Any]) -> ForkServerProcess:
    """Starts a process that runs a file with these variables, which must be picklable, among its globals."""
    # Both are read at imports, so by the server: by DeepSpeed's, and by NumPy's, which starts threads otherwise, and a
    # fork has none of them.
    os.environ |= {"DS_ACCELERATOR": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*OUR_MODULES, *DEEPSPEED_MODULES, *OTHER_MODULES])
    process = context.Process(target=runpy.run_path, args=(str(file), variables))
    process.start()
    return process
