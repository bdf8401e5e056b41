"""The page's tables: results (sortable), how each number is measured, environment, problems.

The page's verdict table: one for all models and data sets, which can be sorted and filtered.

The page's latency table: the first token, the step, the policy's part of both, and the roof of the memory.

The page's memory table: what the peak is made of, what the budget says, what is stored, and the peak by phase.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from kvbench.measures import MEASURES, format_interval, format_value, measure
from kvbench.report.compare import (
    Comparison,
    difference_interval,
    difference_unit,
    difference_value,
    size_text,
    timing_noise,
    verdict_remark,
)
from kvbench.report.load import CellResult, Estimate, Group, Results
from kvbench.report.markup import (
    Head,
    budget_size,
    escaped,
    filters_html,
    not_measured,
    number_cell,
    numbers,
    prose,
    row_head,
    table,
    text_cell,
)
from kvbench.report.tables import Entry, Row, Table, samples_text
from kvbench.report.verdicts import REFERENCE, CellRow, Time
from kvbench.results.record import Problem


def results_html(numbers: Table, caption: str) -> str:
    """Return the table; each head is a button that sorts, numbers carry their base value."""
    heads = [Head(label="policy", kind="text"), Head(label="budget", kind="amount")]
    for name in numbers.columns:
        better = measure(name).better
        notes = ("" if better == "none" else f"{better} is better", samples_text((r.cell for r in numbers.rows), name))
        heads.append(Head(label=measure(name).label, note=", ".join(note for note in notes if note)))
    return table(caption, heads, map(_row, numbers.rows))


def measures_html(names: Iterable[str]) -> str:
    """Return what each shown measurement means."""
    shown = set(names)
    rows = "".join(
        f"<tr><th scope=row>{html.escape(known.label)}</th><td>{html.escape(known.definition)}</td>"
        f"<td>{html.escape(_unit_text(known.unit))}</td><td>{known.better if known.better != 'none' else '-'}</td></tr>"
        for name, known in MEASURES.items()
        if name in shown
    )
    heads = [Head(label=label, kind=None) for label in ("name", "what it is", "unit", "better")]
    return table("Definitions of the numbers on this page", heads, [rows], classes="text")


def methods_text(results: Results) -> str:
    """Return how intervals were made, as the records state it."""
    methods = {found.method for cell in results.records for found in cell.measurements.values() if found.method}
    return "; ".join(sorted(methods)) or "not stated in the records"


def environment_html(results: Results) -> str:
    """Return every environment value, with the number of cells where they differ."""
    names = sorted({name for cell in results.records for name in cell.environment})
    rows = []
    for name in names:
        counts = Counter(_plain(cell.environment.get(name)) for cell in results.records)
        values = "<br>".join(
            html.escape(value) + (f" <span class=quiet>({count} cells)</span>" if len(counts) > 1 else "")
            for value, count in sorted(counts.items())
        )
        rows.append(f"<tr><th scope=row>{html.escape(name)}</th><td>{values}</td></tr>")
    heads = [Head(label=label, kind=None) for label in ("what", "value")]
    return table("Software and machine, as the records state them", heads, rows, classes="text")


def problems_html(problems: Iterable[Problem]) -> str:
    """Return the files that could not be used, or a sentence that all could."""
    items = "".join(f"<li><code>{html.escape(p.path)}</code>: {html.escape(p.message)}</li>" for p in problems)
    return f"<ul>{items}</ul>" if items else "<p>None: every record found was read and its checksum is right.</p>"


def _plain(value: object) -> str:
    return "not recorded" if value is None else str(value)


def _unit_text(unit: str) -> str:
    return {"score": "0 to 1", "ppl": "perplexity", "fraction": "%", "ratio": "x full"}.get(unit, unit)


def _row(row: Row) -> str:
    cell = row.cell
    names = row_head(row.policy, "noisy times" if cell.status == "noisy" else "")
    names += text_cell(row.budget, sort=budget_size(cell))
    return f"<tr>{names}{''.join(_entry(entry) for entry in row.entries)}</tr>"


def _entry(entry: Entry) -> str:
    title = f"n = {entry.n}" if entry.n is not None else ""
    kind = entry.kind if entry.kind in ("failed", "noisy") else ""
    return number_cell(entry.text, entry.interval, value=entry.value, kind=kind, title=title)


_MARKS = {
    "better": "\u25b2",
    "worse": "\u25bc",
    "equivalent": "=",
    "undecided": "?",
    "noisy": "~",
    "not comparable": "\u2260",
    "not ranked": "\u2205",
    REFERENCE: "",
}
_NOTE = (
    "A difference is the policy minus the full cache, paired by sample; [low, high] is its 95 % interval. Detectable "
    "is the smallest true difference that this many samples show in four of five repetitions. Equivalent means that "
    "the whole interval lies inside the margin; undecided means that nothing is shown, not that two are equal."
)


def verdicts_html(rows: Sequence[CellRow]) -> str:
    """Return filters, table and how to read it; `rows` of all groups."""
    differing = _differing(rows)
    body = (_page_verdicts_row(row, differing) for row in rows)
    drawn = table("Verdicts against the full cache", _heads(rows), body, name="verdict-table")
    return f"<p class=quiet>{prose(_NOTE)}{_margin_text(rows)}</p>{filters_html(rows)}{drawn}"


def verdict_cell(one: Comparison | None, word: str) -> str:
    """Return a cell with mark and word, and below it what is missing or why."""
    if not word:
        return '<td class=missing data-v="">no quality</td>'
    remark = verdict_remark(one) if one else ""
    mark = _MARKS.get(word, "\u2715")
    small = f"<small>{numbers(remark)}</small>" if remark else ""
    kind = f"name verdict v-{word.replace(' ', '-')}" if word in _MARKS else "name failed"
    return (
        f'<td class="{kind}" data-v="{escaped(word)}"><span aria-hidden=true>{mark}</span> {escaped(word)}{small}</td>'
    )


def _margin_text(rows: Sequence[CellRow]) -> str:
    margins = dict.fromkeys(
        (measure(one.measure).label, size_text(one.measure, one.margin), difference_unit(one.measure)[0])
        for row in rows
        for one in (row.comparison, *(time.comparison for time in row.times))
        if one is not None and one.margin is not None
    )
    texts = (f"{label} {size}{f' {unit}' if unit else ''}" for label, size, unit in margins)
    joined = ", ".join(texts)
    return prose(f" Margins: {joined}.") if joined else ""


def _differing(rows: Sequence[CellRow]) -> tuple[str, ...]:
    """Return which of model, data set and measure have to be said in every row."""
    return tuple(name for name in ("model", "dataset", "measure") if len({getattr(row, name) for row in rows}) > 1)


def _heads(rows: Sequence[CellRow]) -> list[Head]:
    names = sorted({row.measure for row in rows if row.measure})
    label = measure(names[0]).label if len(names) == 1 else "quality"
    way = f"{measure(names[0]).better} is better" if len(names) == 1 else "measure below"
    words = {"model": "model", "dataset": "data set"}
    place = [Head(label=words[name], kind="text") for name in _differing(rows) if name in words]
    return [
        Head(label="policy", kind="text"),
        Head(label="budget", kind="amount"),
        *place,
        Head(label="verdict", note="against full", kind="text"),
        Head(label=label, note=way, group="quality"),
        Head(label="difference", note="to full", group="quality"),
        Head(label="detectable", note="with these samples", group="quality"),
        Head(label="collapses", note="samples", group="quality"),
        Head(label="TPOT", note="ms per token", group="time, and ratio to full"),
        Head(label="TPOT / full", note="under 1 is faster", group="time, and ratio to full"),
        Head(label="TTFT", note="ms", group="time, and ratio to full"),
        Head(label="TTFT / full", note="under 1 is faster", group="time, and ratio to full"),
        Head(label="stored", note="bytes", group="KV cache"),
        Head(label="of full", note="stored", group="KV cache"),
    ]


def _page_verdicts_row(row: CellRow, differing: tuple[str, ...]) -> str:
    cell = row.cell
    keys = {
        "model": row.model,
        "dataset": row.dataset,
        "policy": cell.policy,
        "budget": cell.budget,
        "verdict": row.verdict or "no quality",
        "status": cell.status,
    }
    data = "".join(f' data-{name}="{escaped(value)}"' for name, value in keys.items())
    return f"<tr{data}>{''.join(_cells(row, differing))}</tr>"


def _cells(row: CellRow, differing: tuple[str, ...]) -> Iterator[str]:
    cell = row.cell
    yield row_head(row.policy, "noisy times" if cell.status == "noisy" else cell.folder)
    yield text_cell("everything" if cell.is_full and cell.budget == "-" else cell.budget, sort=budget_size(cell))
    yield from (text_cell(text) for name, text in (("model", row.model), ("dataset", row.dataset)) if name in differing)
    yield verdict_cell(row.comparison, row.verdict)
    yield _quality(row, "measure" in differing)
    yield _difference(row.comparison)
    one = row.comparison
    detectable = one.minimum_detectable if one else None
    yield _number(size_text(one.measure, detectable) if one else "", detectable)
    collapsed = "" if row.num_collapsed is None else f"{row.num_collapsed} of {row.num_paired}"
    yield _number(collapsed, row.num_collapsed)
    for name, time in zip(("tpot", "ttft"), row.times, strict=True):
        yield from _time(name, time, timing_noise(cell, f"{name}_ms"))
    yield _number(
        "" if row.stored_bytes is None else format_value("kv_stored_bytes", row.stored_bytes), row.stored_bytes
    )
    yield _number("" if row.stored_share is None else f"{row.stored_share:.2f}x", row.stored_share)


def _quality(row: CellRow, named: bool) -> str:
    found = row.quality
    if found is None or row.measure is None:
        return _number("", None)
    label = f"{measure(row.measure).label}" if named else ""
    below = f"{label}\n" if label else ""
    below += format_interval(row.measure, found.value, found.low, found.high)
    return _number(format_value(row.measure, found.value), found.value, below, n=found.n)


def _difference(one: Comparison | None) -> str:
    if one is None:
        return _number("", None)
    unit = difference_unit(one.measure)[0]
    beside = "" if one.t_low is None or one.t_high is None else f"; t interval {_t_interval(one)}"
    title = f"{one.method}, n = {one.num_samples}{beside}"
    below = "\n".join(part for part in (difference_interval(one), unit) if part)
    return number_cell(difference_value(one), below, value=one.value, title=title)


def _t_interval(one: Comparison) -> str:
    _, factor, places = difference_unit(one.measure)
    assert one.t_low is not None
    assert one.t_high is not None
    return f"[{one.t_low / factor:+.{places}f}, {one.t_high / factor:+.{places}f}]"


def _time(name: str, time: Time, noise: str) -> Iterator[str]:
    yield _estimate(f"{name}_ms", time.own, noise=noise)
    yield _estimate(f"{name}_ratio_to_full", time.ratio, _word(time.comparison), noise=noise)


def _word(one: Comparison | None) -> str:
    if one is None or one.second.key == one.first.key:
        return ""
    return {"better": "faster", "worse": "slower"}.get(one.verdict, one.verdict)


def _estimate(name: str, found: Estimate | None, word: str = "", *, noise: str = "") -> str:
    if found is None:
        return _number("", None)
    interval = format_interval(name, found.value, found.low, found.high)
    below = "\n".join(part for part in (interval, word) if part)
    return _number(format_value(name, found.value), found.value, below, n=found.n, noise=noise)


def _number(text: str, value: float | None, below: str = "", *, n: int | None = None, noise: str = "") -> str:
    title = "; ".join(part for part in (noise, f"n = {n}" if n is not None else "") if part)
    return number_cell(text or "-", below, value=value, title=title, kind="noisy" if noise else "")


_FIRST, _STEP, _ROOF = "first token", "one decode step", "roof of the memory"
# (column, remark, measurement, group, measurement whose noise is in it)
_COLUMNS = (
    ("TTFT", "vision, prompt, cut", "ttft_ms", _FIRST, "ttft_ms"),
    ("settle", "policy's part of it", "settle_ms", _FIRST, "ttft_ms"),
    ("TPOT", "median step", "tpot_ms", _STEP, "tpot_ms"),
    ("p90", "slow steps", "tpot_p90_ms", _STEP, "tpot_ms"),
    ("policy", "naming victims, alone", "policy_ms", _STEP, "tpot_ms"),
    ("roof", "weights and entries read once", "roof_ms", _ROOF, ""),
    ("reached", "roof over TPOT", "roof_share_fraction", _ROOF, "tpot_ms"),
    ("throughput", "prompt included", "throughput_tokens_per_s", "whole launch", "throughput_tokens_per_s"),
)
_OVERHEAD_SHARE = 0.5
_PAGE_LATENCY_NOTE = (
    "Medians of timed launches, interleaved with the full cache in one process; [low, high] is the 95 % interval over "
    "launches. A step that reaches less than half of the roof is overhead-bound: most of it is neither weights nor "
    "entries, so its time says little about the size of the cache. On a CPU, whose caches may hold the weights, the "
    "roof is no bound. Grey numbers are noisy, and their box says why."
)


def latency_html(group: Group) -> str:
    """Return the table of a group, or "" where no cell was timed."""
    if not any(cell.estimate(name) for cell in group.cells for _, _, name, _, _ in _COLUMNS):
        return ""
    heads = [Head(label="policy", kind="text"), Head(label="budget", kind="amount")]
    heads += [Head(label=label, note=note, group=over) for label, note, _, over, _ in _COLUMNS]
    rows = (f"<tr>{''.join(_page_latency_cells(group, cell))}</tr>" for cell in group.cells if not cell.failed)
    return f"<p class=quiet>{_PAGE_LATENCY_NOTE}</p>" + table(f"Latency, {group.title}", heads, rows)


def _page_latency_cells(group: Group, cell: CellResult) -> Iterator[str]:
    noisy = [measure(name).label for name in ("ttft_ms", "tpot_ms") if timing_noise(cell, name)]
    yield row_head(group.series_label(cell), f"noisy: {' and '.join(noisy)}" if noisy else "")
    yield text_cell("everything" if cell.is_full and cell.budget == "-" else cell.budget, sort=budget_size(cell))
    for _, _, name, _, timed in _COLUMNS:
        found, noise = cell.estimate(name), timing_noise(cell, timed) if timed else ""
        if found is None:
            yield not_measured()
            continue
        below = format_interval(name, found.value, found.low, found.high)
        if name == "roof_share_fraction" and found.value < _OVERHEAD_SHARE:
            below = f"{below}\noverhead-bound".strip()
        title = "; ".join(part for part in (noise, f"n = {found.n}" if found.n is not None else "") if part)
        kind = "noisy" if noise else ""
        yield number_cell(format_value(name, found.value), below, value=found.value, kind=kind, title=title)


_PARTS, _KV, _PEAKS = "what is in memory", "KV cache", "peak of everything alive, by phase"
# (column, remark, measurement, group)
_PAGE_MEMORY_COLUMNS = (
    ("weights", "and buffers", "peak_load_bytes", _PARTS),
    ("activations", "model without cache", "plain_activation_bytes", _PARTS),
    ("statistics", "of attention, held at the end", "statistics_bytes", _PARTS),
    ("bookkeeping", "positions, ranks, lengths", "bookkeeping_bytes", _PARTS),
    ("nominal", "what the budget says", "kv_theoretical_bytes", _KV),
    ("in use", "valid entries", "kv_valid_bytes", _KV),
    ("stored", "from storages", "kv_stored_bytes", _KV),
    ("vision", "", "peak_vision_bytes", _PEAKS),
    ("prefill", "", "peak_prefill_bytes", _PEAKS),
    ("settle", "policy on the prompt", "peak_settle_bytes", _PEAKS),
    ("decode", "", "peak_decode_bytes", _PEAKS),
    ("whole", "largest of all", "peak_memory_bytes", _PEAKS),
    ("reserved", "by the allocator", "peak_reserved_bytes", _PEAKS),
)
_LAST = (
    ("peak / bound", "1 holds no more than it must", "peak_over_bound_ratio"),
    ("RSS", "process", "peak_rss_bytes"),
)
_PAGE_MEMORY_NOTE = (
    "Peaks hold everything alive in that phase, weights and inputs too, so they can not be added up. Eviction after "
    "the prompt lowers the peak of decode, not that of prefill. Every number was observed once and has no interval."
)


def memory_html(group: Group) -> str:
    """Return the table of a group, or "" where no cell has a number of the memory pass."""
    names = [name for _, _, name, _ in _PAGE_MEMORY_COLUMNS] + [name for _, _, name in _LAST]
    if not any(cell.estimate(name) for cell in group.cells for name in names if name in cell.measurements):
        return ""
    heads = [Head(label="policy", kind="text"), Head(label="budget", kind="amount")]
    heads += [Head(label=label, note=note, group=over) for label, note, _, over in _PAGE_MEMORY_COLUMNS]
    heads += [Head(label=label, note=note) for label, note, _ in _LAST]
    rows = (f"<tr>{''.join(_page_memory_row(group, cell, names))}</tr>" for cell in group.cells if not cell.failed)
    return f"<p class=quiet>{_PAGE_MEMORY_NOTE}</p>" + table(f"Memory by phase, {group.title}", heads, rows)


def _page_memory_row(group: Group, cell: CellResult, names: list[str]) -> Iterator[str]:
    yield row_head(group.series_label(cell))
    yield text_cell("everything" if cell.is_full and cell.budget == "-" else cell.budget, sort=budget_size(cell))
    for name in names:
        found = cell.estimate(name)
        yield not_measured() if found is None else number_cell(format_value(name, found.value), value=found.value)
