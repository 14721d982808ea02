"""The main job: train one model with one router."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import AskedToStop
from moe_testbed.launcher.ranks.preflight import check_preflight
from moe_testbed.launcher.ranks.ranks import is_first_rank
from moe_testbed.launcher.ranks.rendezvous import choose_device
from moe_testbed.launcher.ranks.session import Session
from moe_testbed.launcher.run.folder import RunFolder, SilentRunFolder
from moe_testbed.launcher.run.records import Manifest
from moe_testbed.launcher.tracking.mirror import Mirror
from moe_testbed.launcher.train.allocator import keep_freed_memory


def train(config: ExperimentConfig, run_dir: Path, trust: bool = False) -> None:
    """Trains to the end, from the newest whole checkpoint in ``run_dir`` or from the start.

    Args:
        trust: the run may be another user's, whose checkpoints can hold code.

    Raises:
        ConfigError, DataError, CheckpointError, DivergedError, RouterError: what a user can mend; the message says how.
        OtherRankError: another rank ended for one of them.
        LostRankError: another rank has died, hangs or cannot be reached.
        AskedToStop: by SIGUSR1 or SIGTERM; the same call continues.
    """
    # Adam's moments of a weight without gradient, as a dead expert's, decay to denormal numbers and stay there, which a
    # CPU is ten times slower with. Threads inherit this from the one that starts them, so it comes before torch's do.
    torch.set_flush_denormal(True)
    with Session(config) as session:
        device = choose_device(config.runtime.device)
        # This imports DeepSpeed, which looks for its accelerator once, and must not meet the mirror's import of MLflow.
        from moe_testbed.launcher.train.loop import run_loop
        from moe_testbed.launcher.train.stages.parent import find_parent

        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        keep_freed_memory()
        # What can go wrong on one rank alone comes before they meet: the others would wait for it.
        store = build_store(config.data.mix, Path(config.data.cache_dir), lambda text: print(text, file=sys.stderr))
        manifest, parent = Manifest(store.manifest), find_parent(config, run_dir, store, trust)
        folder = RunFolder.claim(run_dir, config, manifest, trust) if is_first_rank() else SilentRunFolder(run_dir)
        try:
            if folder.is_finished:
                # Whoever starts it once more need not wait for MLflow.
                folder.release()
                _mirror_again(config, run_dir)
                return
            session.join(device, folder)
            with _mirrored(config, run_dir), session.watched():
                check_preflight(config, store, session.ranks)
                run_loop(config, store, folder, session, parent)
        finally:
            folder.release()


@contextmanager
def _mirrored(config: ExperimentConfig, run_dir: Path) -> Iterator[None]:
    """Mirrors a run that trains to MLflow, from the first rank and if the config wants it."""
    if not (config.tracking.mlflow and is_first_rank()):
        yield
        return
    mirror = Mirror(run_dir, config.tracking.experiment)
    mirror.start()
    try:
        yield
    except BaseException as error:
        mirror.finish("killed" if isinstance(error, AskedToStop) else "failed")
        raise
    mirror.finish("finished")


def _mirror_again(config: ExperimentConfig, run_dir: Path) -> None:
    """Mirrors a run that is finished: the store may have been away when it was."""
    if not is_first_rank():
        return
    print(f"{run_dir} is finished already", file=sys.stderr)
    if config.tracking.mlflow:
        Mirror(run_dir, config.tracking.experiment).finish()
