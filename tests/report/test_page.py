from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from kvbench.report.build import build_report
from kvbench.report.load import load_results
from kvbench.report.page import render_page
from kvbench.report.page_samples import marked_pair
from kvbench.report.plots import draw_plots
from kvbench.units import MEASURES
from tests.report.synthetic import body, write_cell, write_sweep

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>&amp;'


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def page_of(folder: Path) -> str:
    results = load_results(folder)
    return render_page(results, draw_plots(results))


def tags_of(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.found


def test_the_page_loads_nothing_and_its_ids_are_unique(sweep_folder: Path) -> None:
    tags = tags_of(page_of(sweep_folder))
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in tags:
        for name in ("src", "href", "xlink:href"):
            assert not attrs.get(name) or str(attrs[name]).startswith("#")


def test_model_output_and_names_never_become_markup(tmp_path: Path) -> None:
    record = body(policy=EVIL, status="ok", model=EVIL, num_samples=4)
    for sample in record["samples"]:
        sample |= {"text": EVIL, "full_text": "x " + EVIL, "reference": EVIL, "id": EVIL}
    record["environment"][EVIL] = EVIL
    write_cell(tmp_path, record)
    failed = body(model=EVIL, status="crash")
    failed["error"]["message"] = EVIL
    write_cell(tmp_path, failed)
    page = page_of(tmp_path)
    tags = tags_of(page)
    assert sum(tag == "script" for tag, _ in tags) == 2
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in tags)
    data = re.search(r'id="sample-data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])[0]["cells"][0]["samples"][0]["text"] == EVIL


def test_every_shown_number_is_explained_and_carries_its_unit(sweep_folder: Path) -> None:
    page = page_of(sweep_folder)
    for name in ("ppl", "objects_recalled_fraction", "ttft_ms", "kv_stored_bytes"):
        assert MEASURES[name].definition.replace("'", "&#x27;") in page
    assert "n = 32" in page
    assert "95 % interval" in page


def test_problems_and_failures_are_on_the_page(tmp_path: Path) -> None:
    write_cell(tmp_path, body(status="oom"))
    torn = write_cell(tmp_path, body(policy="elastic"))
    torn.write_text("{")
    page = page_of(tmp_path)
    assert "tried to allocate &lt;2 GiB&gt;" in page
    assert f"cells/{torn.parent.name}/record.json" in page


def test_an_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    assert "No usable record was found" in page_of(tmp_path)


def test_the_first_differing_word_is_marked_in_both_texts() -> None:
    assert marked_pair("a red cat", "a blue cat") == ("a <mark>red</mark> cat", "a <mark>blue</mark> cat")
    assert marked_pair("a b", "a") == ("a <mark>b</mark>", "a <mark>(ends here)</mark>")
    assert marked_pair("a  b", "a b") == ("a  b", "a b")
    assert marked_pair("<b>", "") == ("<mark>&lt;b&gt;</mark>", " <mark>(ends here)</mark>")


def test_a_report_is_the_same_bytes_when_built_again(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    first = build_report(tmp_path)
    paths = (first.page, first.markdown, *first.plots, *first.tables)
    before = {path: path.read_bytes() for path in paths}
    stale = first.plots[0].with_name("stale.svg")
    stale.write_text("old")
    assert build_report(tmp_path) == first
    assert {path: path.read_bytes() for path in paths} == before
    assert not stale.exists()
    assert str(tmp_path) not in first.page.read_text()


def test_samples_with_missing_fields_are_shown(tmp_path: Path) -> None:
    record = body(num_samples=3)
    record["samples"] = [{"id": "a"}, {"text": None, "full_text": None, "reference": None}, {"rougeL_vs_full": 0.5}]
    write_cell(tmp_path, record)
    page = page_of(tmp_path)
    assert ">None<" not in page
    assert '"None"' not in page
