from __future__ import annotations

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvbench.measures import MEASURES
from kvbench.report.build import build_report
from kvbench.report.figures import FIGURES
from kvbench.report.figures.draw import draw_plots
from kvbench.report.load import load_results
from kvbench.report.page import render_page
from kvbench.report.standing import judge
from kvbench.report.tables import TABLES
from tests.autopsy.autopsies import add_autopsies
from tests.report.figures.figure_data import plots_of
from tests.report.synthetic import body, embedded, without_facts, write_cell

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>&amp;'


@pytest.fixture
def _two_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no more of them."""
    monkeypatch.setattr("kvbench.report.figures.draw.FIGURES", {kind: FIGURES[kind] for kind in ("quality", "memory")})


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def page_of(folder: Path) -> str:
    """The page without its figures, which take longer to draw than all the rest."""
    return render_page(load_results(folder), [])


@pytest.fixture(scope="module")
def sweep_page(sweep_folder: Path) -> str:
    """The page of the default sweep, figures and all."""
    return render_page(load_results(sweep_folder), plots_of(sweep_folder))


def section(page: str, name: str) -> str:
    start = page.index(f'<section id="{name}">')
    return page[start : page.index("</section>", start)]


TABLE_LINKS = {f"../{name}.{kind}" for name in TABLES for kind in ("csv", "parquet")}


def tags_of(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.found


def test_the_page_loads_nothing_and_its_ids_are_unique(sweep_page: str) -> None:
    tags = tags_of(sweep_page)
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in tags:
        for name in ("src", "href", "xlink:href"):
            assert not attrs.get(name) or str(attrs[name]).startswith("#") or str(attrs[name]) in TABLE_LINKS
    assert {attrs.get("href") for tag, attrs in tags if tag == "a"} >= TABLE_LINKS


@pytest.mark.usefixtures("_two_figures")
def test_model_output_and_names_never_become_markup(tmp_path: Path) -> None:
    record = body(policy=EVIL, status="ok", model=EVIL, num_samples=4)
    for sample in record["samples"]:
        sample |= {"text": EVIL, "full_text": "x " + EVIL, "reference": EVIL, "id": EVIL}
    record["environment"][EVIL] = EVIL
    write_cell(tmp_path, record)
    full = body(policy="full", budget=None, model=EVIL, num_samples=4)
    for sample in full["samples"]:
        sample |= {"id": EVIL}
    write_cell(tmp_path, full)
    failed = body(model=EVIL, status="crash")
    failed["error"]["message"] = EVIL
    write_cell(tmp_path, failed)
    results = load_results(tmp_path)
    page = render_page(results, draw_plots(results))
    tags = tags_of(page)
    scripts = [attrs for tag, attrs in tags if tag == "script"]
    assert [attrs.get("type") for attrs in scripts].count(None) == 1
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in tags)
    cells = embedded(page, "sample-data")[0]["cells"]
    assert EVIL in {answer.get("text") for cell in cells for answer in cell["samples"]}


def test_the_policy_of_content_allows_this_script_and_nothing_from_elsewhere(sweep_page: str) -> None:
    (policy,) = (str(attrs["content"]) for tag, attrs in tags_of(sweep_page) if attrs.get("http-equiv"))
    script = sweep_page[sweep_page.rindex("<script>") + len("<script>") : sweep_page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_headings_are_in_order_and_every_table_has_a_caption(sweep_page: str) -> None:
    levels = [int(tag[1]) for tag, _ in tags_of(sweep_page) if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    tables = re.findall(r"<table\b.*?</table>", sweep_page, re.DOTALL)
    assert len(tables) > 5
    for table in tables:
        assert "<caption>" in table or 'id="sb-scores"' in table  # filled by the script, named by its box


def test_of_several_groups_every_region_has_a_name_of_its_own(tmp_path: Path) -> None:
    for model in ("tiny-llava", "zz-model"):
        for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
            write_cell(tmp_path, body(policy=policy, budget=budget, model=model))
    add_autopsies(tmp_path)
    names = re.findall(r'role=region aria-label="([^"]*)"', render_page(load_results(tmp_path), []))
    assert len(names) > 15
    assert len(set(names)) == len(names)


def test_every_link_inside_the_page_leads_somewhere(sweep_page: str) -> None:
    tags = tags_of(sweep_page)
    ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
    links = {str(attrs["href"]) for tag, attrs in tags if tag == "a" and attrs.get("href")}
    targets = {link[1:] for link in links - TABLE_LINKS}
    assert {"answer", "figures", "samples", "verdicts", "numbers", "measures"} <= targets <= ids


def test_what_a_record_lacks_is_called_not_measured(tmp_path: Path) -> None:
    counts = []
    for name, lacking in (("whole", ()), ("less", ("peak_vision_bytes", "peak_decode_bytes"))):
        record = body()
        for one in lacking:
            del record["measurements"][one]
        write_cell(tmp_path / name, record)
        memory = section(page_of(tmp_path / name), "memory")
        counts.append(memory.count(">not measured<"))
    assert counts[1] == counts[0] + 2


def test_the_times_of_a_noisy_cell_are_grey_and_its_quality_is_ranked(tmp_path: Path) -> None:
    for policy, status in (("elastic", "noisy"), ("h2o", "ok"), ("random", "ok")):
        write_cell(tmp_path, without_facts(body(policy=policy, status=status)))
    write_cell(tmp_path, without_facts(body(policy="full", budget=None)))
    page = page_of(tmp_path)
    answer, verdicts = section(page, "answer"), section(page, "verdicts")
    assert "take <code>elastic</code>" in answer
    assert "the cell is noisy" in answer, "beside its time"
    row = next(line for line in verdicts.split("<tr") if "noisy times" in line)
    assert row.count('class="noisy"') == 4, "TPOT, TTFT and their ratios"


def test_rows_can_be_filtered_by_everything_that_differs(sweep_page: str) -> None:
    tags = tags_of(section(sweep_page, "verdicts"))
    fields = [attrs["data-field"] for tag, attrs in tags if tag == "select"]
    assert fields == ["policy", "budget", "verdict"]  # one model, one data set, one status
    rows = [attrs for tag, attrs in tags if tag == "tr" and "data-policy" in attrs]
    assert len(rows) == 13
    assert {name for name in rows[0] if name.startswith("data-")} == {"data-policy", "data-budget", "data-verdict"}


def test_every_shown_number_is_explained_and_carries_its_unit(sweep_page: str) -> None:
    for name in ("ppl", "objects_recalled_fraction", "ttft_ms", "kv_stored_bytes"):
        assert MEASURES[name].definition.replace("'", "&#x27;") in sweep_page
    assert "n = 32" in sweep_page
    assert "95 % interval" in sweep_page


def test_problems_and_failures_are_on_the_page(tmp_path: Path) -> None:
    write_cell(tmp_path, body(status="oom"))
    torn = write_cell(tmp_path, body(policy="elastic"))
    torn.write_text("{")
    page = page_of(tmp_path)
    assert "tried to allocate &lt;2 GiB&gt;" in page
    assert f"cells/{torn.parent.name}/record.json" in page


def test_an_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    assert "No usable record was found" in page_of(tmp_path)


@pytest.mark.usefixtures("_two_figures")
def test_a_report_is_the_same_bytes_when_built_again(tmp_path: Path) -> None:
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        write_cell(tmp_path, body(policy=policy, budget=budget, num_samples=8))
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


@pytest.mark.long
@pytest.mark.usefixtures("_two_figures")
def test_figures_of_very_many_cells_are_left_to_the_plot_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("a", "b"):
        for policy, budget in (("full", None), ("h2o", 0.2)):
            write_cell(tmp_path, body(policy=policy, budget=budget, model=model))
    monkeypatch.setattr("kvbench.report.build.MOST_CELLS_DRAWN", 3)
    report = build_report(tmp_path)
    assert report.plots
    assert all("-a-scenes" in path.name for path in report.plots)
    assert "1 large group is not among them" in report.page.read_text(encoding="utf-8")


def test_of_very_many_pairs_a_claim_is_corrected_at_least_as_strictly(
    sweep_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (group,) = load_results(sweep_folder).groups
    full_family = judge(group)
    monkeypatch.setattr("kvbench.report.standing.MOST_PAIRS", 0)
    lazy = judge(group)
    pairs = [one for one in full_family.by_pair.values() if not one.second.is_full and one.measure == "rougeL_vs_full"]
    assert len(pairs) > 10
    for one in pairs:
        for first, second in ((one.first, one.second), (one.second, one.first)):
            found, known = lazy.between(first, second, one.measure), full_family.between(first, second, one.measure)
            assert found is not None
            assert known is not None
            assert found.value == pytest.approx(known.value)
            assert (found.p_holm or 0) >= (known.p_holm or 0)
            assert known.is_clear or not found.is_clear


def test_a_timed_pass_is_called_a_run_also_where_a_record_calls_it_a_launch(tmp_path: Path) -> None:
    record = body()
    record["measurements"]["tpot_ms"]["method"] = "t interval over 6 launch medians"
    write_cell(tmp_path, record)
    page = render_page(load_results(tmp_path), [])
    assert "t interval over 6 run medians" in page
    assert "launch medians" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
