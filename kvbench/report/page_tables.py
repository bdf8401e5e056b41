"""The page's tables: verdicts, memory, latency, all numbers, the environment, the smallest safe budgets.

Each function turns rows that other outputs share (`report.verdicts`, `report.tables`) or a group's measurements into
cells of the page, with what they sort by, and gives them to a template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, groupby
from operator import attrgetter

from markupsafe import Markup

from kvbench.measures import format_interval, format_value, measure
from kvbench.report.compare import (
    DECLARED,
    Ability,
    Choices,
    Comparison,
    difference_text,
    difference_unit,
    size_text,
    size_with_unit,
    timing_noise,
    verdict_remark,
)
from kvbench.report.load import CellResult, Estimate, Group, Results
from kvbench.report.markup import (
    CELL_HEADS,
    NOT_MEASURED,
    Head,
    TableCell,
    TableView,
    budget_cell,
    budget_size,
    render,
    row_head,
    text_cell,
)
from kvbench.report.standing import BEHIND, LENGTH, Judged, Match, matrices
from kvbench.report.tables import INTERVAL_NOTE, Table, results_table, samples_text
from kvbench.report.verdicts import RATIO_NOTE, REFERENCE, CellRow, behind_of, time_of
from kvbench.results.frontier import Frontier, Search, budget_text, difference_of, held_text, range_text
from kvbench.stats.tests import smallest_margin

_FILTERS = ("model", "dataset", "policy", "budget", "verdict", "status")
_QUALITY, _TIMES, _BYTES = "quality", "time, and ratio to full", "KV cache"
_VERDICT_HEADS = (
    Head("detectable", "with these samples", group=_QUALITY),
    Head("collapses", "samples", group=_QUALITY),
)
_BEHIND_HEADS = {
    BEHIND: Head(measure(BEHIND).label, "higher is better", group=_QUALITY),
    LENGTH: Head(measure(LENGTH).label, "of the answers", group=_QUALITY),
}
_COST_HEADS = (
    Head("TPOT", "ms per token", group=_TIMES),
    Head("full's TPOT", "same runs", group=_TIMES),
    Head("TPOT / full", "under 1 is faster", group=_TIMES),
    Head("TTFT", "ms", group=_TIMES),
    Head("full's TTFT", "same runs", group=_TIMES),
    Head("TTFT / full", "under 1 is faster", group=_TIMES),
    Head("stored", "bytes", group=_BYTES),
    Head("of full", "stored", group=_BYTES),
)


def verdicts_html(rows: Sequence[CellRow]) -> Markup:
    """Return filters, table and how to read it; `rows` of all groups."""
    differing = [name for name in ("model", "dataset", "measure") if len({getattr(row, name) for row in rows}) > 1]
    names = sorted({row.measure for row in rows if row.measure})
    label, way = "quality", "measure below"
    if len(names) == 1:
        label, way = measure(names[0]).label, f"{measure(names[0]).better} is better"
    words = {"model": "model", "dataset": "data set"}
    places = [Head(words[name], kind="text") for name in differing if name in words]
    verdict = Head("against full", "difference and interval", kind="amount")
    behind = behind_of(rows)
    quality = [verdict, Head(label, way, group=_QUALITY), *_VERDICT_HEADS, *(_BEHIND_HEADS[name] for name in behind)]
    heads = [*CELL_HEADS, *places, *(quality if names else ()), *_COST_HEADS]
    keys = [_filtered_by(row) for row in rows]
    cells = [[*_row_cells(row, differing), *(_quality_cells(row, differing, behind) if names else ()),
              *_cost_cells(row)] for row in rows]  # fmt: skip
    caption = "Verdicts against the full cache"
    filled = [any(row[at].text != "-" for row in cells) for at in range(len(heads))]
    heads, cells = list(compress(heads, filled)), [list(compress(row, filled)) for row in cells]
    options = _options(rows, keys)
    chosen_by = [name for name in _FILTERS if len(options[name]) > 1]
    keys = [{name: one[name] for name in chosen_by} for one in keys]
    view = TableView(caption=caption, heads=heads, rows=cells, row_data=keys, name="verdict-table")
    if not names:
        options |= {"verdict": []}
    return render("verdicts.html.j2", margins=_margins(rows), options=options, ratio_note=RATIO_NOTE, view=view)


def matrices_html(judged: Judged) -> Markup:
    """Return every policy against every other, folded by measure with the leading one open; "" where none has two."""
    drawn = []
    for number, found in enumerate(matrices(judged)):
        label, is_large = measure(found.measure).label, len(found.columns) > _MOST_SIDE_IN_FULL
        columns = found.columns[:0:-1] if is_large else found.columns
        heads = [Head(name, kind=None) for name in ("policy", *columns)]
        compared = (one.comparison for row in found.rows for one in row.matches if one and one.comparison)
        num, _ = Counter(one.num_samples for one in compared).most_common(1)[0]
        views = []
        for budget, rows in groupby(found.rows, key=attrgetter("budget")):
            lines = []
            for row in rows:
                matches = row.matches[: found.columns.index(row.policy) : -1] if is_large else row.matches
                lines += [[row_head(row.policy), *(_match(one, num) for one in matches)]] if matches else []
            views.append(TableView(caption=f"{label} at {budget}, {judged.group.title}", heads=heads, rows=lines))
        title = f"{label}, {measure(found.measure).better} is better"
        once = "Every pair stands once; seen from the column it is the opposite. " if is_large else ""
        note = f"{once}{found.note} n = {num} where nothing else is said."
        drawn.append({"title": title, "is_open": not number, "note": note, "views": views})
    return render("matrices.html.j2", matrices=drawn) if drawn else Markup()


_MOST_SIDE_IN_FULL = 12  # policies; of more, the half above the diagonal says all


def _match(one: Match | None, num: int) -> TableCell:
    """Return a pair's cell; `num` samples are those of most pairs."""
    if one is None:
        return TableCell("-", kind="name missing", title="the same policy")
    word, found = one.word, one.comparison
    title = one.reason or (f"n = {found.num_samples}" if found and found.num_samples != num else "")
    below = "\n".join(number.replace(" ", "\u00a0") for number in one.numbers)  # breaks between numbers alone
    return TableCell(word, below, kind=_kind(word), title=title)


def _kind(word: str) -> str:
    return f"v-{word.replace(' ', '-')}"


def _filtered_by(row: CellRow) -> Mapping[str, str]:
    known = {"model": row.model, "dataset": row.dataset, "verdict": row.verdict or "no quality"}
    return {name: known.get(name) or str(getattr(row.cell, name)) for name in _FILTERS}


def _options(rows: Sequence[CellRow], keys: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return what rows may be chosen by, and the values of each; budgets stand by size."""
    ordered = sorted((row.cell for row in rows), key=lambda cell: (budget_size(cell), cell.budget))
    budgets = list(dict.fromkeys(cell.budget for cell in ordered))
    return {name: budgets if name == "budget" else sorted({one[name] for one in keys}) for name in _FILTERS}


def _margins(rows: Sequence[CellRow]) -> str:
    """Return the margins behind the verdicts; "" where none has one."""
    margins = dict.fromkeys(
        f"{measure(one.measure).label} {size_with_unit(one.measure, one.margin)}"
        for row in rows
        for one in (row.comparison, *(time.comparison for time in row.times))
        if one is not None and one.margin is not None
    )
    return ", ".join(margins)


def _row_cells(row: CellRow, differing: Sequence[str]) -> Iterator[TableCell]:
    cell = row.cell
    yield row_head(row.policy, "noisy times" if cell.status == "noisy" else cell.folder)
    yield budget_cell(cell)
    yield from (text_cell(getattr(row, name)) for name in ("model", "dataset") if name in differing)


def _quality_cells(row: CellRow, differing: Sequence[str], behind: Sequence[str]) -> Iterator[TableCell]:
    one, found = row.comparison, row.quality
    yield _verdict(one, row.verdict)
    if found is None or row.measure is None:
        yield TableCell("-")
    else:
        yield _estimate(row.measure, found, above=measure(row.measure).label if "measure" in differing else "")
    detectable = one.minimum_detectable if one else None
    yield TableCell((size_text(one.measure, detectable) if one else "") or "-", sort=detectable)
    collapsed = "-" if row.num_collapsed is None else f"{row.num_collapsed} of {row.num_paired}"
    yield TableCell(collapsed, sort=row.num_collapsed)
    for name in behind:
        is_said = name == row.measure  # in the column of the quality
        yield TableCell("-") if is_said else _estimate(name, row.behind if name == BEHIND else row.length)


def _cost_cells(row: CellRow) -> Iterator[TableCell]:
    cell = row.cell
    for name, time in zip(("tpot", "ttft"), row.times, strict=True):
        noise, words = timing_noise(cell, f"{name}_ms"), (time.of_medians, _speed_word(time.comparison))
        yield _estimate(f"{name}_ms", time.own, noise=noise)
        yield _estimate(f"full_{name}_ms", time.full, noise=noise)
        yield _estimate(f"{name}_ratio_to_full", time.ratio, noise=noise, word="\n".join(filter(None, words)))
    stored, share = row.stored_bytes, row.stored_share
    yield TableCell("-" if stored is None else format_value("kv_stored_bytes", stored), sort=stored)
    yield TableCell("-" if share is None else f"{share:.2f}x", sort=share)


def _verdict(one: Comparison | None, word: str) -> TableCell:
    """Return a cell with the verdict, and below it the difference, and what is missing or why."""
    if not word:
        return TableCell("no quality", kind="missing")
    if one is None:
        return TableCell(word, kind=_kind("reference" if word == REFERENCE else "failed"))
    _, factor, places = difference_unit(one.measure)
    beside = ""
    if one.t_low is not None and one.t_high is not None:
        beside = f"; t interval [{one.t_low / factor:+.{places}f}, {one.t_high / factor:+.{places}f}]"
    below = "\n".join(filter(None, (difference_text(one), verdict_remark(one))))
    title = f"{one.method}, n = {one.num_samples}{beside}"
    return TableCell(word, below, sort=one.value, kind=_kind(word), title=title)


def _speed_word(one: Comparison | None) -> str:
    if one is None or one.second.key == one.first.key:
        return ""
    return {"better": "faster", "worse": "slower"}.get(one.verdict, one.verdict)


def _estimate(name: str, found: Estimate | None, *, above: str = "", word: str = "", noise: str = "") -> TableCell:
    """Return the cell of a measurement: its interval between two remarks below it, what made it noisy in its box."""
    if found is None:
        return TableCell("-")
    below = "\n".join(filter(None, (above, format_interval(name, found.value, found.low, found.high), word)))
    title = "; ".join(filter(None, (noise, f"n = {found.n}" if found.n is not None else "")))
    return TableCell(
        format_value(name, found.value), below, sort=found.value, kind="noisy" if noise else "", title=title
    )


_FIRST, _STEP, _ROOF = "first token", "one decode step", "memory bandwidth"
_LATENCY_COLUMNS = (
    ("ttft_ms", Head("TTFT", "vision, prompt, cut", group=_FIRST)),
    ("full_ttft_ms", Head("full's", "same runs", group=_FIRST)),
    ("ttft_ratio_to_full", Head("/ full", "over pairs", group=_FIRST)),
    ("settle_ms", Head("compression", "policy's part of it", group=_FIRST)),
    ("tpot_ms", Head("TPOT", "median step", group=_STEP)),
    ("full_tpot_ms", Head("full's", "same runs", group=_STEP)),
    ("tpot_ratio_to_full", Head("/ full", "over pairs", group=_STEP)),
    ("tpot_p90_ms", Head("p90", "slow steps", group=_STEP)),
    ("policy_ms", Head("policy", "naming victims, alone", group=_STEP)),
    ("roof_ms", Head("roof", "weights and entries read once", group=_ROOF)),
    ("roof_share_fraction", Head("MBU", "roof over TPOT", group=_ROOF)),
    ("throughput_tokens_per_s", Head("throughput", "prompt included", group="whole run")),
)
_NOISE_OF = {  # the measurement whose noise is in another one
    "settle_ms": "ttft_ms",
    "full_ttft_ms": "ttft_ms",
    "full_tpot_ms": "tpot_ms",
    "tpot_p90_ms": "tpot_ms",
    "policy_ms": "tpot_ms",
    "roof_share_fraction": "tpot_ms",
}
_OVERHEAD_SHARE = 0.5


def latency_html(group: Group) -> Markup:
    """Return first token, step, the policy's part of both and the memory's roof, or "" where no cell was timed."""
    view = _measured(group, "Latency", _LATENCY_COLUMNS)
    return render("latency.html.j2", ratio_note=RATIO_NOTE, view=view) if view else Markup()


def _measured(group: Group, what: str, columns: Sequence[tuple[str, Head]]) -> TableView | None:
    """Return a row per cell that did not fail, or None where none has any of the measures."""
    if not any(cell.estimate(name) for cell in group.cells for name, _ in columns):
        return None
    heads = [*CELL_HEADS, *(head for _, head in columns)]
    rows = [list(_measured_cells(group, cell, columns)) for cell in group.cells if not cell.failed]
    return TableView(caption=f"{what}, {group.title}", heads=heads, rows=rows)


def _measured_cells(group: Group, cell: CellResult, columns: Sequence[tuple[str, Head]]) -> Iterator[TableCell]:
    times = [name for name in ("ttft_ms", "tpot_ms") if name in dict(columns)]
    noisy = [measure(name).label for name in times if timing_noise(cell, name)]
    yield row_head(group.series_label(cell), f"noisy: {' and '.join(noisy)}" if noisy else "")
    yield budget_cell(cell)
    for name, _ in columns:
        found = cell.estimate(name)
        noise = "" if name == "roof_ms" else timing_noise(cell, _NOISE_OF.get(name, name))
        is_overhead = found is not None and name == "roof_share_fraction" and found.value < _OVERHEAD_SHARE
        word = "overhead-bound" if is_overhead else ""
        if name.endswith("_ratio_to_full"):
            word = time_of(cell, name.partition("_")[0]).of_medians
        yield NOT_MEASURED if found is None else _estimate(name, found, word=word, noise=noise)


_PARTS, _PEAKS = "what is in memory", "peak of everything alive, by phase"
_MEMORY_COLUMNS = (
    ("peak_load_bytes", Head("weights", "and buffers", group=_PARTS)),
    ("plain_activation_bytes", Head("activations", "model without cache", group=_PARTS)),
    ("statistics_bytes", Head("statistics", "of attention, held at the end", group=_PARTS)),
    ("bookkeeping_bytes", Head("bookkeeping", "positions, ranks, lengths", group=_PARTS)),
    ("kv_theoretical_bytes", Head("nominal", "what the budget says", group=_BYTES)),
    ("kv_valid_bytes", Head("in use", "valid entries", group=_BYTES)),
    ("kv_stored_bytes", Head("stored", "from storages", group=_BYTES)),
    ("peak_vision_bytes", Head("vision", group=_PEAKS)),
    ("peak_prefill_bytes", Head("prefill", group=_PEAKS)),
    ("peak_settle_bytes", Head("compression", "policy on the prompt", group=_PEAKS)),
    ("peak_decode_bytes", Head("decode", group=_PEAKS)),
    ("peak_memory_bytes", Head("whole", "largest of all", group=_PEAKS)),
    ("peak_reserved_bytes", Head("reserved", "by the allocator", group=_PEAKS)),
    ("peak_over_bound_ratio", Head("peak / bound", "1 holds no more than it must")),
    ("peak_rss_bytes", Head("RSS", "process")),
)


def memory_html(group: Group) -> Markup:
    """Return what the peak is made of, what is stored and the peak by phase, or "" without a memory pass."""
    view = _measured(group, "Memory by phase", _MEMORY_COLUMNS)
    return render("memory.html.j2", view=view) if view else Markup()


_MOST_CELLS_IN_FULL = 100


def numbers_html(judged: Judged, tables: str) -> Markup:
    """Return the results table of a group and, folded, every measurement unless there are very many cells.

    `tables` is the way to the folder of table.csv, as a link has it.
    """
    group = judged.group
    main, every = results_table(group), results_table(group, every_measure=True)
    return render(
        "numbers.html.j2",
        tables=tables,
        counts=main.counts,
        interval_note=INTERVAL_NOTE,
        main=_results(main, f"Results, {group.title}"),
        every=None if len(group.cells) > _MOST_CELLS_IN_FULL else _results(every, f"Every measurement, {group.title}"),
        num_columns=len(every.columns),
    )


def _results(numbers: Table, caption: str) -> TableView:
    heads = list(CELL_HEADS)
    filled = [any(row.entries[at].kind != "missing" for row in numbers.rows) for at in range(len(numbers.columns))]
    for name in compress(numbers.columns, filled):
        better = measure(name).better
        notes = ("" if better == "none" else f"{better} is better", samples_text((r.cell for r in numbers.rows), name))
        heads.append(Head(measure(name).label, ", ".join(filter(None, notes))))
    rows = []
    for row in numbers.rows:
        cells = [row_head(row.policy, "noisy times" if row.cell.status == "noisy" else "")]
        cells.append(text_cell(row.budget, sort=budget_size(row.cell)))
        for entry in compress(row.entries, filled):
            kind = entry.kind if entry.kind in ("failed", "noisy") else ""
            title = f"n = {entry.n}" if entry.n is not None else ""
            cells.append(TableCell(entry.text, entry.interval, sort=entry.value, kind=kind, title=title))
        rows.append(cells)
    return TableView(caption=caption, heads=heads, rows=rows)


def environment_html(results: Results) -> Markup:
    """Return every environment value, with the number of cells where they differ."""
    found = []
    for name in sorted({name for cell in results.records for name in cell.environment}):
        values = (cell.environment.get(name) for cell in results.records)
        counts = Counter("not recorded" if value is None else str(value) for value in values)
        found.append((name, sorted(counts.items())))
    heads = [Head("what", kind=None), Head("value", kind=None)]
    view = TableView(caption="Software and machine, as the records state them", heads=heads, classes="text")
    return render("environment.html.j2", environment=found, view=view)


def frontier_html(frontiers: Sequence[Frontier], choices: Choices = DECLARED, groups: Iterable[Group] = ()) -> Markup:
    """Return a table per search, or how to make one.

    `choices` hold the margins of the rest of the page, `groups` the cells on it: where the full cache can not do the
    task, a search that was made before that was asked names no budget.
    """
    abilities = {cell.key: ability for group in groups for ability in (Ability(group),) for cell in group.cells}
    drawn = []
    for frontier in frontiers:
        label = measure(frontier.measure).label
        heads = [
            Head("policy", kind="text"),
            Head("model and data set", kind="text"),
            Head("smallest safe budget"),
            Head("true one", "from - to"),
            Head(f"{label} minus full", f"at that budget, {100 * frontier.confidence:.4g} % interval"),
            Head("samples"),
            Head("budgets measured", kind=None),
        ]
        rows = []
        for search in frontier.searches:
            ability = abilities.get(search.full_key)
            withheld = ability.reason(frontier.measure) if ability else ""
            rows.append(list(_search_cells(frontier, search, withheld)))
        caption = f"Smallest budget at which {label} is at most {frontier.margin:g} worse than full ({frontier.name})"
        elsewhere = smallest_margin(frontier.measure, choices.margins)
        other_margin = None if elsewhere == frontier.margin else elsewhere
        view = TableView(caption=caption, heads=heads, rows=rows)
        drawn.append({"frontier": frontier, "view": view, "other_margin": other_margin})
    return render("frontier.html.j2", searches=drawn)


def _search_cells(frontier: Frontier, search: Search, withheld: str) -> Iterator[TableCell]:
    yield row_head(search.policy, "" if search.positions == "original" else search.positions)
    yield text_cell(f"{search.model} on {search.dataset}")
    if withheld:
        yield TableCell("not ranked", withheld, sort=1e18)
        yield from [TableCell("-")] * 3
        yield text_cell(", ".join(budget_text(frontier, one.budget) for one in search.looks))
        return
    safe = search.smallest_safe
    above = f"none up to {budget_text(frontier, max(frontier.ladder))}" if safe is None else budget_text(frontier, safe)
    below = held_text(frontier, search) if search.status == "found" else search.status
    yield TableCell(above, below, sort=1e18 if safe is None else safe)
    yield TableCell(range_text(frontier, search), sort=search.budget_low)
    look = search.look or (search.looks[-1] if search.looks else None)
    if look is None:
        yield from [TableCell("-")] * 2
    else:
        yield TableCell(difference_of(look) or look.reason or "-", sort=look.value)
        yield TableCell(str(look.num_samples), sort=look.num_samples)
    yield text_cell(", ".join(f"{budget_text(frontier, one.budget)} {one.outcome}" for one in search.looks))
