"""Sends to the MLflow store what it lacks of runs that were written without it, or that it missed something of."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_testbed.launcher.config.experiment import TrackingConfig
from moe_testbed.launcher.errors import FAILED, ConfigError
from moe_testbed.launcher.run.files import value_at
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.suite_folder import SuiteFolder
from moe_testbed.launcher.tracking.background import Background
from moe_testbed.launcher.tracking.mirror import Mirror, SuiteMirror, begun_runs, ended_as
from moe_testbed.launcher.tracking.refusal import without_password
from moe_testbed.launcher.tracking.state import MAX_KEYS_OF_A_KIND, Ledger, named, read_ledger
from moe_testbed.launcher.tracking.store import ask
from moe_testbed.launcher.tracking.uri import store_uri


def sync(folders: Sequence[Path], new_runs: bool = False, experiment: str | None = None) -> int:
    """Sends the runs and suites in these folders, also those that go on, and prints what of each was new to the store.

    A suite is an MLflow run, its trainings are the children, as `compare` makes them. What was sent before, by this
    command or by a training, is not sent again. Folders with neither are passed over and told of.

    Args:
        new_runs: makes a new MLflow run, with everything, in the place of each that was deleted.
        experiment: name of the MLflow experiment in which runs are made; None: the one in each run's config.

    Returns:
        Exit status: 0 if the store has everything now, 1 if it could not be reached or refused something.

    Raises:
        ConfigError: a folder is not there, or there is nothing to send in any.
    """
    to_send = _with_suites(folders)
    uri = store_uri()
    if not _reached(uri):
        return FAILED
    sent = []
    for folder in to_send:
        sent.append(_send(folder, uri, new_runs, experiment))
        if not sent[-1] and not _reached(uri):
            return FAILED
    print(f"MLflow at {without_password(uri)} has {sum(sent)} of {len(sent)}")
    return 0 if all(sent) else FAILED


def _with_suites(folders: Sequence[Path]) -> list[Path]:
    """Returns the folders of suites and runs to send, each once, a suite before its runs."""
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}; name folders of runs or suites, such as runs/demo")
        if _is_suite(folder):
            found |= dict.fromkeys([folder, *begun_runs(folder)])
        elif RunFolder(folder).has_begun:
            suite = [folder.parent] if _is_suite(folder.parent) else []
            found |= dict.fromkeys([*suite, folder])
        else:
            names = SuiteFolder(folder).config_file.name, RunFolder(folder).status_file.name
            print(f"{folder} is passed over: no suite ({names[0]}), no run that began ({names[1]})", file=sys.stderr)
    if not found:
        raise ConfigError("there is nothing to send; name folders of runs or suites, such as runs/demo")
    return list(found)


def _reached(uri: str) -> bool:
    where = f"no MLflow store at {without_password(uri)}; set MLFLOW_TRACKING_URI, or repeat this when it answers"
    return Background(where, "nothing is sent").attempt(lambda: ask(uri))


def _send(folder: Path, uri: str, new_runs: bool, experiment: str | None) -> bool:
    """Tells whether the store has all of a folder now."""
    before, not_sent = read_ledger(folder, uri), f"{folder} is not sent"
    background = Background(not_sent, not_sent)
    if _is_suite(folder):
        status, own = _suite_ended_as(folder), _experiment(next(iter(begun_runs(folder)), folder))
        mirror: SuiteMirror | Mirror = SuiteMirror(folder, experiment or own, background=background, replace=new_runs)
    else:
        status, own = ended_as(folder), _experiment(folder)
        mirror = Mirror(folder, experiment or own, background=background, replace=new_runs)
    if not mirror.settle(status):
        return False
    after = read_ledger(folder, uri)
    missing = f"; without {named(after.refused)}" if after.refused else ""
    more = f"; only the first {MAX_KEYS_OF_A_KIND} metrics of a kind" if after.left_out else ""
    print(f"{folder}: {_news(before, after)}; MLflow run {after.run_id}, {status or 'running'}{missing}{more}")
    return not after.refused


def _is_suite(folder: Path) -> bool:
    return SuiteFolder(folder).is_suite


def _experiment(run_dir: Path) -> str:
    return str(value_at(RunFolder(run_dir).read_config_tree(), "tracking", "experiment") or TrackingConfig().experiment)


def _suite_ended_as(suite_dir: Path) -> str | None:
    """Returns finished or failed once all the suite's runs are; None before, since one that was stopped, or has not
    begun, goes on some day."""
    states = {ended_as(folder.path) for folder in SuiteFolder(suite_dir).trainings()}
    if not states or states - {"finished", "failed"}:
        return None
    return "failed" if "failed" in states else "finished"


def _news(before: Ledger, after: Ledger) -> str:
    """Returns what was sent between the two, in words."""
    if before.run_id != after.run_id:
        before = Ledger(after.store, after.key, after.started_ms)
    first, last = (max(ledger.steps.values(), default=0) for ledger in (before, after))
    files = sum(name.startswith("file ") and before.sent.get(name) != digest for name, digest in after.sent.items())
    news = [f"steps {first + 1} to {last}"] if last > first else []
    news += [f"{files} files" if files > 1 else "1 file"] if files else []
    return ", ".join(news) or "nothing new"
