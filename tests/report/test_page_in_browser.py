"""The page in headless Chromium: what a reader clicks, types and sees. Skipped where no Chromium is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvbench.report.build import build_report
from kvbench.report.figures import FIGURES
from tests import covering
from tests.report.chromium import Browser, Page
from tests.report.synthetic import body, write_cell, write_sweep

VISIBLE = "[...document.querySelectorAll('#verdict-table tbody tr')].filter(row => !row.hidden)"
POLICIES = f"{VISIBLE}.map(row => row.dataset.policy)"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two models, with a failed and a noisy cell."""
    folder = write_sweep(tmp_path_factory.mktemp("report"))
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        write_cell(folder, body(policy=policy, budget=budget, model="other-model"))
    write_cell(folder, body(policy="snapkv", status="oom"))
    write_cell(folder, body(policy="oracle", status="noisy"))
    with pytest.MonkeyPatch.context() as patch:
        if not covering.exhaustive:
            two = {kind: FIGURES[kind] for kind in ("quality", "memory")}
            patch.setattr("kvbench.report.figures.draw.FIGURES", two)
        return build_report(folder).page


@pytest.fixture
def page(browser: Browser, report: Path) -> Page:
    return browser.open(report)


def column(page: Page, index: int) -> list[Any]:
    return list(page.run(f"{VISIBLE}.map(row => row.children[{index}].dataset.v ?? '')"))


def choose(page: Page, field: str, value: str) -> None:
    page.run(
        f"(() => {{ const one = document.querySelector('[data-field={field}]'); one.value = '{value}';"
        " one.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


@pytest.mark.cover("all")
def test_nothing_complains_and_nothing_is_asked_from_the_network(page: Page) -> None:
    page.click("#theme")
    page.click("#verdict-table th button")
    assert page.complaints() == []
    assert page.requests() == []


def test_a_click_on_a_head_sorts_and_a_second_one_turns_the_order(page: Page) -> None:
    heads = page.run("[...document.querySelectorAll('#verdict-table thead tr:last-child th')].map(h => h.innerText)")
    index = next(i for i, text in enumerate(heads) if text.startswith("TPOT / full"))
    selector = f"#verdict-table thead tr:last-child th:nth-child({index + 1}) button"
    page.click(selector)
    values = column(page, index)
    numbers = [float(value) for value in values if value]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 5
    assert values[-1] == ""  # a failed cell has no number and stays below
    page.click(selector)
    numbers = [float(value) for value in column(page, index) if value]
    assert numbers == sorted(numbers, reverse=True)
    assert page.run(f"document.querySelector({selector!r}).closest('th').ariaSort") == "descending"


@pytest.mark.cover("all")
def test_filters_hide_rows_together_and_say_how_many_are_left(page: Page) -> None:
    assert len(page.run(POLICIES)) == 18
    choose(page, "policy", "h2o")
    assert set(page.run(POLICIES)) == {"h2o"}
    choose(page, "model", "other-model")
    assert page.run(POLICIES) == ["h2o"]
    assert page.run("document.getElementById('filter-count').textContent") == "1 of 18 rows"
    page.click("#filters button[type=reset]")
    page.run("new Promise(done => setTimeout(done, 20))")
    assert len(page.run(POLICIES)) == 18
    choose(page, "status", "oom")
    assert page.run(POLICIES) == ["snapkv"]


def test_the_keyboard_alone_reaches_filters_and_heads_and_works_them(page: Page) -> None:
    page.press("Tab")
    assert page.run("document.activeElement.textContent") == "Skip to the answer"
    assert page.run("document.activeElement.getBoundingClientRect().x") >= 0
    for _ in range(400):
        page.press("Tab")
        if page.run("document.activeElement.id") == "filter-text":
            break
    page.press(*"random")
    assert set(page.run(POLICIES)) == {"random"}
    for _ in range(60):
        page.press("Tab")
        if page.run("Boolean(document.activeElement.closest('#verdict-table thead'))"):
            break
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.press("Enter")
    assert page.run("document.activeElement.closest('th').ariaSort") == "ascending"
    page.press(" ")
    assert page.run("document.activeElement.closest('th').ariaSort") == "descending"


def test_a_link_to_a_sample_opens_its_answer(page: Page) -> None:
    wanted = page.run(
        "(() => { const link = document.querySelector('#failures td a'), place = link.closest('td');"
        " const head = place.closest('table').tHead.rows[0].cells[place.cellIndex];"
        " link.closest('details').open = true;"
        " return {cell: head.dataset.cell, sample: place.parentNode.dataset.sample}; })()"
    )
    page.click("#failures td a")
    name = page.run("document.getElementById('sb-name').textContent")
    assert wanted["sample"] in name
    assert wanted["cell"] in name


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_document_is_never_wider_than_the_window(browser: Browser, report: Path, width: int) -> None:
    page = browser.open(report, width=width, height=800, phone=width < 500)
    page.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.run("document.documentElement.scrollWidth") <= width
    wide = page.run("[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length")
    assert wide > 3 or width == 1280  # tables scroll in their own boxes


def test_dark_follows_the_system_and_the_button_and_has_contrast(browser: Browser, report: Path) -> None:
    page = browser.open(report)
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    light = page.run(colours)
    page.prefer("dark")
    dark = page.run(colours)
    assert light != dark
    page.click("#theme")
    assert page.run(colours) == light
    page.click("#theme")
    assert page.run(colours) == dark
    page.prefer("light")
    page.load(report)
    assert page.run(colours) == dark  # what was chosen is remembered
    for paper, ink in (light, dark):
        assert contrast(paper, ink) > 7
    ticks = "getComputedStyle(document.querySelector('.chart .tick')).fill"
    assert contrast(page.run(ticks), dark[0]) > 4.5


def test_small_and_coloured_words_can_be_read_in_both_themes(page: Page) -> None:
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        paper = page.run("getComputedStyle(document.body).backgroundColor")
        for selector in (".quiet", "td small", ".v-worse", ".failed", "main a", "td.noisy", "tr .missing"):
            colour = page.run(f"getComputedStyle(document.querySelector({selector!r})).color")
            assert contrast(paper, colour) >= 4.5, (scheme, selector)


def test_print_shows_whole_tables_in_light_and_no_controls(browser: Browser, report: Path) -> None:
    page = browser.open(report, width=1040, dark=True)
    with page.printing():
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.run("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
        assert page.run("getComputedStyle(document.getElementById('filters')).display") == "none"
        over = "[...document.querySelectorAll('table')].filter(t => t.offsetWidth > document.body.clientWidth + 1)"
        assert page.run(f"{over}.filter(t => !t.closest('details')).length") == 0
    assert page.pdf().startswith(b"%PDF")


def test_on_paper_tables_break_between_rows_and_small_figures_share_a_sheet(browser: Browser, report: Path) -> None:
    page = browser.open(report)
    with page.printing():
        style = "(selector, name) => getComputedStyle(document.querySelector(selector))[name]"
        for selector, name, expected in (
            (".scroll", "breakInside", "auto"),
            ("#verdict-table tbody tr:nth-child(2)", "breakBefore", "avoid"),
            ("#verdict-table tbody tr:nth-child(9)", "breakInside", "avoid"),
            ("figure", "breakInside", "avoid"),
        ):
            assert page.run(f"({style})({selector!r}, {name!r})") == expected, selector
    sheets = page.pdf().count(b"/Type /Page\n")
    assert sheets > 5
    page.run(
        "document.head.append(Object.assign(document.createElement('style'), {textContent:"
        " '@media print { .scroll { break-inside: avoid; } }'}))"
    )
    assert page.pdf().count(b"/Type /Page\n") > sheets


def contrast(first: str, second: str) -> float:
    """Return the contrast ratio of two rgb() colours as WCAG 2 defines it."""
    one, two = sorted((luminance(first), luminance(second)), reverse=True)
    return (one + 0.05) / (two + 0.05)


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
