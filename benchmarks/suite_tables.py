"""How the numbers of a suite's results.json are written into a table: what demo.py, seeds.py and study.py share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Run = dict[str, Any]
Runs = dict[str, Run]
Stat = dict[str, Any]


def loss(run: Run) -> Stat:
    """Returns the validation loss."""
    return dict(run["loss"])


def routing(name: str, form: str = "top_k") -> Callable[[Run], Stat]:
    """Returns a function that takes a metric of the routing, mean over layers, from a run."""
    return lambda run: dict(run["routing"].get(form, {}).get(name, {"mean": None}))


def text(stat: Stat, digits: int, percent: bool = False) -> str:
    """Returns the mean, with ± its standard deviation where there are several seeds."""
    if stat["mean"] is None:
        return "–"
    factor = 100 if percent else 1
    spread = "" if stat.get("spread") is None else f" ± {factor * stat['spread']:.{digits}f}"
    return f"{factor * stat['mean']:.{digits}f}{spread}{' %' if percent else ''}"


def recovered(run: Run) -> str:
    """Returns the share of the reference's lead that a run recovers, with its interval."""
    share = run["recovered"]
    if share["value"] is None:
        return "–"
    return f"{100 * share['value']:.0f} % [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
