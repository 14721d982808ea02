"""Knows what a tracking store has been sent of a folder, and what is new in it since. Nothing here knows MLflow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from moe_testbed.launcher.run.files import write_atomically
from moe_testbed.launcher.run.folder import RunFolder, mlflow_file
from moe_testbed.launcher.tracking.names import key_of

MAX_KEYS_OF_A_KIND = 100
MAX_KEYS_NAMED = 10
MAX_BATCH_METRICS = 1000
_LAST_LINES = 1 << 16


@dataclass(frozen=True)
class Ledger:
    """What one store has been sent of one folder.

    key: finds the run again if its id was never written down. elsewhere: the id that it has in another store. offset,
    steps: bytes of metrics.jsonl, and the last step of each kind of line. keys: of metrics. left_out: the first keys
    beyond `MAX_KEYS_OF_A_KIND`. plainer: what keys are called that the store refused as they are. refused: what the
    store did not take, such as "metric train/loss", and why. sent: digests of what is sent as a whole, such as an
    artifact.
    """

    store: str
    key: str
    started_ms: int
    run_id: str | None = None
    offset: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    plainer: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    sent: dict[str, str] = field(default_factory=dict)
    status: str | None = None
    elsewhere: str | None = None


_LEDGERS = TypeAdapter(Ledger)


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    timestamp_ms: int
    step: int


def read_ledger(folder: Path, store: str) -> Ledger:
    """Returns the folder's ledger; a new one if there is none, or if it is about another store than the one at this
    URI.

    A damaged one is told on stderr and put aside, so that it is told once. A run keeps its key and its times from store
    to store: sent to one, to another and to the first again, it is found there, and its values are known.
    """
    name = hashlib.sha256(store.encode()).hexdigest()[:16]
    path = mlflow_file(folder)
    with contextlib.suppress(FileNotFoundError):
        try:
            ledger = _LEDGERS.validate_json(path.read_bytes())
            if ledger.store == name:
                return ledger
            return Ledger(name, ledger.key, ledger.started_ms, elsewhere=ledger.run_id or ledger.elsewhere)
        except ValidationError:
            aside = path.with_name(f"{path.name}.damaged")
            print(f"{path} is damaged and now {aside.name}; MLflow gets the run anew", file=sys.stderr)
            os.replace(path, aside)
    return Ledger(store=name, key=uuid.uuid4().hex, started_ms=_started_ms(RunFolder(folder)))


def _started_ms(folder: RunFolder) -> int:
    """Returns when the training began, also if a store hears of it only after its end; now if nothing is written
    yet."""
    try:
        written = folder.metrics_file.stat().st_mtime
    except OSError:
        return int(1000 * time.time())
    seconds = [line.seconds or 0.0 for line in folder.read_metrics(_LAST_LINES)]
    return int(1000 * (written - max(seconds, default=0.0)))


def write_ledger(folder: Path, ledger: Ledger) -> None:
    """Replaces the folder's ledger as a whole."""
    write_atomically(mlflow_file(folder), json.dumps(asdict(ledger), indent=1))


def new_points(folder: RunFolder, ledger: Ledger, slashes: int | None = None) -> Iterator[tuple[list[Point], Ledger]]:
    """Batches of the metrics past the ledger's offset, each with the ledger as it is once the batch is sent.

    A line {"kind": "system", "step": 5, "seconds": 2.5, "cpu": 80.0} becomes the point "system/cpu". Lines of a step
    that was already sent are passed over: training that goes back to a checkpoint writes them again. Values that are
    not finite stay in the folder only, since a store cannot tell them from numbers; so do keys beyond the first
    `MAX_KEYS_OF_A_KIND` of their kind. slashes: how many a key may have, see `key_of`.
    """
    batch: list[Point] = []
    known: dict[str, str] = {}
    sent = ledger
    for line, offset in folder.read_metrics_from(ledger.offset):
        if line is not None and line.step > ledger.steps.get(line.kind, -1):
            timestamp = ledger.started_ms + int(1000 * (line.step if line.seconds is None else line.seconds))
            values: dict[str, float] = {}
            for short, value in line.values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    name = f"{line.kind}/{short}"
                    if name not in known:
                        known[name] = key_of(name, (*ledger.keys, *values), slashes)
                    values[known[name]] = float(value)
            ledger = _with_keys(ledger, line.kind, values)
            metrics = [Point(key, value, timestamp, line.step) for key, value in values.items() if key in ledger.keys]
            if len(batch) + len(metrics) > MAX_BATCH_METRICS:
                yield batch, sent
                batch = []
            batch += metrics
            ledger = replace(ledger, steps={**ledger.steps, line.kind: line.step})
        ledger = replace(ledger, offset=offset)
        sent = ledger
    yield batch, sent


def _with_keys(ledger: Ledger, kind: str, keys: Iterable[str]) -> Ledger:
    """Returns the ledger with the new ones among a line's keys, as far as there is room for more of its kind."""
    new = [key for key in keys if key not in ledger.keys]
    if not new:
        return ledger
    room = MAX_KEYS_OF_A_KIND - sum(key.startswith(f"{kind}/") for key in ledger.keys)
    left_out = tuple(dict.fromkeys((*ledger.left_out, *new[room:])))[:MAX_KEYS_NAMED]
    return replace(ledger, keys=(*ledger.keys, *new[:room]), left_out=left_out)


def named(things: Collection[str]) -> str:
    """Returns the first of the things' names, and how many more there are."""
    first, more = list(things)[:MAX_KEYS_NAMED], len(things) - MAX_KEYS_NAMED
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")
