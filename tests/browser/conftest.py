"""Headless Chromium, and reports of constructed suites for it to open."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from moe_testbed.launcher.report.write import print_comparison, write_report
from tests.report.answers import alike_once, answers
from tests.report.conftest import DEMO, write_suite

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# Their report is one that tests/report draws, too.
__all__ = ["alike_once", "answers"]

OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """A browser that records what it prints to its console and what it asks the network for."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs the programs chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install 'moe-testbed[test]')")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages `report` and `comparison`, of two small suites."""
    folder = tmp_path_factory.mktemp("suites")
    labels = ("reference", "permuted_reference", "top_k_global", "top_k_sequence", "hash", "collapsed")
    one = write_suite(folder / "one", DEMO, num_layers=1)
    other = write_suite(folder / "other", {label: DEMO[label] for label in labels}, num_layers=1)
    print_comparison([one, other], folder / "comparison")
    return {"report": write_report(one).report_html, "comparison": folder / "comparison" / "comparison.html"}
