"""Runs of other users: what in them could hold code is not read without --trust."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run import ownership
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import Manifest
from tests.distributed import corpus

STRANGER = 54_321
CONFIG = ExperimentConfig.model_validate(
    corpus.make_experiment(
        {"mix": {"name": "m", "domains": {"a": {"licence": "x", "sources": [{"kind": "files", "glob": "*"}]}}}}
    )
)
Give = Callable[[Path], None]


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Give:
    """``give(path)`` makes a file, folder or link another user's; where only root may, it is merely said to be."""
    given: set[Path] = set()
    known = ownership._owner

    def owner(path: Path, follow: bool) -> int:
        known(path, follow)
        return STRANGER if path in given or (follow and path.resolve() in given) else known(path, follow)

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, STRANGER, -1, follow_symlinks=False)
        else:
            given.add(path)
            monkeypatch.setattr(ownership, "_owner", owner)

    return give


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.prepare(CONFIG)
    checkpoint = folder.checkpoints / "step_00000006"
    checkpoint.mkdir(parents=True)
    (checkpoint / "mp_rank_00_model_states.pt").write_bytes(b"weights")
    (folder.path / "log.txt").write_text("of no importance")
    return folder


CHECKPOINT = "checkpoints/step_00000006"


@pytest.mark.parametrize(
    "name", ["", "config.yaml", "checkpoints", CHECKPOINT, f"{CHECKPOINT}/mp_rank_00_model_states.pt"]
)
def test_a_run_of_another_user_is_refused_unless_trusted(name: str, run: RunFolder, give: Give) -> None:
    run.prepare(CONFIG)
    give(run.path / name)
    said = rf"{run.path / name} belongs to user {STRANGER}, and you are .*choose another folder, or give --trust if you"
    with pytest.raises(ConfigError, match=said):
        run.prepare(CONFIG)
    with pytest.raises(ConfigError, match=said):
        RunFolder.claim(run.path, CONFIG, Manifest({"domains": {}}))
    run.prepare(CONFIG, trust=True)
    RunFolder.claim(run.path, CONFIG, Manifest({"domains": {}}), trust=True).release()


def test_what_holds_no_code_may_be_anybodys(run: RunFolder, give: Give) -> None:
    give(run.path / "log.txt")
    run.prepare(CONFIG)


def test_links_count_by_their_own_owner_and_by_what_they_lead_to(run: RunFolder, give: Give, tmp_path: Path) -> None:
    elsewhere = tmp_path / "scratch"
    run.checkpoints.rename(elsewhere)
    run.checkpoints.symlink_to(elsewhere)
    run.prepare(CONFIG)
    give(elsewhere / "step_00000006" / "mp_rank_00_model_states.pt")
    with pytest.raises(ConfigError, match=r"mp_rank_00_model_states.pt belongs to"):
        run.prepare(CONFIG)
    (elsewhere / "step_00000006" / "mp_rank_00_model_states.pt").unlink()
    run.prepare(CONFIG)
    give(run.checkpoints)
    with pytest.raises(ConfigError, match=r"checkpoints belongs to"):
        run.prepare(CONFIG)


def test_what_cannot_be_continued_is_no_reason(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").prepare(CONFIG)
    dangling = RunFolder(tmp_path / "dangling")
    dangling.prepare(CONFIG)
    dangling.checkpoints.symlink_to(tmp_path / "nowhere")
    dangling.prepare(CONFIG)


def test_a_share_that_gives_files_to_one_user_holds_own_runs(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, give: Give
) -> None:
    give(run.config_file)
    with pytest.raises(ConfigError):
        run.prepare(CONFIG)
    monkeypatch.setattr(ownership, "_own_number_in", lambda folder: STRANGER)
    run.prepare(CONFIG)


def test_a_config_of_another_user_is_not_even_imported(
    run: RunFolder, give: Give, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    tree: dict[str, Any] = run.read_config_tree()
    tree["routing"]["router"] = {"name": "evil.py:Router"}
    run.write_config_tree(tree)
    give(run.config_file)
    with pytest.raises(ConfigError, match="belongs to user"):
        run.prepare(CONFIG)
    with pytest.raises(ConfigError, match="it ran"):
        run.prepare(CONFIG, trust=True)
