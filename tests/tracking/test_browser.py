"""The pages of a real MLflow server in a real browser: what a user sees of a suite."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.tracking.mirror import SuiteMirror
from moe_testbed.launcher.tracking.state import read_ledger
from tests.tracking.folders import make_suite
from tests.tracking.server import TrackingServer

webdriver = pytest.importorskip("selenium.webdriver")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1500,1400",
)  # fmt: skip
PAGE_SECONDS = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver on the PATH"),
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Chromium without a window, with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def shows(browser: Any, url: str, *texts: str) -> None:
    """Opens a page and waits for all of the texts in it."""
    browser.get(url)
    deadline = time.monotonic() + PAGE_SECONDS
    while missing := [text for text in texts if text not in browser.find_element("tag name", "body").text]:
        assert time.monotonic() < deadline, f"{url} does not show {missing}"
        time.sleep(0.2)


def test_a_suite_with_its_runs_and_what_the_machine_did(
    tmp_path: Path, browser: Any, served: Any, server: TrackingServer
) -> None:
    suite = make_suite(tmp_path / "demo")
    assert SuiteMirror(suite, "pages").finish()
    experiment = f"{server.uri}/#/experiments/{served.get_experiment_by_name('pages').experiment_id}"
    parent, child = (
        f"{experiment}/runs/{read_ledger(folder, server.uri).run_id}" for folder in (suite, suite / "top_k-seed1")
    )

    shows(browser, f"{experiment}/runs", "demo", "4 matching runs")
    browser.save_screenshot(str(tmp_path / "runs.png"))
    shows(browser, parent, "Child runs", "top_k-seed1", "top_k-seed2", "top_k_hash-seed1", "lead_over_control")
    browser.save_screenshot(str(tmp_path / "parent.png"))
    shows(browser, f"{parent}/artifacts/report.html", "report.html", "results.json", "figures", "tables")
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    assert "Report of the suite." in browser.find_element("tag name", "body").text
    browser.switch_to.default_content()
    browser.save_screenshot(str(tmp_path / "report.png"))

    shows(browser, child, "Parent run", "demo", "two", "learned", "sequence", "result/recovered", "routing.router.name")
    browser.save_screenshot(str(tmp_path / "child.png"))
    shows(browser, f"{child}/system-metrics", "cpu_utilization_percentage", "process_memory_megabytes")
    browser.save_screenshot(str(tmp_path / "system.png"))
