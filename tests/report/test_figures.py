"""The pictures: which there are, what is written where."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from moe_testbed.launcher.report.figures import heatmaps
from moe_testbed.launcher.report.figures.canvas import png
from moe_testbed.launcher.report.figures.figures import COLOURS, LINES, MARKERS, _jobs, _looks, draw_all, save
from moe_testbed.launcher.report.figures.lines import loss_panel
from moe_testbed.launcher.report.figures.outlines import text_width
from moe_testbed.launcher.report.figures.scatter import Point, draw_scatter
from moe_testbed.launcher.report.figures.sheet import Box, Cells, Sheet
from moe_testbed.launcher.report.numbers.results import summarise
from moe_testbed.launcher.report.read.records import read_suite

MakeSuite = Callable[..., Path]

LABELS = ("reference", "permuted_reference", "top_k_global", "dense")
NAMES = ("a", "b", "c")


class Written(Sheet):
    """A sheet that remembers what was written, and where."""

    texts: list[tuple[str, float, float]]

    def write(self, x: float, y: float, text: str, *args: Any, **options: Any) -> None:
        self.texts.append((text, x, y))
        super().write(x, y, text, *args, **options)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float]]:
    texts: list[tuple[str, float, float]] = []
    monkeypatch.setattr(Written, "texts", texts, raising=False)
    monkeypatch.setattr(heatmaps, "Sheet", Written)
    return texts


def test_which_pictures_there_are_and_their_files(make_suite: MakeSuite, tmp_path: Path) -> None:
    suite = read_suite(make_suite(labels=LABELS, num_layers=1))
    pictures = draw_all(suite, summarise(suite))
    of_runs = [f"{kind}_{label}" for kind in ("routing", "causal") for label in sorted(LABELS[:3])]
    assert sorted(picture.name for picture in pictures) == sorted(
        ["scatter", "loss_evaluation", "loss_train", "training", "loss_by_domain", "layers", "router_layers"]
        + ["causal_layers", "redundancy_layers", *of_runs]
    )
    assert {picture.name for picture in pictures if picture.heat_map} == {"loss_by_domain", *of_runs}
    save(pictures, tmp_path / "figures")
    for picture in pictures:
        assert (tmp_path / "figures" / f"{picture.name}.svg").read_bytes().startswith(b"<?xml")
        image = Image.open(tmp_path / "figures" / f"{picture.name}.png")
        assert image.width >= 700
        assert (image.mode == "P") == picture.heat_map


def test_losses_are_named_after_the_split(make_suite: MakeSuite) -> None:
    folder = make_suite(labels=LABELS[:2], num_layers=1)
    for path in folder.glob("*/config.yaml"):
        path.write_text(path.read_text() + "evaluation: {split: tuning}\n")
    suite = read_suite(folder)
    results = summarise(suite)
    assert results["split"] == "tuning"
    jobs = {job.name: job for job in _jobs(suite, results)}
    assert jobs["loss_evaluation"].title == "Tuning loss"
    assert jobs["scatter"].arguments[1] == "tuning"


def edges(sheet: Sheet, number: int = 0) -> tuple[float, float, float, float]:
    """The left, right, lower and upper edge of a sheet's cells."""
    box = sheet.cells[number].box
    return box.x, box.x + box.width, box.y, box.y + box.height


def test_experts_stand_by_owner_and_each_owner_is_named(written: list[tuple[str, float, float]]) -> None:
    # Expert 0 serves c, experts 1 and 3 serve a, expert 2 serves b.
    counts_YDE = np.array([[[0, 8, 1, 9], [1, 0, 9, 0], [9, 2, 0, 1]]])
    sheet = heatmaps.draw_routing(counts_YDE, NAMES, [0])
    assert sheet.cells[0].values_XX == pytest.approx(
        (counts_YDE[0] / counts_YDE[0].sum(1, keepdims=True))[:, [3, 1, 2, 0]]
    )
    left, right, lower, upper = edges(sheet)
    rows = {text: y for text, x, y in written if text in NAMES and x < left}
    owners = {text: x for text, x, y in written if text in NAMES and y < lower}
    assert [(upper - rows[name]) / (upper - lower) for name in NAMES] == pytest.approx([1 / 6, 3 / 6, 5 / 6])
    assert [(owners[name] - left) / (right - left) for name in NAMES] == pytest.approx([1 / 4, 5 / 8, 7 / 8])


def test_unused_experts_stand_last_and_belong_to_nobody(written: list[tuple[str, float, float]]) -> None:
    counts_YDE = np.array([[[0, 9, 1, 0], [0, 1, 9, 0], [0, 0, 2, 0]], np.zeros((3, 4), dtype=int)])
    sheet = heatmaps.draw_routing(counts_YDE[:1], NAMES, [0])
    left, right, lower, _ = edges(sheet)
    spans = [(text, (x - left) / (right - left)) for text, x, y in written if y < lower and text in (*NAMES, "unused")]
    assert sheet.cells[0].values_XX[:, 2:].sum() == 0
    assert spans[-1] == ("unused", pytest.approx(3 / 4))
    written.clear()
    heatmaps.draw_routing(counts_YDE[1:], NAMES, [0])
    assert [text for text, _, _ in written].count("unused") == 1


def test_of_many_layers_the_page_has_three_and_the_files_all(make_suite: MakeSuite, tmp_path: Path) -> None:
    domains = tuple(f"professional_topic_{d}" for d in range(57))
    suite = read_suite(
        make_suite(labels=("top_k_global",), domains=domains, num_layers=6, num_experts=64, sequences_per_domain=2)
    )
    pictures = {picture.name: picture for picture in draw_all(suite, summarise(suite))}
    shown = pictures["routing_top_k_global"]
    assert "First, middle and last of 6 MoE layers" in shown.caption
    assert shown.whole is not None
    assert Image.open(io.BytesIO(shown.whole[1])).width > Image.open(io.BytesIO(shown.png)).width
    save(list(pictures.values()), tmp_path)
    assert (tmp_path / "routing_top_k_global_all_layers.svg").exists()


def test_layers_first_middle_last(written: list[tuple[str, float, float]]) -> None:
    counts_YDE = np.ones((9, 3, 4), dtype=np.int64)
    heatmaps.draw_routing(counts_YDE, NAMES, [0, 4, 8])
    assert [text for text, _, _ in written if text.startswith("MoE layer")] == [f"MoE layer {y}" for y in (0, 4, 8)]


def test_forced_and_barred_stand_below_each_other_with_gaps(written: list[tuple[str, float, float]]) -> None:
    ablation = [[0.1, None, -0.2], [0.0, None, 0.4], [0.2, None, 0.1]]
    sheet = heatmaps.draw_causes(np.eye(3).tolist(), ablation, NAMES)
    barred = sheet.cells[2]
    assert np.isnan(barred.values_XX[:, 1]).all()
    assert barred.high == -barred.low == 0.4
    assert edges(sheet, 0)[2] > edges(sheet, 2)[3]


def test_a_cell_has_the_colour_of_its_value_in_both_formats() -> None:
    """The oracle is matplotlib's colour map, asked value by value; a PNG has a palette, which rounds."""
    values_XX = np.array([[0.0, 0.3, 1.0], [0.5, np.nan, 7.0]])
    expected = [[viridis(0.0), viridis(0.3), viridis(1.0)], [viridis(0.5), (217, 222, 228), viridis(1.0)]]
    sheet = Sheet(4, 2)
    sheet.show(Cells(values_XX, Box(0.5, 0.25, 3.0, 1.0), 0.0, 1.0, "viridis"))
    page = np.asarray(Image.open(io.BytesIO(sheet.png(100))).convert("RGB"))
    element = ElementTree.fromstring(sheet.svg()).find("{http://www.w3.org/2000/svg}image")
    assert element is not None
    assert [float(element.attrib[name]) for name in ("x", "y", "width", "height")] == [36, 54, 216, 72]
    content = element.attrib["{http://www.w3.org/1999/xlink}href"].removeprefix("data:image/png;base64,")
    cells = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
    for row, column in np.ndindex(2, 3):
        assert page[100 + 50 * row, 100 + 100 * column] == pytest.approx(expected[row][column], abs=8)
        assert cells[36 + 72 * row, 72 + 144 * column] == pytest.approx(expected[row][column], abs=3)
    assert page[10, 10].tolist() == [255, 255, 255]


def viridis(share: float) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in matplotlib.colormaps["viridis"](share)[:3])


def test_runs_of_a_large_suite_look_different() -> None:
    results = {"runs": [{"label": str(n), "role": "learned"} for n in range(100)]}
    looks = list(_looks(results).values())
    assert len(set(looks)) == 100
    assert len(COLOURS) * len(LINES) * len(MARKERS) >= 100


def test_the_axis_of_losses_is_cut_to_the_last_two_thirds(make_suite: MakeSuite) -> None:
    suite = read_suite(make_suite(labels=("reference", "top_k_global"), seeds=(1, 2)))
    panel = loss_panel(suite, summarise(suite)["runs"], "evaluation")
    assert [line.label for line in panel.lines] == ["reference", "top_k_global"]
    line = panel.lines[0]
    curves = [training.curve("evaluation", "cross_entropy") for training in suite.of("reference")]
    assert line.y == pytest.approx(np.mean([curve[:, 1] for curve in curves], axis=0))
    assert line.low is not None and line.low == pytest.approx(np.min([curve[:, 1] for curve in curves], axis=0))
    assert panel.limits is not None
    late = np.concatenate([one.y[one.x >= 400 / 3] for one in panel.lines])
    assert panel.limits[0] < late.min() and late.max() < panel.limits[1] < panel.lines[0].y[0]


def test_text_is_as_wide_and_as_high_as_said() -> None:
    sheet = Sheet(4, 1)
    sheet.write(1, 0.5, "xxxx", 36)
    pixels = np.asarray(Image.open(io.BytesIO(sheet.png(100))).convert("L")) < 128
    columns, rows = np.flatnonzero(pixels.any(0)), np.flatnonzero(pixels.any(1))
    assert columns[0] == pytest.approx(100, abs=4)
    assert columns[-1] == pytest.approx(100 + 100 * text_width("xxxx", 36), abs=4)
    assert (rows[0] + rows[-1]) / 2 == pytest.approx(50, abs=3)


@pytest.mark.parametrize("upright", [False, True])
def test_text_stands_in_an_svg_where_it_stands_in_a_png(upright: bool) -> None:
    """The oracle applies the element's matrix to the corners of its path, as SVG says."""
    sheet = Sheet(4, 3)
    sheet.write(1, 1, "xxxx", 36, upright=upright)
    pixels = np.asarray(Image.open(io.BytesIO(sheet.png(72))).convert("L")) < 128
    (path,) = ElementTree.fromstring(sheet.svg()).iter("{http://www.w3.org/2000/svg}path")
    a, b, c, d, e, f = map(float, path.attrib["transform"].removeprefix("matrix(").removesuffix(")").split())
    corners = np.array(re.findall(r"-?\d+", path.attrib["d"]), dtype=float).reshape(-1, 2)
    x, y = np.array([[a, c], [b, d]]) @ corners.T + [[e], [f]]
    columns, rows = np.flatnonzero(pixels.any(0)), np.flatnonzero(pixels.any(1))
    assert [x.min(), x.max(), y.min(), y.max()] == pytest.approx(
        [columns[0], columns[-1] + 1, rows[0], rows[-1] + 1], abs=1.5
    )


def test_labels_cover_neither_points_nor_one_another() -> None:
    """Where there is room; each is drawn where its rectangle was kept free, found by looking at the pixels."""
    points = [Point(f"run_{n}", "reference" if n == 3 else "learned", 0.2 * n, 0.9, 2.0 + n) for n in range(5)]
    figure = draw_scatter(points, "validation")
    plain, labelled = (np.asarray(Image.open(io.BytesIO(png(one, 100))).convert("L")) for one in (
        without_labels(figure), draw_scatter(points, "validation")))  # fmt: skip
    changed = plain != labelled
    columns = np.flatnonzero(changed.any(0))
    assert (labelled[changed] < 250).any() and columns.max() - columns.min() > 300
    axes = figure.axes[0]
    for x, y in axes.transData.transform([(point.information, point.used) for point in points]) * 100 / figure.dpi:
        row, column = round(len(plain) - y), round(x)
        assert not changed[row - 7 : row + 8, column - 7 : column + 8].any()


def without_labels(figure: Figure) -> Figure:
    for artist in [*figure.artists, *figure.patches]:
        if artist is not figure.patch:
            artist.remove()
    return figure
