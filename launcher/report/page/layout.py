"""What stands where on the page: the sections in their order, and the groups of the result table's columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_testbed.routing.metrics import TOPICS, Metric

if TYPE_CHECKING:
    from moe_testbed.launcher.report.tables.extra_tables import ExtraTable


NARROW = 6
"""Columns of a table that has room in half of a wide page."""


@dataclass(frozen=True)
class Heading:
    """A section's title, its short form for the navigation, and what a reader must know to read it."""

    title: str
    short: str
    text: str = ""


@dataclass(frozen=True)
class Image:
    """A picture as the page shows it; `run` is the run that it belongs to, if it belongs to one."""

    name: str
    section: str
    title: str
    caption: str
    source: str
    width: int
    height: int
    run: str | None


@dataclass(frozen=True)
class Section:
    """One section with what stands in it."""

    name: str
    heading: Heading
    pictures: tuple[Image, ...]
    tables: tuple[ExtraTable, ...]

    @property
    def beside(self) -> bool:
        """Says whether its only picture and its tables fit side by side."""
        return len(self.pictures) == 1 and 0 < max((len(table.columns) for table in self.tables), default=0) <= NARROW


@dataclass(frozen=True)
class Group:
    """Neighbouring columns of the result table: those always shown, then those behind the switch."""

    title: str
    main: tuple[Metric, ...]
    more: tuple[Metric, ...]


HEADINGS = {
    "overview": Heading("Do experts specialise, and are all of them used?", "Overview"),
    "curves": Heading("Loss curves", "Curves"),
    "stages": Heading(
        "What trainings in stages take and save",
        "Stages",
        "FLOPs are those of the matrix products that really ran; a layer unit is one layer run forward and backward on "
        "one step, a frozen one counts a third. Losses compare within one task alone.",
    ),
    "probing": Heading(
        "What encoders have learned",
        "Probes",
        "Labelled tasks that were not trained on, learned from the states of each run's encoder.",
    ),
    "training": Heading("Over training", "Training", "When routing settles, and how it gets there."),
    "domains": Heading("Loss by domain", "Domains"),
    "routing": Heading(
        "Which experts serve which domain",
        "Experts",
        "Share of each domain's assignments by expert; experts are ordered by the domain that they serve most, with a "
        "white line where it changes. The colours are the same for every run: yellow is each expert's share if experts "
        "were divided evenly among domains, or four times the even share where domains outnumber experts.",
    ),
    "agreement": Heading("Agreement with the reference's groups", "Agreement"),
    "layers": Heading("Layer by layer", "Layers"),
    "router": Heading("How sure routers are", "Router"),
    "causal": Heading(
        "What experts do",
        "Causes",
        "Measured by intervening: barring an expert, or forcing tokens to another domain's experts.",
    ),
    "redundancy": Heading("Do experts do the same?", "Redundancy"),
    "vocabulary": Heading("Domains or words?", "Vocabulary"),
}
"""Sections in their order; others follow under their own names."""


def grouped(columns: Iterable[Metric]) -> list[Group]:
    """Returns the columns by topic, in each group those always shown first."""
    columns = tuple(columns)
    groups = []
    for topic, metrics in TOPICS.items():
        members = [column for column in columns if column in metrics]
        main = tuple(column for column in members if column.column == "first")
        more = tuple(column for column in members if column.column != "first")
        if members:
            groups.append(Group(topic.capitalize(), main, more))
    return groups


def sections(pictures: Sequence[Image], tables: Sequence[ExtraTable]) -> list[Section]:
    """The sections that have anything to show."""
    used = [picture.section for picture in pictures] + [table.section for table in tables]
    names = dict.fromkeys((*HEADINGS, *used))
    found = [
        Section(
            name,
            HEADINGS.get(name) or Heading(name.capitalize(), name.capitalize()),
            tuple(picture for picture in pictures if picture.section == name),
            tuple(table for table in tables if table.section == name),
        )
        for name in names
    ]
    return [section for section in found if section.pictures or section.tables]
