"""Runs of other users: what in them could hold code is not read without --trust."""

from __future__ import annotations

import grp
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run import ownership
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import Manifest
from moe_testbed.launcher.train.stages.parent import find_parent
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


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group has another user in it."""
    monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group(("lab", "x", number, ["ann"])))


PARTS = ["", "config.yaml", "checkpoints", CHECKPOINT, f"{CHECKPOINT}/mp_rank_00_model_states.pt"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("bits, writers", [(0o002, "every user"), (0o020, "the group lab")])
def test_what_others_can_write_is_refused_until_the_command_that_is_named_was_given(
    bits: int, writers: str, name: str, run: RunFolder, lab: None
) -> None:
    path = run.path / name
    run.prepare(CONFIG)
    path.chmod(path.stat().st_mode | bits)
    with pytest.raises(ConfigError, match=f"^{path} can be written by {writers}: .* or give --trust if") as refused:
        run.prepare(CONFIG)
    run.prepare(CONFIG, trust=True)
    if name != "config.yaml":  # which has just been written anew
        cure = str(refused.value).split("written there, ")[1].split(", or")[0]
        subprocess.run(cure.split(), check=True)
    run.prepare(CONFIG)


@pytest.mark.parametrize("members, refused", [([], False), (["me"], False), (["me", "ann"], True)])
def test_a_group_of_ones_own_is_no_reason(
    members: list[str], refused: bool, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_name", lambda number: "me")
    monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group(("me", "x", number, members)))
    run.path.chmod(0o775)
    if refused:
        with pytest.raises(ConfigError, match="can be written by the group me"):
            run.prepare(CONFIG)
    else:
        run.prepare(CONFIG)


def test_neither_an_unknown_group_nor_modes_that_say_nothing_are_a_reason(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(grp, "getgrgid", unknown)
    run.path.chmod(0o775)
    run.prepare(CONFIG)
    run.path.chmod(0o1777)  # as of /tmp
    run.prepare(CONFIG)
    run.path.chmod(0o777)
    with pytest.raises(ConfigError, match="every user"):
        run.prepare(CONFIG)
    monkeypatch.setattr(ownership, "_own_file_in", lambda folder: os.stat(run.path))
    run.prepare(CONFIG)


def test_a_link_counts_by_what_it_leads_to(run: RunFolder, lab: None, tmp_path: Path) -> None:
    elsewhere = tmp_path / "scratch"
    run.checkpoints.rename(elsewhere)
    run.checkpoints.symlink_to(elsewhere)
    run.prepare(CONFIG)
    elsewhere.chmod(0o775)
    with pytest.raises(ConfigError, match="can be written by the group lab"):
        run.prepare(CONFIG)


def test_runs_are_made_for_their_owner_to_write_whatever_the_umask_says(tmp_path: Path, lab: None) -> None:
    before = os.umask(0)
    try:
        folder = RunFolder(tmp_path / "suite" / "run")
        folder.prepare(CONFIG)
        with ownership.writable_by_owner():
            folder.checkpoints.mkdir()
        folder.prepare(CONFIG)
        assert (tmp_path / "suite").stat().st_mode & 0o777 == 0o777
    finally:
        assert os.umask(before) == 0


def test_a_config_of_another_user_is_not_even_imported(
    run: RunFolder, give: Give, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    tree: dict[str, Any] = run.read_config_tree()
    tree["routing"]["router"] = {"name": "evil.py:Router"}
    run.write_config_tree(tree)
    give(run.config_file)
    encoder = SimpleNamespace(run="run", folder=lambda run_dir, seed: run.path)
    started: Any = SimpleNamespace(start=SimpleNamespace(encoder=encoder), seed=1)
    store: Any = None
    with pytest.raises(ConfigError, match="belongs to user"):
        run.prepare(CONFIG)
    with pytest.raises(ConfigError, match="belongs to user"):
        find_parent(started, tmp_path / "new", store)
    with pytest.raises(ConfigError, match="it ran"):
        run.prepare(CONFIG, trust=True)
    with pytest.raises(ConfigError, match="it ran"):
        find_parent(started, tmp_path / "new", store, trust=True)
