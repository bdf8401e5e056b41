"""The first screen and the living figures in headless Chromium: hover, toggles, the address, the word diff, paper."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.report.load import load_results
from kvbench.report.page import render_page
from kvbench.results.frontier import Frontier, Look, Search
from tests.report.chromium import Browser, Page
from tests.report.synthetic import body, write_cell, write_sweep

ROWS = "[...document.querySelectorAll('.board-group:not([hidden]) .places tbody tr')]"
NAMES = f"{ROWS}.map(row => row.dataset.policy)"
TIP = "document.querySelector('[data-figure=pareto] .chart-tip').textContent"
BUDGET = "20 % tokens kept"
HASH = "decodeURIComponent(location.hash)"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a sweep, and of a second model with two policies."""
    folder = write_sweep(tmp_path_factory.mktemp("board"))
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        write_cell(folder, body(policy=policy, budget=budget, model="zz-model"))
    page = folder / "index.html"
    page.write_text(render_page(load_results(folder), []), encoding="utf-8")
    return page


@pytest.fixture
def page(browser: Browser, page_file: Path) -> Page:
    return browser.open(page_file)


def choose(page: Page, name: str, value: str) -> None:
    page.run(
        f"(() => {{ const one = document.getElementById('pick-{name}'); one.value = {json.dumps(value)};"
        " one.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def point_at(page: Page, selector: str) -> None:
    page.run(
        f"(() => {{ const mark = document.querySelector({json.dumps(selector)});"
        " mark.scrollIntoView({block: 'center'}); const b = mark.getBoundingClientRect();"
        " mark.closest('svg').dispatchEvent(new PointerEvent('pointermove',"
        " {clientX: b.x + b.width / 2, clientY: b.y + b.height / 2, bubbles: true})); })()"
    )


@pytest.mark.long
@pytest.mark.cover("all")
def test_a_leaderboard_and_a_pareto_front_come_first_and_follow_what_is_chosen(page: Page) -> None:
    assert page.run(NAMES)[0] == "full"
    ranks = page.run(f"{ROWS}.map(row => row.cells[0].textContent)")
    assert ranks == ["", "1", "2", "3", "4"]
    assert "Leaderboard at 20 % tokens kept" in page.run("document.querySelector('.places caption').textContent")
    assert page.run("[...document.querySelectorAll('.headline:not([hidden]) p')].length") >= 2
    assert page.run("document.querySelectorAll('[data-figure=pareto] .mark').length") > 8
    assert "On the Pareto front: " in page.run("document.querySelector('[data-figure=pareto] svg').ariaLabel")
    choose(page, "budget", "50 % tokens kept")
    assert "Leaderboard at 50 % tokens kept" in page.run("document.querySelector('.places caption').textContent")
    assert "budget=50 % tokens kept" in page.run(HASH)
    point_at(page, "[data-figure=pareto] .mark")
    assert "n = " in page.run(TIP)
    page.click(".places .pick")
    assert page.run(f"{ROWS}[0].className") == "off"
    assert page.complaints() == []
    assert page.requests() == []


def test_pointing_at_a_mark_tells_its_interval_and_count_and_keys_walk_over_marks(page: Page) -> None:
    point_at(page, "[data-figure=pareto] g[data-p='2'] .mark")
    told = page.run(TIP)
    assert "n = 32" in told
    assert " [" in told
    assert page.run("document.querySelectorAll('[data-figure=pareto] g.lit').length") == 1
    page.run("document.querySelector('[data-figure=pareto] svg').focus()")
    page.press("ArrowDown")
    first = page.run(TIP)
    page.press("ArrowDown")
    assert page.run(TIP) not in ("", first)
    page.press("Enter")
    assert page.run("document.getElementById('cell-box').open")
    assert "95 % interval" in page.run("document.getElementById('cell-box').textContent")
    page.press("Escape")
    assert not page.run("document.getElementById('cell-box').open")


def test_a_hidden_policy_is_gone_from_figures_tables_and_samples(page: Page) -> None:
    marks = "document.querySelectorAll('[data-figure=quality] .mark').length"
    before = page.run(marks)
    page.run("[...document.querySelectorAll('#chips button')].find(one => one.textContent === 'random').click()")
    assert page.run(marks) == before - 3
    assert "off=random" in page.run(HASH)
    hidden = "[...document.querySelectorAll('#verdict-table tbody tr')].filter(row => row.offsetHeight === 0)"
    assert set(page.run(f"{hidden}.map(row => row.dataset.policy)")) == {"random"}
    heads = "[...document.querySelectorAll('#policies thead th')].filter(head => head.textContent === 'random')"
    assert page.run(f"{heads}.length") > 0
    assert page.run(f"{heads}.every(head => head.offsetWidth === 0)")
    assert "random" not in page.run("document.getElementById('sb-others').textContent")
    page.run("document.querySelector('#chips .all').click()")
    assert page.run(marks) == before


def test_the_address_says_what_is_chosen_and_opens_it_again(browser: Browser, page: Page, page_file: Path) -> None:
    choose(page, "group", "1")
    choose(page, "group", "0")
    choose(page, "measure", "ppl")
    choose(page, "budget", "10 % tokens kept")
    page.run("[...document.querySelectorAll('#chips button')].find(one => one.textContent === 'h2o').click()")
    page.run("document.querySelector('#verdict-table thead tr:last-child button').click()")
    page.run(
        "(() => { const text = document.getElementById('filter-text'); text.value = 'elastic';"
        " text.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    page.run("document.getElementById('sb-next').click()")
    address, name = page.run("location.hash"), page.run("document.getElementById('sb-name').textContent")
    other = browser.open(page_file)
    other.run(f"location.hash = {json.dumps(address)}")
    other.run("new Promise(done => setTimeout(done, 50))")
    again = browser.open(page_file)
    again.run(f"location.replace(location.href.split('#')[0] + {json.dumps(address)})")
    again.run("new Promise(done => setTimeout(done, 50))")
    for one in (other, again):
        assert one.run("document.getElementById('pick-measure').value") == "ppl"
        assert one.run("document.getElementById('pick-budget').value") == "10 % tokens kept"
        assert one.run("document.getElementById('sb-name').textContent") == name
        assert one.run(f"{ROWS}.filter(row => row.className === 'off').map(row => row.dataset.policy)") == ["h2o"]
        assert one.run("document.querySelector('#verdict-table thead tr:last-child th').ariaSort") == "ascending"


def test_a_link_of_an_older_report_still_opens_its_sample(browser: Browser, page_file: Path, page: Page) -> None:
    page.run("document.getElementById('sb-next').click()")
    name = page.run("document.getElementById('sb-name').textContent")
    key, _, sample = page.run("decodeURIComponent(location.hash.split('sample=')[1])").partition("/")
    old = page_file.with_name("linked.html")
    old.write_text(page_file.read_text(encoding="utf-8"), encoding="utf-8")
    other = browser.open(old)
    other.run(f"location.hash = '#sample={key}/' + encodeURIComponent({json.dumps(sample)})")
    other.run("new Promise(done => setTimeout(done, 50))")
    assert other.run("document.getElementById('sb-name').textContent") == name


def test_a_link_to_another_group_s_answer_chooses_that_group(page: Page) -> None:
    title = page.run("document.querySelectorAll('.firsts a')[1].textContent")
    assert "zz-model" in title
    page.run("document.querySelectorAll('.firsts a')[1].click(); new Promise(done => setTimeout(done, 50))")
    assert page.run("document.getElementById('pick-group').selectedOptions[0].textContent") == title
    assert page.run("document.querySelector('.board-group:not([hidden])').dataset.group") == "1"
    assert page.complaints() == []


def test_a_figure_is_saved_as_a_drawing_of_its_own_and_as_numbers(page: Page) -> None:
    page.run(
        "window.saved = []; URL.createObjectURL = blob => { window.saved.push(blob); return 'data:,'; };"
        " HTMLAnchorElement.prototype.click = () => {};"
        " [...document.querySelectorAll('.board-group:not([hidden]) .chart-tools button')].forEach(one => one.click());"
        " new Promise(done => { const wait = () => window.saved.length > 2 ? done() : setTimeout(wait, 20); wait(); })"
    )
    kinds = page.run("window.saved.map(blob => blob.type)")
    assert sorted(kinds) == ["image/png", "image/svg+xml", "text/csv"]
    drawing, numbers = (
        page.run(f"window.saved.find(blob => blob.type === '{kind}').text()") for kind in ("image/svg+xml", "text/csv")
    )
    root = ElementTree.fromstring(drawing)
    assert not [one for one in root.iter() if "class" in one.attrib or "var(" in one.attrib.get("style", "")]
    assert "h2o" in {"".join(one.itertext()).split()[0] for one in root.iter() if one.tag.endswith("text")}
    head, *rows = numbers.strip().split("\n")
    assert head.startswith("policy,budget,kv_stored_bytes,kv_stored_bytes_low,")
    assert len(rows) == 13
    assert page.complaints() == []


def test_the_count_of_failures_leads_to_the_first_of_them(page: Page) -> None:
    told = page.run(
        "(() => { const one = document.querySelector('.places .sb-pick'); one.click(); return one.textContent; })()"
    )
    count, name = (page.run(f"document.getElementById('sb-{part}').textContent") for part in ("count", "name"))
    assert count.split()[0] == told.split()[0], "as many as the leaderboard says"
    assert page.run("document.getElementById('sb-which').value") == "collapsed"
    assert BUDGET in name


def test_answers_stand_side_by_side_with_what_they_leave_out_and_add(page: Page) -> None:
    panes = page.run("document.querySelectorAll('#sb-others .pane').length")
    names = page.run("document.getElementById('sb-others').textContent")
    assert 1 <= panes <= 3
    assert "streaming_llm" in names
    assert page.run("document.querySelectorAll('#samples del').length") > 1
    plain = page.run(
        "[...document.querySelectorAll('#sb-others .pane p')].map(pane => { const copy = pane.cloneNode(true);"
        " copy.querySelectorAll('del').forEach(one => one.remove()); return copy.textContent; })"
    )
    texts = page.run("embedded('sample-data')[0].cells.map(cell => cell.samples[0].text).filter(Boolean)")
    assert set(plain) <= set(texts), "without what was left out a pane is the answer itself"


def test_marks_of_samples_open_answers_and_a_drag_keeps_samples(page: Page) -> None:
    page.run("document.querySelector('[data-figure=lost] svg').scrollIntoView({block: 'center'})")
    frame = page.run(
        "(() => { const b = document.querySelector('[data-figure=lost] svg').getBoundingClientRect();"
        " return [b.x, b.y, b.width, b.height]; })()"
    )
    page.run(
        "(() => { const svg = document.querySelector('[data-figure=lost] svg');"
        f" const [x, y, w, h] = {json.dumps(frame)};"
        " for (const [kind, share] of [['pointerdown', .3], ['pointermove', .5], ['pointerup', .5]])"
        " svg.dispatchEvent(new PointerEvent(kind, {clientX: x + share * w, clientY: y + h / 2, bubbles: true})); })()"
    )
    count = page.run("document.getElementById('sb-count').textContent")
    assert 1 <= int(count.split()[0]) < 32
    assert "brush=" in page.run(HASH)
    page.run("document.getElementById('sb-kept').click()")
    assert page.run("document.getElementById('sb-count').textContent").startswith("32 of 32")


def test_paper_unfolds_what_is_folded_and_repeats_heads(page: Page) -> None:
    folded = "[...document.querySelectorAll('main details')].filter(one => !one.open).length"
    before = page.run(folded)
    assert before > 3
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run(folded) == 0
    with page.printing():
        heads = "[...document.querySelectorAll('main thead')]"
        name = page.run("document.querySelector('#verdict-table thead tr').textContent")
        assert name == page.run("document.querySelector('#verdict-table caption').textContent")
        assert page.run(f"{heads}.every(one => getComputedStyle(one).display === 'table-header-group')")
        buttons = "[...document.querySelectorAll('main thead button')].map(one => getComputedStyle(one).display)"
        assert set(page.run(buttons)) == {"contents"}, "Chromium leaves boxes out of a head that it repeats"
        assert page.run("getComputedStyle(document.getElementById('chips')).display") == "none"
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run("document.querySelector('.printed-name')") is None
    assert page.run(folded) == before


def test_a_table_that_is_wider_than_paper_stands_on_it_in_parts(browser: Browser, page_file: Path) -> None:
    page = browser.open(page_file, width=1035)  # A4 across without its margins
    page.run(
        "for (const row of [...document.getElementById('verdict-table').rows].slice(1)) for (let at = 0; at < 40; at++)"
        " row.append(tag(row.parentNode.tagName === 'THEAD' ? 'th' : 'td', '',"
        " row.parentNode.tagName === 'THEAD' ? `column${at}` : '12345.678 [9.8]'))"
    )
    page.run("dispatchEvent(new Event('beforeprint'))")
    parts = "[...document.querySelectorAll('#verdicts .printed-part')]"
    names = page.run(f"{parts}.map(one => [...[...one.tHead.rows].at(-1).cells].map(cell => cell.textContent))")
    assert len(names) > 2
    with page.printing():
        assert max(page.run(f"{parts}.map(one => one.offsetWidth)")) <= 1035
        assert page.run("document.getElementById('verdict-table').offsetWidth") == 0
    assert {tuple(one[:2]) for one in names} == {tuple(names[0][:2])}, "every part names its rows"
    told = [name for one in names for name in one[2:]]
    assert len(told) == len(set(told))
    assert told[-40:] == [f"column{at}" for at in range(40)]
    titles = page.run(f"{parts}.map(one => one.tHead.rows[0].textContent)")
    assert titles[1] == f"Verdicts against the full cache (part 2 of {len(names)})"
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run(f"{parts}.length") == 0
    assert page.run("document.getElementById('verdict-table').offsetWidth") > 0


@pytest.mark.parametrize("width", [360, 768])
def test_a_phone_sees_names_and_numbers_without_scrolling(browser: Browser, tmp_path: Path, width: int) -> None:
    file = tmp_path / "index.html"
    file.write_text(render_page(load_results(write_sweep(tmp_path)), []), encoding="utf-8")
    page = browser.open(file, width=width, height=900, phone=True)
    assert page.run("document.documentElement.scrollWidth") <= width
    for number in (
        ".places tbody tr:nth-child(2) td:nth-child(3) small",
        "#verdict-table tr:nth-child(3) td[class^=v-]",
    ):
        assert page.run(f"document.querySelector('{number}').getBoundingClientRect().right") < width, number


def test_capacity_and_safe_budgets_are_drawn_told_hidden_and_saved(browser: Browser, tmp_path: Path) -> None:
    keys, sizes = {}, {("full", None): 12, ("h2o", 0.2): 40, ("h2o", 0.5): 20, ("random", 0.2): 36, ("random", 0.5): 18}
    for (policy, budget), most in sizes.items():
        record = body(policy=policy, budget=budget)
        record["cell"]["task"] = {"speed": {"batch_size": 4}}
        numbers = {"throughput_tokens_per_s": 50.0, "capacity_prompts": float(most)}
        for name, value in (numbers | {"capacity_throughput_tokens_per_s": 30.0 * most}).items():
            found = {"value": value, "low": 0.9 * value, "high": 1.1 * value, "n": 6}
            record["measurements"][name] = {"name": name} | found
        keys[policy, budget] = record["key"]
        write_cell(tmp_path, record)
    seen = Look(budget=0.5, outcome="safe", key=keys["h2o", 0.5], value=0.01, low=-0.01, high=0.03, num_samples=32)
    looks = seen, replace(seen, budget=0.2, outcome="worse", key=keys["h2o", 0.2], value=0.2, low=0.1, high=0.3)
    search = Search(
        model="tiny-llava", dataset="scenes", policy="h2o", positions="original", policy_settings={},
        full_key=keys["full", None], status="found", smallest_safe=0.5, budget_low=0.3, looks=looks,
    )  # fmt: skip
    above = replace(search, policy="random", status="no budget shown safe", smallest_safe=None, budget_low=None,
                    looks=(replace(looks[1], budget=0.5, key=keys["random", 0.5]),))  # fmt: skip
    frontier = Frontier(
        name="f", measure="ppl", margin=0.05, ladder=(0.1, 0.2, 0.3, 0.5), budget_setting="fraction", confidence=0.98,
        num_cells=3, num_cells_of_grid=8, searches=(search, above),
    )  # fmt: skip
    file = tmp_path / "index.html"
    file.write_text(render_page(replace(load_results(tmp_path), frontiers=(frontier,)), []), encoding="utf-8")
    page = browser.open(file)
    tips = {}
    for name in ("rates", "fit", "safe"):
        assert not page.run(f"document.querySelector('[data-figure={name}]').hidden"), name
        page.run(f"document.querySelector('[data-figure={name}] svg').focus()")
        found = []
        for _ in range(9):
            page.press("ArrowDown")
            found.append(page.run(f"document.querySelector('[data-figure={name}] .chart-tip').textContent"))
        tips[name] = found
    for name, start, *parts in (
        ("rates", "h2o, 20 % tokens kept: ", "with 40 together [", "n = 6"),
        ("fit", "h2o, 20 % tokens kept: ", "[36, 44], n = 6"),
        ("safe", "h2o: smallest safe budget 50 %, the true one from 30 % on; there +0.010"),
        ("safe", "h2o at 20 %: worse, +0.200"),
    ):
        assert any(tip.startswith(start) and all(part in tip for part in parts) for tip in tips[name]), tips[name]
    names = "[...document.querySelectorAll('[data-figure=safe] .name')].map(one => one.textContent)"
    assert page.run(names) == ["50 %", "above 50 %"]
    table = page.run(
        "new Promise(done => { URL.createObjectURL = blob => { blob.text().then(done); return 'data:,'; };"
        " HTMLAnchorElement.prototype.click = () => {};"
        " document.querySelectorAll('[data-figure=safe] .chart-tools button')[2].click(); })"
    )
    assert table.splitlines()[1].startswith("h2o,50,30,found,50,safe,")
    page.run("[...document.querySelectorAll('#chips button')].find(one => one.textContent === 'random').click()")
    assert "off=random" in page.run(HASH)
    assert page.run(names) == ["50 %"]
    assert page.complaints() == []


def test_a_large_table_is_made_as_a_reader_comes_near_and_works_like_any_other(page: Page) -> None:
    places = "document.querySelectorAll('.later').length"
    assert page.run(places) > 0
    page.run(
        "(async () => { for (const one of document.querySelectorAll('main details')) one.open = true;"
        " for (let tries = 0; tries < 200 && document.querySelector('.later'); tries++) {"
        " document.querySelector('.later').scrollIntoView(); await new Promise(done => setTimeout(done, 20)); } })()"
    )
    assert page.run(places) == 0
    table = "[...document.querySelectorAll('#numbers table')].find(one => one.caption.textContent.startsWith('Every'))"
    assert page.run(f"{table}.tBodies[0].rows.length") == 13
    ppl = f"[...{table}.tHead.rows[0].cells].findIndex(one => one.textContent.startsWith('PPL'))"
    page.run(f"{table}.tHead.rows[0].cells[{ppl}].querySelector('button').click()")
    shown = page.run(f"[...{table}.tBodies[0].rows].map(row => Number(row.cells[{ppl}].firstChild.textContent))")
    assert shown == sorted(shown)
    page.run("[...document.querySelectorAll('#chips button')].find(one => one.textContent === 'random').click()")
    hidden = f"[...{table}.tBodies[0].rows].filter(row => row.offsetHeight === 0).map(row => row.cells[0].dataset.v)"
    assert set(page.run(hidden)) == {"random"}
    assert page.complaints() == []


def test_a_tall_table_scrolls_below_its_heads_on_screen_and_is_whole_on_paper(
    browser: Browser, page_file: Path, tmp_path: Path
) -> None:
    assert "scroll tall" not in page_file.read_text(encoding="utf-8"), "fourteen rows need no box"
    for policy in ("full", *(f"own{number}" for number in range(40))):
        write_cell(tmp_path, body(policy=policy, budget=None if policy == "full" else 0.2, num_samples=4))
    file = tmp_path / "index.html"
    file.write_text(render_page(load_results(tmp_path), []), encoding="utf-8")
    page = browser.open(file)
    box, head = ".tall:has(#verdict-table)", "#verdict-table thead tr:last-child th"
    page.run(f"document.querySelector('{box}').scrollIntoView(); document.querySelector('{box}').scrollTop = 900")
    top, height, inside = page.run(
        f"(() => {{ const b = document.querySelector('{box}').getBoundingClientRect();"
        f" return [document.querySelector('{head}').getBoundingClientRect().y - b.y, b.height, innerHeight]; }})()"
    )
    assert 0 <= top < 60, "the heads stay"
    assert height < inside
    with page.printing():
        assert page.run(f"getComputedStyle(document.querySelector('{box}')).maxHeight") == "none"
        assert page.run("getComputedStyle(document.querySelector('#verdict-table thead')).position") == "static"
