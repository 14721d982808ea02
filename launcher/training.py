"""The main job: train one model with one router."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moe_testbed.data.build import build_store
from moe_testbed.launcher.allocator import keep_freed_memory
from moe_testbed.launcher.config import ExperimentConfig
from moe_testbed.launcher.errors import MENDABLE, OtherRankError
from moe_testbed.launcher.failure import Failure, reason_of
from moe_testbed.launcher.ranks import choose_device, is_first_rank, join
from moe_testbed.launcher.run_folder import RunFolder, is_finished
from moe_testbed.launcher.tracking import Mirror


def train(config: ExperimentConfig, run_dir: Path) -> None:
    """Trains to the end, from the newest whole checkpoint in ``run_dir`` or from the start.

    Raises:
        ConfigError, DataError, CheckpointError, RouterError: what a user can mend; the message says how.
        OtherRankError: another rank ended for one of them.
    """
    device = choose_device(config.runtime.device)
    # This imports DeepSpeed, which looks for its accelerator once, and must not meet the mirror's import of MLflow.
    from moe_testbed.launcher.loop import run_loop

    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    keep_freed_memory()
    # What can go wrong on one rank alone comes before they join: the others would wait for it.
    store = build_store(config.data.mix, Path(config.data.cache_dir), lambda text: print(text, file=sys.stderr))
    folder = RunFolder.claim(run_dir, config, store.manifest) if is_first_rank() else None
    if is_finished(run_dir):
        if folder:
            folder.release()
            print(f"{run_dir} is finished already", file=sys.stderr)
            if config.tracking.mlflow:
                # The store may have been away when it finished.
                Mirror(run_dir, config.tracking.experiment).finish()
        return
    ranks = join(device)
    failure = Failure(ranks, run_dir)
    mirror = Mirror(run_dir, config.tracking.experiment) if folder and config.tracking.mlflow else None
    try:
        if mirror:
            mirror.start()
        run_loop(config, run_dir, folder, store, ranks)
        if mirror:
            mirror.finish()
    except BaseException as error:
        failure.tell(error)
        told = failure.told()
        # A rank that ends for its own reason writes it too: the launcher may kill rank 0 before it hears of it.
        if folder or isinstance(error, MENDABLE):
            status = folder or RunFolder(run_dir)
            status.write_status("failed", status.last_step, config.training.steps, told or reason_of(error))
        if mirror:
            mirror.finish("failed")
        if told and not isinstance(error, MENDABLE):
            raise OtherRankError(f"another rank ended with {told}") from error
        raise
    finally:
        if folder:
            folder.release()
        dist.destroy_process_group()
