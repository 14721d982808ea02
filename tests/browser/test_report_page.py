"""report.html and comparison.html in a real browser, opened as files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moe_testbed.launcher.report.numbers.results import ranked, read_results

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

Suites = dict[str, Path]
IMAGES_LOADED = """
    const done = arguments[0];
    const images = [...document.images];
    images.forEach((image) => { image.loading = "eager"; });
    Promise.allSettled(images.map((image) => image.decode()))
      .then(() => done(images.map((image) => image.naturalWidth)));
"""
SHOWN_RUNS = """
    return [...document.querySelectorAll(arguments[0])].filter((part) => part.checkVisibility())
      .map((part) => part.dataset.run)
"""


def open_page(browser: Chrome, path: Path, width: int = 1300, fragment: str = "") -> None:
    """Open a page anew in a window of this width; a phone's below 600."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")
    browser.get(path.as_uri() + fragment)


def find(browser: Chrome, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def shown(browser: Chrome, selector: str) -> list[str]:
    """The runs of the visible elements that the selector names."""
    runs: list[str] = browser.execute_script(SHOWN_RUNS, selector)
    return runs


def click(browser: Chrome, selector: str) -> None:
    """Click with the mouse's events, wherever the element is on the page."""
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", find(browser, selector)
    )
    find(browser, selector).click()


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_page_opens_without_errors_and_without_network(browser: Chrome, suites: Suites, name: str) -> None:
    browser.get_log("performance")
    browser.get_log("browser")
    open_page(browser, suites[name])
    widths = browser.execute_async_script(IMAGES_LOADED)
    assert len(widths) >= 4 and min(widths) > 0
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {suites[name].as_uri()}


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("width", [390, 768, 1300])
def test_the_page_is_as_wide_as_the_window(browser: Chrome, suites: Suites, name: str, width: int) -> None:
    open_page(browser, suites[name], width)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width


def test_the_result_table_fits_a_desktop(browser: Chrome, suites: Suites) -> None:
    open_page(browser, suites["report"])
    fits = "const box = document.querySelector('#table .scroll'); return box.scrollWidth <= box.clientWidth"
    assert browser.execute_script(fits)
    heads = browser.find_elements("css selector", "#table thead tr:last-child th")
    few = [head.text for head in heads if head.is_displayed()]
    click(browser, ".switch")
    assert len(few) < sum(head.is_displayed() for head in heads) == len(heads)
    left = "return document.querySelector('#table tbody th').getBoundingClientRect().left"
    before = browser.execute_script(left)
    browser.execute_script("document.querySelector('#table .scroll').scrollLeft = 200")
    assert browser.execute_script(left) >= before - 20  # the first column stays


def test_a_heading_sorts(browser: Chrome, suites: Suites) -> None:
    open_page(browser, suites["report"])
    runs = ranked(read_results(suites["report"].parent))
    head = "#table thead tr:last-child th:nth-child(2)"
    assert shown(browser, "#table tbody tr") == [run["label"] for run in runs]
    with_loss = sorted((run for run in runs if run["loss"]["mean"] is not None), key=lambda run: run["loss"]["mean"])
    without = [run["label"] for run in runs if run["loss"]["mean"] is None]
    for direction, expected in (("ascending", with_loss), ("descending", with_loss[::-1])):
        click(browser, f"{head} .sort")
        assert find(browser, head).get_attribute("aria-sort") == direction
        assert shown(browser, "#table tbody tr") == [run["label"] for run in expected] + without
    click(browser, "#table thead tr:last-child th:first-child .sort")
    assert shown(browser, "#table tbody tr") == sorted((run["label"] for run in runs), key=str.casefold)
    assert find(browser, head).get_attribute("aria-sort") is None


def test_the_filter_holds_for_the_whole_page(browser: Chrome, suites: Suites) -> None:
    open_page(browser, suites["report"])
    everything = shown(browser, "#table tbody tr")
    find(browser, "#filter input[type=search]").send_keys("top_k")
    for part in ("#table tbody tr", "#verdicts li", "#routing figure", "#domains tbody tr"):
        assert {"top_k_global", "top_k_sequence"} <= set(shown(browser, part)), part
        assert not {"reference", "hash", "dense"} & set(shown(browser, part)), part
    assert "runs shown" in find(browser, ".filtered").text
    click(browser, ".filtered button")
    assert shown(browser, "#table tbody tr") == everything
    for role in ("learned", "fixed", "unknown"):
        click(browser, f"#filter input[value={role}]")
    assert set(shown(browser, "#table tbody tr")) == {"reference", "reference_hash", "permuted_reference"} - {
        run["label"]
        for run in read_results(suites["report"].parent)["runs"]
        if run["role"] not in ("reference", "control")
    }
    assert shown(browser, "#verdicts li") == shown(browser, "#table tbody tr")


def test_more_heat_maps_than_fit_are_folded(browser: Chrome, suites: Suites) -> None:
    open_page(browser, suites["report"])
    assert len(shown(browser, "#routing figure")) == 8
    click(browser, "#routing button")
    assert len(shown(browser, "#routing figure")) > 8
    click(browser, "#routing button")
    assert len(shown(browser, "#routing figure")) == 8


@pytest.mark.parametrize("by", ["mouse", "enter", "space"])
def test_a_definition_is_one_step_away(browser: Chrome, suites: Suites, by: str) -> None:
    open_page(browser, suites["report"])
    link = "#table a[href='#definition-domain_information']"
    if by == "mouse":
        click(browser, link)
    else:
        browser.execute_script("arguments[0].focus()", find(browser, link))
        browser.switch_to.active_element.send_keys({"enter": "\ue007", "space": " "}[by])
    dialog = find(browser, "#definition")
    assert dialog.is_displayed() and dialog.text.startswith("Domain information")
    assert "Formula" in dialog.text and "Range" in dialog.text
    browser.switch_to.active_element.send_keys("\ue00c")  # Escape
    assert not dialog.is_displayed()
    if by == "mouse":
        click(browser, link)
        click(browser, "#definition footer a")
        assert not dialog.is_displayed()
        assert find(browser, "#definition-domain_information").get_attribute("open") is not None


def test_two_runs_side_by_side(browser: Chrome, suites: Suites) -> None:
    open_page(browser, suites["report"], fragment="#compare=top_k_global&with=random")
    runs = {run["label"]: run for run in read_results(suites["report"].parent)["runs"]}
    assert find(browser, "#compare .headline").text.startswith("top_k_global is better: its loss is 0.")

    from selenium.webdriver.support.select import Select

    selects = [Select(element) for element in browser.find_elements("css selector", "#compare select")]
    assert [select.first_selected_option.text for select in selects] == ["top_k_global", "random"]
    selects[0].select_by_visible_text("collapsed")
    text = find(browser, "#compare .headline").text
    difference = runs["collapsed"]["loss"]["mean"] - runs["random"]["loss"]["mean"]
    assert text.startswith("collapsed is better") and f"{abs(difference):.3f} nats per token" in text
    row = find(browser, "#compare tbody tr").text.split()
    assert row[0] == "Loss" and float(row[-1].replace("−", "-")) == pytest.approx(difference, abs=6e-4)
    domains = browser.find_elements("css selector", "#compare .pair-tables > :nth-child(2) tbody tr")
    assert len(domains) == 8
    for line, domain in zip(domains, runs["random"]["loss_by_domain"], strict=True):
        losses = [runs[label]["loss_by_domain"][domain]["mean"] for label in ("collapsed", "random")]
        shown_numbers = [float(text.replace("−", "-")) for text in line.text.split()[1:]]
        assert shown_numbers == pytest.approx([*losses, losses[0] - losses[1]], abs=6e-4)
    titles = [title.text for title in browser.find_elements("css selector", "#compare figure h3")]
    assert titles == ["collapsed", "random"]
    assert browser.execute_script("return location.hash") == "#compare=collapsed&with=random"
    selects[1].select_by_visible_text("collapsed")
    assert find(browser, "#compare .headline").text == "Choose two different runs."


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_page_prints(browser: Chrome, suites: Suites, name: str) -> None:
    open_page(browser, suites[name])
    assert base64.b64decode(browser.print_page()).startswith(b"%PDF-")
