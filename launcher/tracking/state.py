"""Knows what a tracking store has been sent of a folder, and what is new in it since. Nothing here knows MLflow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from moe_testbed.launcher.run.files import write_atomically
from moe_testbed.launcher.run.folder import RunFolder, mlflow_file

MAX_KEYS_OF_A_KIND = 100
MAX_KEYS_NAMED = 10
MAX_BATCH_METRICS = 1000
MAX_KEY_LENGTH, MAX_VALUE_LENGTH = 250, 6000
_LAST_LINES = 1 << 16


@dataclass(frozen=True)
class Ledger:
    """What one store has been sent of one folder.

    key: finds the run again if its id was never written down. offset, steps: bytes of metrics.jsonl, and the last step
    of each kind of line. keys: of metrics. left_out: the first keys beyond `MAX_KEYS_OF_A_KIND`. sent: digests of what
    is sent as a whole, such as an artifact.
    """

    store: str
    key: str
    started_ms: int
    run_id: str | None = None
    offset: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    sent: dict[str, str] = field(default_factory=dict)
    status: str | None = None


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
            return ledger if ledger.store == name else Ledger(name, ledger.key, ledger.started_ms)
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


def new_points(folder: RunFolder, ledger: Ledger) -> Iterator[tuple[list[Point], Ledger]]:
    """Batches of the metrics past the ledger's offset, each with the ledger as it is once the batch is sent.

    A line {"kind": "system", "step": 5, "seconds": 2.5, "cpu": 80.0} becomes the point "system/cpu". Lines of a step
    that was already sent are passed over: training that goes back to a checkpoint writes them again. Values that are
    not finite stay in the folder only, since a store cannot tell them from numbers; so do keys beyond the first
    `MAX_KEYS_OF_A_KIND` of their kind.
    """
    batch: list[Point] = []
    sent = ledger
    for line, offset in folder.read_metrics_from(ledger.offset):
        if line is not None and line.step > ledger.steps.get(line.kind, -1):
            timestamp = ledger.started_ms + int(1000 * (line.step if line.seconds is None else line.seconds))
            values = {
                allowed_key(f"{line.kind}/{key}"): float(value)
                for key, value in line.values.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
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


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns a nested config as dotted keys with text values, within MLflow's limits on both."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[allowed_key(f"{prefix}{key}")] = text[:MAX_VALUE_LENGTH]
    return flat


def allowed_key(key: str) -> str:
    """Returns the key, what MLflow refuses in it replaced, within MLflow's limit."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:MAX_KEY_LENGTH]
