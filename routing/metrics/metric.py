"""The record of a metric: the one place where its name, its meaning and where it is shown are written down.

From these records come the tables of docs/metrics.md, the numbers of results.json and results.csv, the columns, tables,
figures and definitions of the report, the metrics by which suites are compared, and the keys that MLflow gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

COUNTS = ("counts_YDE",)
"""What a metric of counts takes: a report gives it the first choices, all choices, and what was kept of them."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a report, or (`part` is None) a function that numbers are made with and that no report shows.

    What it says, on the report's page and in docs/metrics.md:
    name: its key in results.json and in MLflow; a function has the same name.
    title: its name in words; heading: the same where it stands in a table, if that is shorter.
    question: what it answers. formula, range, blind_to: how it is computed, between which values it lies and what a
    good value means, and what it does not see. note: what else a reader must know.

    How it is computed:
    function: of the arrays `of`, one layer of each at a time, where their names begin their axes with Y (MoE layers).
    The names are those of an evaluation's or an analysis's arrays, or COUNTS. Without `of` the report computes it in a
    way of its own.
    of_many: the same of Z resamples of the table at once, to Z numbers: a table of counts [Z, D, E], or one of damage
    [Z, E, D] with its owners [E]. Without it a bootstrap, which has hundreds of resamples, goes one by one.

    Where it is shown:
    part: the part of a run in results.json, "" for the run itself. Every part but "", routing and over_training is a
    table of the report too.
    digits: decimals; in_percent: whether it is shown as per cent.
    bounded: the range of its bootstrap interval; None for a metric that has no interval.
    column: in the result table. `first` columns are shown everywhere, `second` ones in a terminal and, with the `third`
    ones, behind a switch of the page.
    axis: its label in the figures by layer and over training, which show the metrics that have one.
    compared: whether suites are compared by it. tracked: whether MLflow gets it, and metrics.jsonl if it is of COUNTS.
    """

    name: str
    question: str
    formula: str
    range: str
    blind_to: str
    note: str = ""
    title: str = ""
    heading: str = ""
    function: Callable[..., Any] | None = None
    of_many: Callable[..., Any] | None = None
    of: tuple[str, ...] = ()
    part: str | None = None
    digits: int = 2
    in_percent: bool = False
    bounded: tuple[float, float] | None = None
    column: Literal["first", "second", "third"] | None = None
    axis: str = ""
    compared: bool = False
    tracked: bool = False

    @property
    def path(self) -> tuple[str, ...]:
        """The keys that lead to it from a run of results.json; of a metric of counts, the form of all choices."""
        assert self.part is not None, f"{self.name} is no number of results.json"
        return (*{"": (), "routing": ("routing", "top_k")}.get(self.part, (self.part,)), self.name)

    @property
    def column_title(self) -> str:
        """Its name at the head of a column."""
        return self.heading or self.title
