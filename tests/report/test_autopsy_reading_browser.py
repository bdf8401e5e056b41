"""The autopsy in headless Chromium: merged tokens, samples by budget, and what finger and keys read out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvbench.autopsy.page import living_on, load_autopsy
from kvbench.report.load import load_results
from kvbench.report.page import render_page
from kvbench.results.record import write_autopsy
from tests.autopsy.autopsies import GRID, HEADS, LAYERS, STEPS, WORDS, autopsy_body, merged_array, patterns
from tests.report.chromium import Browser, Page
from tests.report.synthetic import body, write_cell

SAID = "document.getElementById('ap-readout').textContent"
SAMPLES = "[...document.getElementById('ap-sample').options].map(one => one.value)"
HATCHES = "[...document.querySelectorAll('.ap-panel:nth-child(2) [fill^=url]')].map(one => one.getAttribute('opacity'))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies at 10 % with one sample, of which one merges, and one policy at 20 % with another sample too."""
    folder = tmp_path_factory.mktemp("page")
    for policy, budget, ids in (("elastic", 0.1, ("a",)), ("h2o", 0.1, ("a",)), ("h2o", 0.2, ("b", "a"))):
        record = body(policy=policy, budget=budget, num_samples=1)
        merged = {"merged": patterns(merged_array(3))} if policy == "elastic" else {}
        written = autopsy_body(record["key"], ids=ids, **merged)
        write_autopsy(write_cell(folder, record).with_name("autopsy.json"), written)
    (folder / "index.html").write_text(render_page(load_results(folder), []), encoding="utf-8")
    return folder


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    opened = browser.open(folder / "index.html", width=800, height=900)
    set_to(opened, "ap-budget", "10 % tokens kept")
    yield opened
    assert opened.complaints() == []


def set_to(page: Page, name: str, value: object, event: str = "change") -> None:
    page.run(f"(() => {{ const one = document.getElementById('{name}'); one.value = '{value}';"
             f" one.dispatchEvent(new Event('{event}')); }})()")  # fmt: skip


def test_stripes_are_what_lives_on_at_every_moment(page: Page, folder: Path) -> None:
    cell = next(cell for cell in load_results(folder).records if cell.policy == "elastic")
    found = load_autopsy(cell)
    assert found is not None
    image = slice(len(WORDS[0]), len(WORDS[0]) + GRID**2)
    sums = []
    for step in (0, STEPS // 2, STEPS):
        set_to(page, "ap-step", step, "input")
        expected = living_on(found.samples[0], step)[..., image].sum(axis=(0, 1)) / (LAYERS * HEADS) * 0.5
        shown = np.array(page.run(HATCHES), dtype=float)
        assert shown == pytest.approx(expected, abs=6e-4)
        sums.append(shown.sum())
    assert sums[0] > sums[-1] > 0


def test_only_samples_that_were_looked_at_can_be_chosen(page: Page) -> None:
    assert page.run(SAMPLES) == ["a"]
    set_to(page, "ap-budget", "20 % tokens kept")
    assert page.run(SAMPLES) == ["a", "b"]
    set_to(page, "ap-sample", "b")
    assert page.run("document.querySelectorAll('.ap-panel').length") == 2
    set_to(page, "ap-budget", "10 % tokens kept")
    assert page.run("document.getElementById('ap-sample').value") == "a"
    assert page.run("document.querySelectorAll('.ap-panel').length") == 3


def test_a_finger_reads_a_place_and_what_it_read_stays_when_it_is_lifted(browser: Browser, folder: Path) -> None:
    phone = browser.open(folder / "index.html", width=390, height=844, phone=True)
    assert phone.run("document.getElementById('ap-budget').value") == "20 % tokens kept", "where the answer is"
    assert phone.run("document.getElementById('ap-measure').value") == "attention_permille"
    set_to(phone, "ap-budget", "10 % tokens kept")
    for selector, start in ((".ap-panel:nth-child(2) .ap-picture", "Patch row 3, column 3, held in"),
                            (".ap-panel:nth-child(3) .ap-heat", "Layer 2, head"),
                            (".ap-panel:nth-child(2) .ap-word", "elastic: ")):  # fmt: skip
        phone.tap(selector)
        assert phone.run(SAID).startswith(start)
    assert phone.run("document.querySelectorAll('.ap-here').length") == 1
    assert phone.run("[...document.querySelectorAll('.ap-cursor')].every(one => Number(one.getAttribute('x')) < 0)")
    box = "document.getElementById('ap-readout').getBoundingClientRect()"
    assert 0 <= phone.run(f"{box}.top") <= 844 - phone.run(f"{box}.height"), "it is seen where the finger is"
    assert phone.complaints() == []


def test_what_is_read_is_read_again_when_the_moment_changes(page: Page) -> None:
    set_to(page, "ap-measure", "entries")
    page.run("document.querySelector('.ap-panel:nth-child(2) .ap-heat').focus()")
    page.press("ArrowDown")
    first = page.run(SAID)
    set_to(page, "ap-step", STEPS, "input")
    second = page.run(SAID)
    assert first.startswith("Layer 1, head 1, entries held: elastic ")
    assert second.startswith("Layer 1, head 1, entries held: elastic ")
    assert second != first
    page.press("Escape")
    assert page.run(SAID) == ""
