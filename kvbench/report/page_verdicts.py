"""The page's verdict table: one for all models and data sets, which can be sorted and filtered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvbench.report.cell import CellResult, Estimate
from kvbench.report.comparisons import Comparison
from kvbench.report.difference_text import (
    difference_interval,
    difference_unit,
    difference_value,
    size_text,
    verdict_remark,
)
from kvbench.report.page_markup import Head, escaped, number_cell, numbers, prose, row_head, table, text_cell
from kvbench.report.verdict_rows import REFERENCE, Time, VerdictRow
from kvbench.units import format_interval, format_value, measure

_MARKS = {
    "better": "\u25b2",
    "worse": "\u25bc",
    "equivalent": "=",
    "undecided": "?",
    "noisy": "~",
    "not comparable": "\u2260",
    REFERENCE: "",
}
_FILTERS = (
    ("model", "Model"),
    ("dataset", "Data set"),
    ("policy", "Policy"),
    ("budget", "Budget"),
    ("verdict", "Verdict"),
    ("status", "Status"),
)
_NOTE = (
    "A difference is the policy minus the full cache, paired by sample; [low, high] is its 95 % interval. Detectable "
    "is the smallest true difference that this many samples show in four of five repetitions. Equivalent means that "
    "the whole interval lies inside the margin; undecided means that nothing is shown, not that two are equal."
)


def verdicts_html(rows: Sequence[VerdictRow]) -> str:
    """Return filters, table and how to read it; `rows` of all groups."""
    several = len({(row.model, row.dataset) for row in rows}) > 1
    body = (_row(index, row, several) for index, row in enumerate(rows))
    drawn = table("Verdicts against the full cache", _heads(rows, several), body, name="verdict-table")
    return f"<p class=quiet>{prose(_NOTE)}{_margin_text(rows)}</p>{_filters(rows)}{drawn}"


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


def budget_size(cell: CellResult) -> float:
    """Return what budgets sort by; the full cache keeps everything, so it stands above every budget."""
    size = cell.budget_fraction if cell.budget_fraction is not None else cell.budget_tokens
    return 1e18 if cell.is_full or size is None else float(size)


def _margin_text(rows: Sequence[VerdictRow]) -> str:
    margins = dict.fromkeys(
        (measure(one.measure).label, size_text(one.measure, one.margin), difference_unit(one.measure)[0])
        for row in rows
        for one in (row.comparison, *(time.comparison for time in row.times))
        if one is not None and one.margin is not None
    )
    texts = (f"{label} {size}{f' {unit}' if unit else ''}" for label, size, unit in margins)
    joined = ", ".join(texts)
    return prose(f" Margins: {joined}.") if joined else ""


def _heads(rows: Sequence[VerdictRow], several: bool) -> list[Head]:
    names = sorted({row.measure for row in rows if row.measure})
    label = measure(names[0]).label if len(names) == 1 else "quality"
    way = f"{measure(names[0]).better} is better" if len(names) == 1 else "measure below"
    place = [Head(label="model", kind="text"), Head(label="data set", kind="text")] if several else []
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


def _row(index: int, row: VerdictRow, several: bool) -> str:
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
    noisy = ' class="noisy"' if cell.status == "noisy" else ""
    return f"<tr{noisy}{data}>{''.join(_cells(row, several))}</tr>"


def _cells(row: VerdictRow, several: bool) -> Iterator[str]:
    cell = row.cell
    yield row_head(row.policy, "noisy, not ranked" if cell.status == "noisy" else cell.folder)
    yield text_cell("everything" if cell.is_full and cell.budget == "-" else cell.budget, sort=budget_size(cell))
    if several:
        yield text_cell(row.model)
        yield text_cell(row.dataset)
    yield verdict_cell(row.comparison, row.verdict)
    yield _quality(row, several)
    yield _difference(row.comparison)
    one = row.comparison
    detectable = one.minimum_detectable if one else None
    yield _number(size_text(one.measure, detectable) if one else "", detectable)
    collapsed = "" if row.num_collapsed is None else f"{row.num_collapsed} of {row.num_paired}"
    yield _number(collapsed, row.num_collapsed)
    for name, time in zip(("tpot", "ttft"), row.times, strict=True):
        yield from _time(name, time)
    yield _number(
        "" if row.stored_bytes is None else format_value("kv_stored_bytes", row.stored_bytes), row.stored_bytes
    )
    yield _number("" if row.stored_share is None else f"{row.stored_share:.2f}x", row.stored_share)


def _quality(row: VerdictRow, several: bool) -> str:
    found = row.quality
    if found is None or row.measure is None:
        return _number("", None)
    label = f"{measure(row.measure).label}" if several else ""
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


def _time(name: str, time: Time) -> Iterator[str]:
    own, ratio = time.own, time.ratio
    yield _estimate(f"{name}_ms", own)
    yield _estimate(f"{name}_ratio_to_full", ratio, _word(time.comparison))


def _word(one: Comparison | None) -> str:
    if one is None or one.second.key == one.first.key:
        return ""
    return {"better": "faster", "worse": "slower"}.get(one.verdict, one.verdict)


def _estimate(name: str, found: Estimate | None, word: str = "") -> str:
    if found is None:
        return _number("", None)
    interval = format_interval(name, found.value, found.low, found.high)
    below = "\n".join(part for part in (interval, word) if part)
    return _number(format_value(name, found.value), found.value, below, n=found.n)


def _number(text: str, value: float | None, below: str = "", *, n: int | None = None) -> str:
    title = f"n = {n}" if n is not None else ""
    return number_cell(text or "-", below, value=value, title=title)


def _filters(rows: Sequence[VerdictRow]) -> str:
    selects = "".join(_select(name, label, _values(rows, name)) for name, label in _FILTERS)
    return (
        '<form id="filters" class=controls aria-label="Choose rows of the verdict table" hidden>'
        f'{selects}<label>Text<input type=search id="filter-text" autocomplete=off></label>'
        f'<button type=reset>Show all</button><output id="filter-count" aria-live=polite></output></form>'
    )


def _values(rows: Sequence[VerdictRow], name: str) -> list[str]:
    if name == "budget":
        ordered = sorted(rows, key=lambda row: (budget_size(row.cell), row.cell.budget))
        return list(dict.fromkeys(row.cell.budget for row in ordered))
    found: Iterable[str] = (
        {"verdict": row.verdict or "no quality", "model": row.model, "dataset": row.dataset}.get(name)
        or str(getattr(row.cell, name))
        for row in rows
    )
    return sorted(set(found))


def _select(name: str, label: str, values: list[str]) -> str:
    if len(values) < 2:
        return ""
    options = "".join(f'<option value="{escaped(value)}">{escaped(_shown(name, value))}</option>' for value in values)
    return f'<label>{label}<select data-field="{name}"><option value="" selected>all</option>{options}</select></label>'


def _shown(name: str, value: str) -> str:
    return "everything" if name == "budget" and value == "-" else value
