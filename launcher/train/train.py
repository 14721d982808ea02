"""The main job: train one model with one router."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import AskedToStop
from moe_testbed.launcher.ranks.heartbeat import reason_of
from moe_testbed.launcher.ranks.lifeline import end_with_launch
from moe_testbed.launcher.ranks.preflight import call_the_roll
from moe_testbed.launcher.ranks.ranks import choose_device, is_alone, is_first_rank, join
from moe_testbed.launcher.ranks.stopping import Stopping
from moe_testbed.launcher.ranks.watchdog import Watchdog
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import Status
from moe_testbed.launcher.tracking.mirror import Mirror
from moe_testbed.launcher.train.allocator import keep_freed_memory


def train(config: ExperimentConfig, run_dir: Path) -> None:
    """Trains to the end, from the newest whole checkpoint in ``run_dir`` or from the start.

    Raises:
        ConfigError, DataError, CheckpointError, RouterError: what a user can mend; the message says how.
        OtherRankError: another rank ended for one of them.
        LostRankError: another rank has died, hangs or cannot be reached.
        AskedToStop: by SIGUSR1 or SIGTERM; the same call continues.
    """
    with Stopping(is_alone()) as stopping:
        end_with_launch()
        _train(config, run_dir, stopping)


def _train(config: ExperimentConfig, run_dir: Path, stopping: Stopping) -> None:
    device = choose_device(config.runtime.device)
    # This imports DeepSpeed, which looks for its accelerator once, and must not meet the mirror's import of MLflow.
    from moe_testbed.launcher.train.loop import run_loop

    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    keep_freed_memory()
    # What can go wrong on one rank alone comes before they join: the others would wait for it.
    store = build_store(config.data.mix, Path(config.data.cache_dir), lambda text: print(text, file=sys.stderr))
    folder = RunFolder.claim(run_dir, config, store.manifest) if is_first_rank() else None
    status = folder or RunFolder(run_dir)
    if status.is_finished:
        if folder:
            folder.release()
            print(f"{run_dir} is finished already", file=sys.stderr)
            if config.tracking.mlflow:
                # The store may have been away when it finished.
                Mirror(run_dir, config.tracking.experiment).finish()
        return
    if folder:
        folder.write_status(Status("running", folder.read_status().step, config.training.steps))
        stopping.note = lambda stop: status.note_end("stopped", str(stop))
    try:
        ranks = join(device, config.parallel.slow_timeout_seconds)
    except Exception as error:
        if folder:
            status.note_end("failed", reason_of(error))
        raise
    watchdog = Watchdog(ranks, config.parallel, config.training.steps, status.note_end)
    stopping.note, stopping.all_alive = watchdog.explain, watchdog.all_alive
    mirror = Mirror(run_dir, config.tracking.experiment) if folder and config.tracking.mlflow else None
    try:
        call_the_roll(config, store, ranks)
        if mirror:
            mirror.start()
        stopped = run_loop(config, run_dir, folder, store, ranks, stopping, watchdog)
        if stopped and folder:
            status.note_end("stopped", stopped)
        watchdog.close()
        if mirror:
            mirror.finish("killed" if stopped else "finished")
    except BaseException as error:
        cause = watchdog.explain(error)
        if mirror:
            mirror.finish("killed" if isinstance(cause, AskedToStop) else "failed")
        raise cause from (None if cause is error else error)
    finally:
        if folder:
            folder.release()
        dist.destroy_process_group()
    if stopped:
        raise AskedToStop(stopped)
