"""report.html, figures/ and the terminal's table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from moe_testbed.launcher.report.numbers.results import read_results
from moe_testbed.launcher.report.tables.table import terminal_table
from moe_testbed.launcher.report.words import headlines
from moe_testbed.launcher.report.write import write_report
from tests.report.conftest import DEMO

MakeSuite = Callable[..., Path]
DROPLESS = ("reference", "permuted_reference", "top_k_global", "dense")


class Page(HTMLParser):
    """The page's text, the numbers that its tables sort by, and everything that it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.values, self.loads, self.tags, self.attributes = "", [], [], [], set()
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        attributes = dict(attrs)
        self.attributes |= attributes.keys()
        self.values.append(attributes.get("data-value"))
        self.loads += [attributes[name] for name in ("src", "href", "srcset", "data") if attributes.get(name)]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def edit_sequences(folder: Path, noise: float) -> None:
    """Add noise to a run's sequence losses that leaves its mean loss where it was."""
    path = next((folder / "evaluations").glob("*.npz"))
    with np.load(path) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    deviation = noise * np.random.default_rng(0).standard_normal((8, len(content["sequence_loss_N"]) // 8))
    content["sequence_loss_N"] = content["sequence_loss_N"] + (deviation - deviation.mean()).reshape(-1)
    np.savez(path, **content)


def edit_arrays(path: Path, **changes: np.ndarray) -> None:
    """Change arrays of an .npz file."""
    with np.load(path) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    np.savez(path, **{**content, **changes})


@pytest.fixture
def small(make_suite: MakeSuite) -> Path:
    return make_suite(num_layers=1)


def test_page_files_and_figures(small: Path) -> None:
    paths = write_report(small)
    html = paths.report_html.read_text()
    page, results = Page(html), json.loads(paths.results_json.read_text())

    for run in results["runs"]:
        assert run["label"] in page.text
        quantities = [run["loss"], *run["loss_by_domain"].values(), run["tokens_per_second"]]
        quantities += [run["routing"]["top_k"][name] for name in ("domain_information", "purity", "max_violation")]
        shown = [stat["mean"] for stat in quantities] + [run["recovered"]["value"]]
        assert {str(value) for value in shown if value is not None} <= set(page.values)

    assert "<script>alert(1)" not in html and "MIT <permissive>" not in html
    assert "broken, seed 1: failed at step 220 of 400: loss became nan at step 220" in page.text
    assert "late has no result: not started." in page.text
    assert "not causal" in page.text
    assert "MIT <permissive>" in page.text and "legal_english-corpus" in page.text
    assert "moe-testbed train configs/experiments/tiny.yaml seed=1" in page.text

    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert page.tags.count("img") >= 15
    styles = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert "@import" not in styles and "url(" not in styles
    assert page.tags.count("script") == 2 and "Content-Security-Policy" in html
    for link in re.findall(r'href="#([^"]+)"', html):
        assert f'id="{link}"' in html, link

    names = {path.stem for path in (small / "figures").glob("*.svg")}
    assert names == {path.stem for path in (small / "figures").glob("*.png")}
    assert {"scatter", "loss_evaluation", "loss_train", "loss_by_domain", "layers", "routing_top_k_global"} <= names


def test_a_table_tells_what_was_dropped_where_something_was(small: Path, make_suite: MakeSuite) -> None:
    paths = write_report(small)
    html, results = paths.report_html.read_text(), json.loads(paths.results_json.read_text())
    section = Page(html.partition("<h3>Dropped by domain</h3>")[2].partition("</table>")[0])
    (run,) = [run for run in results["runs"] if run["label"] == "sigmoid_bias"]
    shown = list(run["drop_rate_by_domain"].values())
    shown += [run["routing"][form]["domain_information"] for form in ("top_k", "top_k_kept")]
    assert {str(stat["mean"]) for stat in shown} <= set(section.values)
    assert [value for value in section.values if value in DEMO] == ["sigmoid_bias"]

    without = write_report(make_suite("dropless", DROPLESS, num_layers=1)).report_html.read_text()
    assert "Dropped by domain" not in without


def test_the_same_folder_gives_the_same_page(make_suite: MakeSuite, forget: Callable[[], None]) -> None:
    suite = make_suite(labels=DROPLESS, num_layers=1)
    page = write_report(suite).report_html.read_bytes()
    forget()
    assert write_report(suite).report_html.read_bytes() == page


def test_the_first_line_says_whether_the_reference_wins(make_suite: MakeSuite) -> None:
    def lines(suite: Path) -> list[tuple[str, str]]:
        return [(line.tone, line.text) for line in headlines(read_results(suite))]

    tone, text = lines(make_suite(noise=0.0, num_layers=1, reference=("reference", "reference_hash")))[0]
    assert tone == "caution" and text.startswith("In this one seed reference_hash leads hash, the best other router")
    assert "by 0.040 nats per token" in text and "one seed: the noise of training is not in it" in text
    assert "Of the learned routers top_k_global comes closest, 0.090 nats per token behind." in text

    suite = make_suite("beaten", noise=0.0, num_layers=1)
    tone, text = lines(suite)[0]
    assert tone == "bad"
    assert "The reference does not win: reference_hash is 0.030 nats per token better than reference" in text

    (suite / "permuted_reference-seed1" / "status.json").unlink()
    texts = [text for _, text in lines(suite)]
    assert "Recovered is undefined: no run of the control finished." in texts

    (suite / "reference-seed1" / "status.json").unlink()
    nothing = "No run of the reference finished, so that nothing can be said about the gap to it."
    assert lines(suite)[0] == ("bad", nothing)


def test_a_lead_within_noise_is_called_so(make_suite: MakeSuite) -> None:
    suite = make_suite(reference=("hash",), control="top_k_sequence", noise=0.0, num_layers=1)
    for label in ("reference", "reference_hash"):
        (suite / f"{label}-seed1" / "status.json").unlink()
    edit_sequences(suite / "top_k_global-seed1", noise=1.0)
    assert headlines(read_results(suite))[0].text.startswith("The reference's win is within noise: hash leads")


def test_a_suite_without_any_result_still_has_a_report(make_suite: MakeSuite) -> None:
    suite = make_suite()
    for path in suite.glob("*/status.json"):
        path.unlink()
    page = Page(write_report(suite).report_html.read_text())
    assert "0 of 13 trainings finished" in page.text
    assert "img" not in page.tags


def test_analysed_checkpoints_get_words_of_their_own(make_suite: MakeSuite) -> None:
    suite = make_suite("ckpts", labels=("top_k_global", "top_k_sequence"), reference=(), control=None, num_layers=1)
    content = yaml.safe_load((suite / "suite.yaml").read_text())
    (suite / "suite.yaml").write_text(yaml.safe_dump({**content, "analysis": {"mix": "x", "checkpoints": ["a", "b"]}}))
    for folder in suite.glob("*-seed1"):
        (folder / "status.json").write_text('{"state": "finished", "step": 0, "steps": 0, "reason": null}')
        edit_arrays(next((folder / "evaluations").glob("*.npz")), step=np.array(0))
    html = write_report(suite).report_html.read_text()
    page = Page(html)
    assert html.count("ckpts: how experts are used") == 2  # the title and the heading
    assert "2 runs · 1 seed · 2 of 2 checkpoints analysed · 8 domains" in page.text
    assert "<h3>Commands</h3>" in html
    told = html.partition('id="definitions"')[0]
    for word in ("routers against the reference", "trainings", "0 steps", "Recovered"):
        assert word not in told
    terminal, tex = terminal_table(read_results(suite)), (suite / "tables" / "results.tex").read_text()
    assert "Recovered" not in terminal and "Recovered" not in tex
    assert "ckpts: how experts are used. Loss: nats" in tex


def test_terminal_table(small: Path) -> None:
    results = read_results(small)
    lines = terminal_table(results).splitlines()
    assert lines[0].split()[:3] == ["Run", "Role", "Loss"]
    assert lines[2].startswith("reference ")
    assert all(len(line) <= len(lines[1]) for line in lines[2:15])
    assert "late, seed 1: missing: not started" in lines
    assert lines[-1].startswith("Loss: nats per token of the evaluation split")
