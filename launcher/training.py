"""The main job: train one model with one router."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moe_testbed.data.build import build_store
from moe_testbed.data.store import Store
from moe_testbed.launcher.allocator import keep_freed_memory
from moe_testbed.launcher.config import ExperimentConfig
from moe_testbed.launcher.ranks import choose_device, join
from moe_testbed.launcher.run_folder import RunFolder
from moe_testbed.launcher.tracking import Mirror


def train(config: ExperimentConfig, run_dir: Path) -> None:
    """Trains to the end, from the newest whole checkpoint in ``run_dir`` or from the start.

    Raises:
        ConfigError, DataError, CheckpointError: what a user can mend; the message says how.
    """
    device = choose_device(config.runtime.device)
    # This imports DeepSpeed, which looks for its accelerator once, and must not meet the mirror's import of MLflow.
    from moe_testbed.launcher.loop import run_loop

    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    keep_freed_memory()
    ranks = join(device)
    folder = mirror = None
    try:
        if ranks.rank == 0:
            folder = RunFolder.claim(run_dir, config)
            mirror = _start_mirror(config, run_dir)
        run_loop(config, run_dir, folder, _open_store(config), ranks)
        if mirror:
            mirror.finish()
    except BaseException as error:
        if folder:
            folder.write_status("failed", folder.last_step(), config.training.steps, _reason(error))
            if mirror:
                mirror.finish("failed")
        raise
    finally:
        dist.destroy_process_group()


def _start_mirror(config: ExperimentConfig, run_dir: Path) -> Mirror | None:
    """MLflow's mirror of the folder, unless it is switched off or `compare` mirrors all runs itself."""
    if not config.tracking.mlflow:
        return None
    mirror = Mirror(run_dir, config.tracking.experiment, os.environ.get("MOE_TESTBED_MLFLOW_PARENT"))
    mirror.start()
    return mirror


def _open_store(config: ExperimentConfig) -> Store:
    """Rank 0 builds the store where it is missing; the others wait for it."""
    for turn in (0, 1):
        if (dist.get_rank() == 0) == (turn == 0):
            store = build_store(config.data.mix, Path(config.data.cache_dir), lambda text: print(text, file=sys.stderr))
        dist.barrier()
    return store


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
