"""axe-core over a page like the leaderboard's: many policies, two groups, large tables, every fold open.

Skipped without Chromium or axe-core (`pip install --no-deps axe-playwright-python`, or its script in KVBENCH_AXE). One
run over all of such a page takes minutes where its folds are open, so it goes section by section; what only a whole
page can have wrong (landmarks, order of headings, ids) is looked for with the folds closed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvbench.report.load import load_results
from kvbench.report.page import render_page
from tests.autopsy.autopsies import add_autopsies
from tests.report.chromium import Browser, Page, find_axe
from tests.report.synthetic import body, write_cell

POLICIES = ("random", "h2o", "elastic", "streaming_llm", *(f"own{number}" for number in range(15)))
OPEN = (
    "(async () => { for (const one of document.querySelectorAll('details')) one.open = true;"
    " for (let tries = 0; tries < 4000 && document.querySelector('.later'); tries++) {"
    " document.querySelector('.later').scrollIntoView(); await new Promise(done => setTimeout(done, 20)); } })()"
)
# All of a table beside another, nothing above it: of most words axe can only then tell what is behind them.
SPREAD = (
    "document.head.append(Object.assign(document.createElement('style'), {textContent:"
    " '.scroll { overflow: visible !important; background: none !important }"
    " tbody th.name, thead .name { position: static !important }'}))"
)
SECTIONS = "['header', ...[...document.querySelectorAll('main > section')].map(one => `#${one.id}`), 'footer']"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("axe")
    for model in ("tiny-llava", "zz-model"):
        write_cell(folder, body(policy="full", budget=None, model=model, num_samples=8))
        for policy in POLICIES:
            for budget in (0.2, 0.5):
                status = {"own1": "oom", "own2": "noisy"}.get(policy, "ok")
                write_cell(folder, body(policy=policy, budget=budget, model=model, num_samples=8, status=status))
    add_autopsies(folder)
    page = folder / "index.html"
    page.write_text(render_page(load_results(folder), []), encoding="utf-8")
    return page


def opened(browser: Browser, file: Path, **options: Any) -> Page:
    script = find_axe()
    if script is None:
        pytest.skip("no axe-core: axe-playwright-python is not installed, and KVBENCH_AXE is not set")
    page = browser.open(file, height=900, **options)
    page.run(f"{script.read_text(encoding='utf-8')}; 0")
    return page


def found(page: Page, where: str = "document", *, rules: tuple[str, ...] = ()) -> list[str]:
    """Return the rule, count and first element of everything that axe finds there."""
    options = {"resultTypes": ["violations"]} | ({"runOnly": rules} if rules else {})
    told = "one => `${one.id}, ${one.nodes.length}: ${one.nodes[0].html.slice(0, 200)}`"
    return list(page.run(f"axe.run({where}, {json.dumps(options)}).then(all => all.violations.map({told}))"))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1440])
def test_axe_finds_nothing_on_a_page_of_many_policies_whatever_is_open(
    browser: Browser, page_file: Path, width: int, dark: bool
) -> None:
    page = opened(browser, page_file, width=width, dark=dark, phone=width < 500)
    assert page.run("document.querySelectorAll('.later').length") > 4, "a page of large tables"
    assert found(page) == []
    page.run(OPEN)
    assert page.run("document.querySelectorAll('.later, main details:not([open])').length") == 0
    for section in page.run(SECTIONS):
        assert found(page, json.dumps({"include": [section]})) == [], section


@pytest.mark.parametrize("dark", [False, True])
def test_no_word_is_too_pale_where_whole_tables_are_looked_at(browser: Browser, page_file: Path, dark: bool) -> None:
    page = opened(browser, page_file, width=9000, dark=dark)
    page.run(OPEN)
    page.run(SPREAD)
    for section in page.run(SECTIONS):
        where = json.dumps({"include": [section], "exclude": ["svg"]})
        assert found(page, where, rules=("color-contrast",)) == [], section


def test_axe_notices_what_is_wrong(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file, width=1440)
    page.run(SPREAD)
    page.run(
        "document.querySelector('.places td').innerHTML ="
        ' \'<button></button><img src="data:,"><span style="color: #999">pale</span>\''
    )
    rules = {one.partition(",")[0] for one in found(page, json.dumps({"include": ["#answer"]}))}
    assert rules == {"button-name", "image-alt", "color-contrast"}
