"""The autopsy and the sample browser in headless Chromium: what a click or a key changes, and no complaints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvbench.report.load import load_results
from kvbench.report.page import render_page
from kvbench.results.files import pack
from kvbench.results.record import write_autopsy
from tests.autopsy.autopsies import (
    GRID,
    HEADS,
    LAYERS,
    PROMPT,
    STEPS,
    add_autopsies,
    autopsy_body,
    freed_array,
    patterns,
)
from tests.report.chromium import Browser, Page
from tests.report.synthetic import body, write_cell

VEILS = (
    "[...document.querySelectorAll('.ap-panel:nth-child(2) .ap-veil')].map(veil => veil.getAttribute('opacity')).join()"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three policies at two budgets with autopsies of one sample, and a conversation."""
    folder = tmp_path_factory.mktemp("page")
    write_cell(folder, body(policy="full", budget=None, num_samples=4))
    for policy in ("h2o", "random"):
        for budget in (0.1, 0.2):
            write_cell(folder, body(policy=policy, budget=budget, num_samples=4))
    add_autopsies(folder)
    for cell in load_results(folder).records:
        if cell.policy == "random" and cell.cell_folder is not None:
            two = freed_array(99)[[0, 2]]
            seen = {"layers": [0, 2], "freed": patterns(two), "attention": pack(two[:, 0, :PROMPT].astype(np.uint8))}
            write_autopsy(cell.cell_folder / "autopsy.json", autopsy_body(cell.key, **seen))
    talk = body(policy="full", budget=None, num_samples=1, dataset="talk")
    turns = {f"turn{n}_{name}": f"{name} {n}" for n in (1, 2) for name in ("question", "text", "full_text")}
    write_cell(folder, talk | {"samples": [{"id": "t/1", **turns}]})
    page = folder / "index.html"
    page.write_text(render_page(load_results(folder), []), encoding="utf-8")
    return page


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Page]:
    opened = browser.open(path)
    yield opened
    assert opened.complaints() == []
    assert all(address.startswith("data:") for address in opened.requests())


def choose(page: Page, select: str, value: str) -> None:
    page.run(f"(() => {{ const s = document.getElementById('{select}'); s.value = '{value}';"
             " s.dispatchEvent(new Event('change')); })()")  # fmt: skip


def move_to(page: Page, step: int) -> None:
    page.run(f"(() => {{ const s = document.getElementById('ap-step'); s.value = {step};"
             " s.dispatchEvent(new Event('input')); })()")  # fmt: skip


def test_the_slider_and_the_layer_change_what_is_veiled(page: Page) -> None:
    panels = page.run("document.querySelectorAll('.ap-panel').length")
    assert panels == 3, "the full cache's attention and two policies"
    before = page.run(VEILS)
    assert before.count(",") == GRID**2 - 1
    move_to(page, STEPS)
    later = page.run(VEILS)
    assert later != before
    assert page.run("document.getElementById('ap-moment').textContent") == f"after {STEPS} of {STEPS} answer tokens"
    choose(page, "ap-layer", "1")
    one_layer = page.run(VEILS)
    assert one_layer != later
    choose(page, "ap-head", "0")
    assert set(page.run(VEILS).split(",")) <= {"0.000", "0.900"}, "one layer and head hold a patch or do not"
    choose(page, "ap-budget", "10 % tokens kept")
    assert page.run(VEILS) != one_layer


def test_a_layer_that_a_policy_has_not_stored_is_called_so(page: Page) -> None:
    said = "[...document.querySelectorAll('.ap-panel h3 small')].map(small => small.textContent)"
    for layer, expected in (("1", ["", " (layer not stored)"]), ("2", ["", ""]), ("-1", ["", ""])):
        choose(page, "ap-layer", layer)
        assert page.run(said) == expected


def test_nothing_that_left_comes_back_as_the_answer_goes_on(page: Page) -> None:
    sums = []
    for step in range(STEPS + 1):
        move_to(page, step)
        sums.append(sum(map(float, page.run(VEILS).split(","))))
    assert sums == sorted(sums)
    assert sums[0] < sums[-1]


def test_the_play_button_runs_to_the_end(page: Page) -> None:
    page.click("#ap-play")
    assert page.run("document.getElementById('ap-play').textContent") == "Pause"
    page.run(
        "new Promise(done => { const wait = () => document.getElementById('ap-play').textContent === 'Play'"
        " ? done() : setTimeout(wait, 20); wait(); })"
    )
    assert page.run("document.getElementById('ap-step').value") == str(STEPS)


def test_keys_read_single_patches_heads_and_words(page: Page) -> None:
    page.run("document.querySelector('.ap-panel:nth-child(2) .ap-picture').focus()")
    page.press("ArrowDown", "ArrowDown")
    said = page.run("document.getElementById('ap-readout').textContent")
    assert said.startswith("Patch row 2, column 1, held in layers x heads: h2o ")
    page.run("document.querySelector('.ap-panel:nth-child(2) .ap-heat').focus()")
    page.press("ArrowDown")
    said = page.run("document.getElementById('ap-readout').textContent")
    assert said.startswith("Layer 1, head 1, attention held: h2o ")
    assert page.run("document.querySelectorAll('.ap-panel:nth-child(2) .ap-heat-square').length") == LAYERS * HEADS
    page.run("document.querySelector('.ap-panel:nth-child(2) .ap-words').focus()")
    page.run("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))")
    assert '"<s>" (prompt token 1)' in page.run("document.getElementById('ap-readout').textContent")


def test_paper_shows_the_end_and_the_screen_what_was_chosen(page: Page) -> None:
    before = page.run(VEILS)
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("document.getElementById('ap-step').value") == str(STEPS)
    assert page.run(VEILS) != before
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run(VEILS) == before


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_a_phone(browser: Browser, path: Path, dark: bool) -> None:
    phone = browser.open(path, width=360, height=800, phone=True, dark=dark)
    assert phone.run("document.documentElement.scrollWidth") <= 360
    assert phone.complaints() == []


def test_filters_keys_and_links_lead_to_samples(page: Page, browser: Browser, path: Path) -> None:
    choose(page, "sb-policy", "random")
    choose(page, "sb-budget", "10 % tokens kept")
    every = page.run("document.getElementById('sb-sample').options.length")
    choose(page, "sb-which", "collapsed")
    lost = page.run("document.getElementById('sb-sample').options.length")
    assert 0 < lost <= every == 4
    assert page.run("document.getElementById('sb-count').textContent") == f"{lost} of 4 samples"
    choose(page, "sb-which", "all")
    choose(page, "sb-sample", "0")
    page.run("document.getElementById('sb-shown').focus()")
    page.run("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))")
    assert page.run("document.getElementById('sb-name').textContent") == "scenes/test/1: random, 10 % tokens kept"
    link = page.run("location.hash")
    other = browser.open(path)
    other.run(f"location.hash = {link!r}; new Promise(done => setTimeout(done, 100))")
    assert other.run("document.getElementById('sb-name').textContent") == "scenes/test/1: random, 10 % tokens kept"
    assert other.run("document.querySelectorAll('#sb-full mark, #sb-text mark').length") == 2
    assert other.complaints() == []


def test_a_pictured_sample_shows_its_thumbnail_and_a_conversation_its_turns(page: Page) -> None:
    choose(page, "sb-sample", "0")
    assert page.run("document.querySelector('#sb-picture img').src.startsWith('data:image/png')")
    choose(page, "sb-sample", "1")
    assert page.run("document.querySelector('#sb-picture').hidden")
    page.run("(() => { const s = document.getElementById('sb-group');"
             " s.value = [...s.options].find(one => one.text.endsWith('talk')).value;"
             " s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert page.run("document.getElementById('sb-name').textContent").startswith("t/1, turn 1")
    assert page.run("document.getElementById('sb-question').textContent") == "question 1"


def test_the_first_wrong_word_leads_to_what_the_policy_had_let_go(page: Page) -> None:
    choose(page, "sb-policy", "random")
    choose(page, "sb-budget", "10 % tokens kept")
    choose(page, "sb-sample", "0")
    page.click("#sb-text mark")
    said = page.run("document.getElementById('sb-why').textContent")
    assert said.startswith("Of what random had let go by then, the full cache attends most to ")
    token = page.run(
        "(() => { const one = Autopsy.why('tiny-llava on scenes', 'scenes/test/0', 'random', '10 % tokens kept', 0);"
        " return [one.token, one.layer, one.head, one.step]; })()"
    )
    assert token[0] >= 1
    assert token[1] in (1, 3), "of the layers that are stored"
    assert token[3] == 0, "gone with the prompt's cut"
    page.click("#sb-why .sb-pick")
    assert page.run("document.getElementById('ap-budget').value") == "10 % tokens kept"
    assert page.run("document.getElementById('ap-sample').value") == "scenes/test/0"


def test_the_address_holds_the_moment_of_the_answer(page: Page, browser: Browser, path: Path) -> None:
    move_to(page, 5)
    page.run("document.getElementById('ap-step').dispatchEvent(new Event('change'))")
    address = page.run("location.hash")
    assert "step=5" in address
    other = browser.open(path)
    other.run(f"location.hash = {address!r}; new Promise(done => setTimeout(done, 50))")
    assert other.run("document.getElementById('ap-step').value") == "5"
    assert other.run(VEILS) == page.run(VEILS)


def test_a_heat_map_whose_numbers_are_equal_gives_way_to_the_number(browser: Browser, tmp_path: Path) -> None:
    record = body(policy="h2o", budget=0.2, num_samples=1)
    same = np.full((3, LAYERS, HEADS), 310, dtype=np.uint16)
    names = ("attention_permille", "entries", "mean_age_tokens")
    statistics = {"statistics": {name: pack(same) for name in names}}
    write_autopsy(write_cell(tmp_path, record).with_name("autopsy.json"), autopsy_body(record["key"], **statistics))
    file = tmp_path / "index.html"
    file.write_text(render_page(load_results(tmp_path), []), encoding="utf-8")
    page = browser.open(file)
    assert page.run("document.querySelector('.ap-heat').getBoundingClientRect().height") == 0
    assert "attention held: 31 % in every layer and head" in page.run(
        "document.querySelector('.ap-panels').textContent"
    )
    assert page.complaints() == []
