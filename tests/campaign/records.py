"""Records: a value in a foreign suite's folder is another one than any program of ours writes. A report is made, or one
line says why not.

The files stay whole, so that no checksum and no parser tells: what stands in them must be looked at.
"""

from __future__ import annotations

import json
import random
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moe_testbed.launcher.report.numbers.results import summarise
from moe_testbed.launcher.report.numbers.results_csv import results_csv
from moe_testbed.launcher.report.page.page import render
from moe_testbed.launcher.report.read.records import read_suite
from moe_testbed.launcher.report.tables.extra_tables import extra_tables
from moe_testbed.launcher.report.tables.files import write_tables
from moe_testbed.launcher.report.tables.table import terminal_table
from moe_testbed.launcher.report.write import write_report
from tests.campaign.commands import copied, prepare
from tests.campaign.trials import Part, Trial, without_one

SUITE = "runs/pair"
VALUES = (
    None, True, False, 0, -1, 1, 2, 7, 10**6, 2**63, -(2**64), 10**400, 0.5, -0.5, 1e-300, 1e308, "inf", "-inf", "nan",
    "", "x", "../..", "\x1b[2J", "\u202e", "=1+1", "<script>", "a\nb", "x" * 10_000, "\ud800", [], {}, [1], ["x"],
    [None], {"a": 1}, {"": {}}, [[[]]], [[1, 2], [3]], {"x": {"y": {"z": []}}},
)  # fmt: skip
"""What stands in place of a value. Numbers that JSON has no text for are named."""
NAMED = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
SHAPES = ((), (0,), (1,), (2,), (5,), (1, 1), (2, 2), (0, 3), (2, 2, 4), (1, 2, 4), (2, 2, 2, 2))
KINDS = ("f8", "f4", "f2", "i8", "i2", "u8", "?", "U3", "S2", "c16", "M8[s]")
FILLS = (0, 1, -1, 3, 1000, 2**62, "inf", "nan")


class Records(Part):
    """A trial is the values that are changed, each by its file and its place in it."""

    name = "records"
    number = 1_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._world = prepare(folder / "world", "build", "compare")
        suite = self._world / SUITE
        read = (path for path in sorted(suite.rglob("*")) if path.suffix in (".json", ".jsonl", ".yaml", ".npz"))
        names = [str(path.relative_to(suite)) for path in read]
        self._files = [name for name in names if "checkpoints" not in name and name != "results.json"]

    def draw(self, generator: random.Random) -> Trial:
        changes = []
        for _ in range(generator.choice((1, 1, 2, 3))):
            name = generator.choice(self._files)
            place = generator.random()
            if name.endswith(".npz"):
                value: Any = [generator.choice(KINDS), generator.choice(SHAPES), generator.choice(FILLS)]
                value[1] = None if generator.random() < 0.5 else value[1]
            else:
                value = generator.choice(VALUES)
            act = generator.choice(("set", "set", "drop", "add"))
            changes.append({"file": name, "at": place, "value": value, "act": act})
        return {"changes": changes, "drawn": generator.random() < 0.05}

    def fault(self, trial: Trial) -> str | None:
        world = copied(self._world, self.folder / "trial")
        for change in trial["changes"]:
            path = world / SUITE / change["file"]
            if path.suffix == ".npz":
                _change_array(path, change)
            else:
                _change_value(path, change)
        try:
            _report(world / SUITE, trial["drawn"])
        except ValueError as error:
            if "\n" in str(error) or SUITE not in str(error):
                return f"{_place(error)}: a message that names no file: {str(error)[:200]}"
        except Exception as error:
            return f"{_place(error)}: {type(error).__name__}: {str(error)[:200]}"
        return None

    def smaller(self, trial: Trial) -> Iterator[Trial]:
        for changes in without_one(trial["changes"]):
            if changes:
                yield {**trial, "changes": changes}


def _report(folder: Path, drawn: bool) -> None:
    """Does what `write_report` does; figures, which take most of the time, only if they are to be `drawn`."""
    if drawn:
        terminal_table(write_report(folder).results)
        return
    suite = read_suite(folder)
    results = summarise(suite)
    results_csv(results)
    tables = extra_tables(results)
    write_tables(suite, results, tables, folder / "tables")
    render(suite, results, [], tables)
    terminal_table(results)


def _place(error: BaseException) -> str:
    """Returns the innermost function of the product that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if {"launcher", "routing"} & {*Path(frame.filename).parts}]
    return f"{Path(ours[-1].filename).stem}.{ours[-1].name}" if ours else "nowhere"


def _change_value(path: Path, change: dict[str, Any]) -> None:
    text = path.read_text(encoding="utf-8")
    tree: Any
    if path.suffix == ".yaml":
        tree = yaml.safe_load(text)
    elif path.suffix == ".jsonl":
        tree = [json.loads(line) for line in text.splitlines()]
    else:
        tree = json.loads(text)
    places = list(_places(tree))
    if not places:
        return
    parent, key = places[int(change["at"] * len(places))]
    value = NAMED.get(change["value"], change["value"]) if isinstance(change["value"], str) else change["value"]
    if change["act"] == "drop":
        del parent[key]
    elif change["act"] == "add" and isinstance(parent, dict):
        parent["more"] = value
    else:
        parent[key] = value
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in tree), encoding="utf-8")
    else:
        path.write_text(json.dumps(tree), encoding="utf-8")


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yields all places in a tree: the mapping or list, and the key or number in it."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _change_array(path: Path, change: dict[str, Any]) -> None:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    name = list(arrays)[int(change["at"] * len(arrays))]
    if change["act"] == "drop":
        del arrays[name]
    else:
        kind, shape, fill = change["value"]
        shape = arrays[name].shape if shape is None else tuple(shape)
        fill = NAMED.get(fill, fill) if isinstance(fill, str) else fill
        kind = arrays[name].dtype if change["act"] == "add" else np.dtype(kind)
        with np.errstate(all="ignore"):
            array = np.full(shape, fill, dtype=np.float64)
            try:
                arrays[name] = array.astype(kind)
            except (ValueError, OverflowError):
                return
    np.savez(path, **arrays)
