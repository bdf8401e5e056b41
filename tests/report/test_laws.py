"""Laws of the field: told from records, by direction and margin, with the interval on one side or the other."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvbench.config.build import build_cell, build_cells
from kvbench.config.compose import compose_grid
from kvbench.errors import ConfigError
from kvbench.report.build import build_report
from kvbench.report.laws import (
    Expectation,
    Law,
    LawRow,
    law_rows,
    laws_csv,
    laws_markdown,
    load_laws,
    print_laws,
    read_law,
)
from kvbench.report.load import Results, load_results, parse_cell
from kvbench.results.record import write_record
from tests.models.checkpoints import save_checkpoint, text_model

REPO = Path(__file__).parents[2]
WINDOWS = range(12)
LAWS = {law.name: law for law in load_laws()}
NUMBERS = st.floats(-10, 10)
STREAM = {"class": "kvbench:StreamingLLM", "num_sinks": 4}


def body(
    policy: str = "full",
    nll: float = 3.0,
    *,
    spread: float = 0.0,
    fraction: float = 0.2,
    settings: Mapping[str, Any] = MappingProxyType({}),
    status: str = "ok",
    started: str = "2026-11-29T00:00:00+00:00",
) -> dict[str, Any]:
    """A record of twelve windows whose mean log-loss is `nll`, every other window `spread` above and below it."""
    positions = "in_cache" if policy == "streaming_llm" else "original"
    losses = (64 * (nll + 0.01 * n + spread * (-1) ** n) for n in WINDOWS)
    samples = [{"id": f"w/{n}", "nll_sum": loss, "num_scored_tokens": 64} for n, loss in enumerate(losses)]
    budget = (
        None if policy == "full" else {"class": "kvbench:Budget", "fraction": fraction, "tokens": None, "of": "seen"}
    )
    cell = {
        "dataset": {"class": "kvbench:TextWindows"},
        "policy": STREAM if policy == "streaming_llm" else {"class": policy},
        "budget": budget,
        "positions": positions,
        **settings,
    }
    failed = status != "ok"
    key = f"{abs(hash((policy, nll, spread, fraction, repr(settings), status, started))):064x}"
    return {
        "schema": 1, "key": key, "sweep": "laws", "attempt": key[-32:], "status": status, "cell": cell,
        "labels": {
            "model": "m", "dataset": "frankenstein", "policy": policy, "budget": f"{fraction:.0%}",
            "budget_fraction": fraction, "budget_tokens": None, "positions": positions,
        },
        "phase": "decode" if failed else None,
        "error": {"type": "OutOfMemoryError", "message": "no room", "traceback": ""} if failed else None,
        "started_utc": started, "duration_s": 1.0, "environment": {}, "curves": {},
        "measurements": {} if failed else {"ppl": {"value": 20.0, "low": 19.0, "high": 21.0, "n": 12, "unit": "ppl"}},
        "samples": [] if failed else samples,
    }  # fmt: skip


def stream(nll: float, num_sinks: int = 4, **more: Any) -> dict[str, Any]:
    return body("streaming_llm", nll, settings={"policy": {**STREAM, "num_sinks": num_sinks}}, **more)


def rows_of(*bodies: dict[str, Any], laws: tuple[str, ...] = ("no_sinks",)) -> tuple[LawRow, ...]:
    results = Results(records=tuple(parse_cell(one) for one in bodies), problems=())
    return law_rows(results, [LAWS[name] for name in laws])


def expectation(difference: Any, margin: float) -> Expectation:
    return Expectation(says="", measure="ppl", first=({},), second=({},), difference=difference, margin=margin)


@given(st.sampled_from(["above", "below", "within"]), NUMBERS, NUMBERS, NUMBERS, st.floats(0, 5))
def test_only_an_interval_that_is_all_on_one_side_of_the_margin_tells(
    difference: str, one: float, two: float, margin: float, wider: float
) -> None:
    margin = abs(margin) + 1e-9 if difference == "within" else margin
    expected, low, high = expectation(difference, margin), min(one, two), max(one, two)
    told = expected.told(low, high)
    fits = {"above": lambda at: at > margin, "below": lambda at: at < margin, "within": lambda at: abs(at) < margin}
    if told == "holds":
        assert all(map(fits[difference], (low, high, (low + high) / 2)))
    if told == "does not":
        assert not any(map(fits[difference], (low, high)))
    assert expected.told(low - wider, high + wider) in (told, "cannot be told")


def test_the_laws_that_ship_are_whole_and_a_page_explains_each() -> None:
    assert [law.number for law in LAWS.values()] == [1, 2, 3, 4, 5, 6, 6, 8, 9, 10, 13, 13, 15]
    page = (REPO / "docs" / "laws.md").read_text(encoding="utf-8")
    for law in LAWS.values():
        assert law.statement.endswith(".")
        assert law.source
        assert law.published
        assert f"`{law.name}`" in page, law.name


def test_directions_and_margins_are_those_committed_before_the_first_run() -> None:
    """f6fa0ad of 2026-11-29 23:50 and fd00997 of 2026-11-30 03:26; the first records are of 01:02 and 04:35."""
    assert {law.name: [(one.difference, one.margin) for one in law.expects] for law in LAWS.values()} == {
        "full_budget": [("within", 0.001)],
        "no_sinks": [("above", 0.4)],
        "four_sinks": [("within", 0.02), ("above", 0.02)],
        "larger_stream": [("above", 0.02)],
        "small_keys": [("below", 0.1), ("above", 0.4), ("above", 0.02)],
        "heavy_hitters": [("below", 0.1), ("above", 0.1), ("above", 0.1)],
        "tova_eighth": [("below", 0.1)],
        "hidden_question": [("below", 0.0), ("above", -0.2), ("below", -0.2)],
        "needle_in_window": [("below", -0.6), ("within", 0.2)],
        "choice_per_head": [("above", 0.02), ("below", 0.02)],
        "copied_digits": [("above", -0.2), ("above", 0.2)],
        "copied_word": [("above", 0.2)],
        "peak_memory": [("above", -0.1)],
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = save_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    text_model("llama", num_hidden_layers=3).save_pretrained(folder)  # a law leaves two layers whole
    return ["model=local", f"model.checkpoint={folder}", "beyond_context=allow"]


@pytest.mark.parametrize("experiment", ["laws", pytest.param("laws_gpu", marks=pytest.mark.long)])
def test_what_the_experiment_runs_is_what_each_law_looks_for(tiny: list[str], experiment: str) -> None:
    cells = build_cells(compose_grid([f"+experiment={experiment}", *tiny], multirun=False, config_dir=None))
    names = {"perplexity": "ppl", "generation": "needles_recalled_fraction", "memory": "peak_memory_bytes"}
    made = []
    for cell in cells:  # loading tells apart data sets of one name and other windows
        labels = cell.labels | {"dataset": str(cell.settings["dataset"].get("prompt_tokens", "recall"))}
        measured = {names[task]: {"value": 1.0, "n": 1, "unit": ""} for task in cell.tasks}
        record = body() | {"cell": cell.settings, "labels": labels, "key": cell.key, "measurements": measured}
        made.append(parse_cell(record))
    rows = law_rows(Results(records=tuple(sorted(made, key=lambda cell: cell.sort_key)), problems=()))
    assert [row.expectation for row in rows] == [one for law in LAWS.values() for one in law.expects]
    told = {cell.key for row in rows for pair in row.pairs for cell in (pair.first, pair.second)}
    assert told == {cell.key for cell in cells}


def test_every_cell_is_run_once_and_no_law_takes_anothers_text(tiny: list[str]) -> None:
    grid = compose_grid(
        ["+experiment=laws", "laws=[no_sinks,four_sinks,needle_in_window]", "dataset=pg19", "dataset.path=x", *tiny],
        multirun=False,
        config_dir=None,
    )
    words = [(one.choices["policy"], repr(one.config)) for one in grid]
    assert len(words) == len(set(words))
    assert {one.choices["dataset"] for one in grid} == {"pg19", "recall_many"}
    assert not grid[0].is_search


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["laws=nosinks"], "laws is 'nosinks'; did you mean 'no_sinks'"),
        (["laws=[no_sinks,needle]"], "laws is 'needle'; "),
        (["budget.fraction=0.3"], "budget.fraction=0.3 changes what the law full_budget compares"),
        (["policy=h2o"], "policy=h2o changes what the law full_budget compares"),
    ],
)
def test_what_is_no_law_or_would_change_one_is_refused_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        compose_grid(["+experiment=laws", *words], multirun=False, config_dir=None)
    assert told in str(caught.value)


def test_a_model_that_reads_pictures_is_refused_before_it_is_loaded() -> None:
    grid = compose_grid(["+experiment=laws", "laws=no_sinks", "model=tiny-llava"], multirun=False, config_dir=None)
    with pytest.raises(
        ConfigError, match=r"^laws are of text models, but model.checkpoint bundled reads pictures; [^\n]*$"
    ):
        build_cell(grid[0])


@pytest.mark.parametrize(
    ("worse", "spread", "verdict"),
    [
        (0.7, 0.0, "holds"),
        (0.7, 0.2, "holds"),
        (0.2, 0.1, "does not"),
        (0.4, 0.5, "cannot be told"),
        (-1.0, 0.1, "does not"),
    ],
)
def test_a_law_holds_where_the_interval_clears_its_margin(worse: float, spread: float, verdict: str) -> None:
    (row,) = rows_of(stream(3.0), stream(3.0 + worse, 0, spread=spread))
    assert row.verdict == verdict
    assert row.pairs[0].value == pytest.approx(worse)
    assert row.measured.startswith(f"{worse:+.3f} [")
    assert row.measured.endswith("] nats/token")
    assert row.expectation.text == "above +0.400 nats/token"


def test_the_difference_is_paired_by_window() -> None:
    """The windows themselves differ by far more than the two policies."""
    low, high = (rows_of(stream(3.0, spread=0.9), stream(3.7, 0, spread=0.9))[0].pairs[0]).low, 0.75
    assert low is not None
    assert 0.65 < low < high


def test_all_pairs_must_hold_or_one_as_the_law_says() -> None:
    full = body(nll=3.0)
    budgets = [body(name, 3.0, fraction=1.0) for name in ("random", "h2o", "elastic", "snapkv", "streaming_llm")]
    assert rows_of(full, *budgets, laws=("full_budget",))[0].verdict == "holds"
    (row,) = rows_of(full, *budgets[1:], body("random", 3.1, fraction=1.0), laws=("full_budget",))
    assert row.verdict == "does not"
    assert row.pairs[0].first.policy == "random"
    assert row.measured.endswith("(random, of 5)")

    falling = [stream(nll, fraction=share) for share, nll in ((0.1, 3.3), (0.2, 3.2), (0.4, 3.1), (0.8, 3.0))]
    assert rows_of(*falling, laws=("larger_stream",))[0].verdict == "does not"
    rising = [*falling[:3], stream(3.15, fraction=0.8)]
    (row,) = rows_of(*rising, laws=("larger_stream",))
    assert (row.verdict, row.pairs[0].first.budget_fraction) == ("holds", 0.8)


def test_an_expectation_without_all_its_cells_has_no_row_and_a_failed_cell_is_said() -> None:
    assert rows_of(stream(3.0), body()) == ()
    (row,) = rows_of(stream(3.0), stream(3.7, 0, status="oom"))
    assert (row.verdict, row.measured) == ("cannot be told", "not measured")
    assert row.remark.endswith(": oom")


def test_other_data_and_other_settings_are_no_evidence() -> None:
    scenes = {"dataset": {"class": "kvbench:Scenes"}, "policy": {**STREAM, "num_sinks": 0}}
    assert rows_of(stream(3.0), body("streaming_llm", 3.7, settings=scenes)) == ()
    moved = {"policy": {**STREAM, "num_sinks": 0}, "positions": "original"}
    assert rows_of(stream(3.0), body("streaming_llm", 3.7, settings=moved)) == ()


def test_a_part_that_a_law_wants_unset_is_no_other_one() -> None:
    """Records name a part only where it is set; a law that cuts every layer is not told by one that does not."""

    def norms(keep: str, nll: float, layers: list[int] | None = None) -> dict[str, Any]:
        policy = {"class": "kvbench:KeyNorm", "keep": keep, **({"skip_layers": layers} if layers else {})}
        return body("key_norm", nll, fraction=0.5, settings={"policy": policy})

    cells = [body(nll=3.0), norms("small", 3.05, [0, 1]), norms("large", 3.9, [0, 1]), norms("small", 3.2)]
    rows = rows_of(*cells, laws=("small_keys",))
    assert [row.verdict for row in rows] == ["holds", "holds", "holds"]
    assert [row.pairs[0].value for row in rows] == pytest.approx([0.05, 0.85, 0.15])
    assert len(rows_of(*cells[:3], laws=("small_keys",))) == 2


def test_a_law_may_compare_one_text_under_a_question_that_is_seen_and_hidden() -> None:
    def recall(policy: str, share: float, *, visible: bool, fraction: float = 0.5) -> dict[str, Any]:
        settings: dict[str, Any] = {"dataset": {"class": "kvbench:Recall"}, "query_visible": visible}
        settings |= {"policy": STREAM} if policy == "streaming_llm" else {}
        name = "needles_recalled_fraction"
        samples = [{"id": f"recall/{n}", name: float(n < 60 * share), "reference": f"thing {n}"} for n in range(60)]
        measured = {name: {"value": share, "low": share - 0.05, "high": share + 0.05, "n": 60, "unit": "fraction"}}
        made = body(policy, share, fraction=fraction, settings=settings)
        return made | {"samples": samples, "measurements": measured}

    hidden = [
        recall(policy, share, visible=False, fraction=fraction)
        for fraction in (0.5, 0.3)
        for policy, share in (("snapkv", 0.2), ("streaming_llm", 0.5))
    ]
    seen = [recall("full", 1.0, visible=True), recall("snapkv", 0.95, visible=True)]
    rows = rows_of(*seen, *hidden, laws=("hidden_question",))
    assert [row.verdict for row in rows] == ["holds", "holds", "holds"]
    assert [row.pairs[0].value for row in rows] == pytest.approx([-0.3, -0.05, -0.75])


def test_of_several_records_the_newest_counts_and_one_that_failed_does_not() -> None:
    old, new = stream(3.1, 0), stream(3.7, 0, started="2026-11-30T00:00:00+00:00")
    later = stream(9.0, 0, status="oom", started="2026-12-01T00:00:00+00:00")
    assert rows_of(stream(3.0), old, new, later)[0].pairs[0].value == pytest.approx(0.7)


def test_bytes_are_counted_and_compared_as_a_share() -> None:
    small = {"dataset": {"class": "kvbench:TextWindows", "prompt_tokens": 4096, "num_samples": 1}}

    def peak(policy: str, size: float) -> dict[str, Any]:
        found = body(policy, settings=small | ({"policy": STREAM} if policy == "streaming_llm" else {}))
        return found | {"measurements": {"peak_memory_bytes": {"value": size, "n": 1, "unit": "bytes"}}, "samples": []}

    kept = [peak("full", 1000), peak("h2o", 950), peak("snapkv", 960)]
    (row,) = rows_of(*kept, peak("streaming_llm", 920), laws=("peak_memory",))
    assert (row.verdict, row.measured) == ("holds", "-8.0 % (streaming_llm, of 3)")
    (row,) = rows_of(*kept, peak("streaming_llm", 800), laws=("peak_memory",))
    assert (row.verdict, row.expectation.text) == ("does not", "above -10.0 %")


def test_a_law_may_speak_of_some_samples_and_is_not_told_where_full_cannot_do_the_task() -> None:
    def recall(policy: str, found: Any) -> dict[str, Any]:
        settings = {"dataset": {"class": "kvbench:Recall"}, "query_visible": True}
        settings |= {"policy": STREAM} if policy == "streaming_llm" else {}
        depths = [0.0, 0.29, 0.43, 0.57, 0.86, 1.0] * 10
        share = sum(map(found, depths)) / len(depths)
        name = "needles_recalled_fraction"
        samples = [
            {"id": f"recall/{n}/depth-{depth:.2f}", name: float(found(depth)), "reference": f"thing {n}"}
            for n, depth in enumerate(depths)
        ]
        measured = {name: {"value": share, "low": share - 0.05, "high": share + 0.05, "n": 60, "unit": "fraction"}}
        return body(policy, fraction=0.5, settings=settings) | {"samples": samples, "measurements": measured}

    window = recall("streaming_llm", lambda depth: depth > 0.5)
    gone, kept = rows_of(recall("full", lambda depth: True), window, laws=("needle_in_window",))
    assert (gone.verdict, kept.verdict) == ("holds", "holds")
    assert (gone.pairs[0].value, kept.pairs[0].value) == (-1.0, 0.0)
    unable = rows_of(recall("full", lambda depth: False), window, laws=("needle_in_window",))
    assert {row.verdict for row in unable} == {"cannot be told"}
    assert unable[0].remark == "the full cache itself does not do this task"


LAW = "number: 1\nstatement: s\nsource: s\npublished: p\ndata: TextWindows\n"
ONE = "{says: s, measure: ppl, first: {policy: [a, b]}, second: {policy: full}, difference: above, margin: 0.1}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAW, "law mine expects nothing; it needs `expects` with at least one difference"),
        (LAW.replace("source: s\n", "") + f"expects: [{ONE}]", "law mine does not say source"),
        (LAW + f"margin: 3\nexpects: [{ONE}]", "law mine: a field is 'margin'"),
        (LAW + f"expects: [{ONE.replace('ppl', 'pll')}]", "law mine: measure is 'pll'; did you mean 'ppl'"),
        (LAW + f"expects: [{ONE.replace('above', 'over')}]", "law mine: difference is 'over'; did you mean 'above'"),
        (LAW + f"expects: [{ONE.replace('above, margin: 0.1', 'within, margin: 0')}]", "law mine: margin is 0; what a"),
        (
            LAW + f"expects: [{ONE.replace('full', '[a, b, c]')}]",
            "law mine: lists of [2, 3] settings go along together",
        ),
    ],
)
def test_a_law_that_is_written_wrongly_says_so_in_one_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        read_law("mine", text)
    assert told in str(caught.value)


def test_lists_in_a_law_go_along_together() -> None:
    law: Law = read_law("mine", LAW + f"cells: {{task: perplexity}}\nexpects: [{ONE}]")
    assert law.expects[0].first == ({"task": "perplexity", "policy": "a"}, {"task": "perplexity", "policy": "b"})
    assert law.expects[0].second == ({"task": "perplexity", "policy": "full"},) * 2
    assert [cell["policy"] for cell in law.cells_needed] == ["a", "full", "b"]


def write(folder: Path, *bodies: dict[str, Any]) -> None:
    for one in bodies:
        write_record(folder / "cells" / one["key"][:16] / "record.json", one)


def distinct(*bodies: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        one | {"key": f"{number:016x}{'0' * 48}", "attempt": f"{number:032x}"} for number, one in enumerate(bodies, 1)
    ]


def test_terminal_page_and_tables_say_the_same_of_the_same_records(tmp_path: Path) -> None:
    write(tmp_path, *distinct(stream(3.0), stream(3.7, 0), body()))
    rows = law_rows(load_results(tmp_path))
    (row,) = rows
    written = build_report(tmp_path)
    page, table = written.page.read_text(), (tmp_path / "report" / "laws.md").read_text()
    assert '<section id="laws"><h2>Laws of the field</h2>' in page
    assert table == laws_markdown(rows)
    assert (tmp_path / "report" / "laws.csv").read_text() == laws_csv(rows)
    for width in (200, 60):
        console = Console(file=StringIO(), width=width)
        print_laws(rows, console)
        said = " ".join(console.file.getvalue().split())
        assert "holds" in said
        assert "Laws of the field: m" in said
    for text in (page.replace("\u2212", "-"), table):
        assert row.law.statement in text
        assert "holds" in text
        assert f"{row.pairs[0].value:+.3f}" in text
    assert "published, other models" in table


@pytest.mark.long
def test_a_page_without_such_records_has_no_such_section_and_an_old_table_goes(tmp_path: Path) -> None:
    first, *others = distinct(stream(3.7, 0), stream(3.0), body())
    write(tmp_path, first, *others)
    build_report(tmp_path)
    (tmp_path / "cells" / first["key"][:16] / "record.json").unlink()
    page = build_report(tmp_path).page.read_text()
    assert 'id="laws"' not in page
    assert not list((tmp_path / "report").glob("laws.*"))
