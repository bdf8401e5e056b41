"""Links to samples in headless Chromium: a conversation opens at its first turn, a missing sample is called so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbench.report.load import load_results
from kvbench.report.page import render_page
from tests.report.chromium import Browser
from tests.report.synthetic import body, write_cell

NAME, COUNT = (f"document.getElementById('sb-{part}').textContent" for part in ("name", "count"))


def write_page(folder: Path, *, turns: bool = False, num_samples: int = 12) -> Path:
    """Write a page of the full cache and one policy; conversations have a score of their own beside their turns."""
    for policy, budget in (("full", None), ("h2o", 0.2)):
        record = body(policy=policy, budget=budget, num_samples=num_samples)
        for sample in record["samples"] if turns else ():
            del sample["text"]
            sample |= {f"turn{turn}_{name}": f"{name} {turn}" for turn in (1, 2) for name in ("text", "full_text")}
        write_cell(folder, record)
    page = folder / "index.html"
    page.write_text(render_page(load_results(folder), []), encoding="utf-8")
    return page


def test_a_link_to_a_conversation_opens_its_first_turn(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write_page(tmp_path, turns=True))
    page.run("document.querySelector('#failures details').open = true")
    sample = page.run("document.querySelector('#failures td a').closest('tr').dataset.sample")
    page.click("#failures td a")
    assert page.run(NAME) == f"{sample}, turn 1: h2o, 20 % tokens kept"
    assert page.run(COUNT) == "24 of 24 samples"
    assert page.complaints() == []


def test_every_link_of_a_page_that_holds_part_of_the_samples_leads_to_its_answer(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.report.samples._MOST_SAMPLES", 8)
    monkeypatch.setattr("kvbench.report.answer._MOST_ROWS", 6)
    page = browser.open(write_page(tmp_path))
    wrong = page.run(
        "[...document.querySelectorAll('main a[href=\"#samples\"]')].filter(link => { link.click();"
        " const row = link.closest('tr');"
        " const { sample, cell } = row ? { sample: row.dataset.sample, cell: 'h2o, 20 % tokens kept' } : link.dataset;"
        f" return {NAME} !== `${{sample}}: ${{cell}}`; }}).length"
    )
    assert wrong == 0
    assert page.run("document.querySelectorAll('#failures td a').length") == 6
    assert page.run(COUNT) == "6 of 12 samples"
    page.run("document.querySelector('a[data-sample]').dataset.sample = 'another'")
    page.run("document.querySelector('a[data-sample]').click()")
    assert page.run(COUNT) == "The linked sample is not on this page."
    assert page.complaints() == []


def test_names_are_sorted_as_numbers_count(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write_page(tmp_path))
    page.run("document.querySelector('#failures details').open = true")
    page.click("#failures thead th button")
    rows = "[...document.querySelectorAll('#failures tbody th')].map(one => one.dataset.v)"
    assert page.run(rows) == [str(number) for number in range(12)], json.dumps(page.run(rows))


def test_a_differing_answer_shows_the_command_that_explains_it(browser: Browser, tmp_path: Path) -> None:
    record = body(policy="h2o", budget=0.2, num_samples=3)
    texts = {"text": "a dot", "full_text": "a ring", "first_divergence_tokens": 1}
    for number, sample in enumerate(record["samples"]):
        sample |= {"id": ["same", "it's here", "scenes/1"][number], **texts}
    record["samples"][0] |= {"text": "a ring", "first_divergence_tokens": None}
    write_cell(tmp_path, record)
    (tmp_path / "index.html").write_text(render_page(load_results(tmp_path), []), encoding="utf-8")
    page, key = browser.open(tmp_path / "index.html"), record["key"][:16]
    command = "document.querySelector('.sb-command')?.textContent ?? ''"
    shown = {}
    for _ in range(3):
        shown[page.run(NAME).partition(":")[0]] = page.run(command)
        page.click("#sb-next")
    assert shown == {
        "same": "", "it's here": f"kvbench why {key} 'it'\\''s here'", "scenes/1": f"kvbench why {key} scenes/1",
    }  # fmt: skip
    assert page.complaints() == []
