"""The tour of a training step: each name that it links is there, and it is as short as it says."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.test_names import names_in

ROOT = Path(__file__).parents[2]
TOUR = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
STOPS = re.findall(r"\]\(\.\./([\w/]+\.py)#(\w+)\)", TOUR)
FILES = list(dict.fromkeys(path for path, _ in STOPS))


def test_every_name_that_the_tour_links_is_in_its_file() -> None:
    assert len(STOPS) > 20
    assert [f"{path}#{name}" for path, name in STOPS if name not in names_in(ROOT / path)] == []


def test_the_stops_are_numbered_in_the_order_of_the_files() -> None:
    starts = re.findall(r"^\*\*(\d+)\. \[\w+\]\(\.\./([\w/]+\.py)#", TOUR, re.MULTILINE)
    assert [int(number) for number, _ in starts] == list(range(1, len(FILES) + 1))
    assert [path for _, path in starts] == FILES


def test_the_tour_is_short() -> None:
    files, lines = re.findall(r"It takes (\d+) files with fewer than ([\d,]+) lines", " ".join(TOUR.split()))[0]
    assert int(files) == len(FILES) <= 16
    counted = sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert counted < int(lines.replace(",", "")) <= 2000
