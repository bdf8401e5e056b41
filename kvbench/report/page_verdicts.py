"""The page's verdict table: one for all models and data sets, which can be sorted and filtered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvbench.measures import format_interval, format_value, measure
from kvbench.report.cell import Estimate
from kvbench.report.cell_rows import REFERENCE, CellRow, Time
from kvbench.report.compare_latency import timing_noise
from kvbench.report.comparison import Comparison
from kvbench.report.difference_text import (
    difference_interval,
    difference_unit,
    difference_value,
    size_text,
    verdict_remark,
)
from kvbench.report.page_filters import budget_size, filters_html
from kvbench.report.page_markup import Head, escaped, number_cell, numbers, prose, row_head, table, text_cell

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
    body = (_row(row, differing) for row in rows)
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


def _row(row: CellRow, differing: tuple[str, ...]) -> str:
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
