"""The page's answer: which policy to take at each budget, how sure that is, what it costs, and where it fails.

Every word comes from a verdict; where samples do not decide, the answer names all that may be the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvbench.report.cell import CellResult
from kvbench.report.collapses import losses_of
from kvbench.report.comparisons import Comparison
from kvbench.report.difference_text import difference_text, verdict_remark
from kvbench.report.judged import Judged, is_better
from kvbench.report.page_markup import escaped, prose
from kvbench.report.page_sample_links import sample_link
from kvbench.report.standing import (
    Standing,
    asked_budget,
    budgets_in,
    safe_cells,
    standing_at,
    telling_quality,
)
from kvbench.units import format_value, format_with_interval, measure

_MOST_NAMES = 3
_BUDGET_KINDS = (
    ("of seen", "`of seen` is a share of all tokens seen so far"),
    ("of prompt", "`of prompt` is a share of the prompt"),
    ("tokens", "`tokens` is a fixed number"),
)
_MOST_OPEN = 6
_RATIOS = (("tpot_ms", "tpot_ratio_to_full", "per output token"), ("ttft_ms", "ttft_ratio_to_full", "to first token"))


def answer_html(judged: Judged) -> str:
    """Return the sentences and a block per budget."""
    lines = "".join(f"<p class=answer>{prose(line)}</p>" for line in answer_sentences(judged))
    blocks = [_block(judged, cells) for cells in budgets_in(judged).values()]
    drawn = f"<div class=answers>{''.join(blocks)}</div>"
    if len(blocks) > _MOST_OPEN:
        drawn = f"<details><summary>All {len(blocks)} budgets</summary>{drawn}</details>"
    return lines + _explained(judged) + (drawn if blocks else "")


def answer_sentences(judged: Judged) -> list[str]:
    """Return one or two sentences: what to take at the budget asked for, and what is shown to keep full's quality."""
    budget = asked_budget(judged)
    if judged.primary is None or budget is None:
        return ["No cell with a budget has a quality measurement yet, so no policy can be recommended."]
    cells = budgets_in(judged)[budget]
    standing = standing_at(judged, cells, telling_quality(judged, cells) or judged.primary)
    if standing is None:
        return [f"At {budget} no cell ended well enough to be ranked, so no policy can be recommended there."]
    contrary = [line for line, clear in _other_measures(judged, standing) if clear]
    but = f" But in {'; in '.join(contrary)}." if contrary else ""
    return [f"{_choice(judged, standing)} {_distance(judged, standing)}{but}", _safety(judged)]


def _explained(judged: Judged) -> str:
    """Say what the measure and the budgets are, for who sees the page first."""
    if judged.primary is None:
        return ""
    known = measure(judged.primary)
    kinds = [text for end, text in _BUDGET_KINDS if any(cell.budget.endswith(end) for cell in judged.group.budgeted)]
    budgets = f" Budgets count cache entries per layer and KV head: {'; '.join(kinds)}." if kinds else ""
    return f"<p class=quiet>{prose(f'{known.label}: {known.definition}{budgets}')}</p>"


def _choice(judged: Judged, standing: Standing) -> str:
    label, first = measure(standing.measure).label, standing.first
    name, value = judged.group.series_label(first), _value(first, standing.measure)
    if len(standing.ranked) == 1:
        return f"At {standing.budget} only `{name}` can be judged: {label} {value}."
    if not standing.rivals:
        count = len(standing.beaten)
        others = f"each of the {count} other policies" if count > 1 else "the other policy"
        return f"At {standing.budget} take `{name}`: {label} {value}, better than {others}."
    rivals = _names(judged, [cell for cell, _ in standing.rivals])
    return (
        f"At {standing.budget} the samples do not decide between `{name}` (best {label} so far, {value}) and {rivals}."
    )


def _distance(judged: Judged, standing: Standing) -> str:
    found = judged.against_full(standing.first, standing.measure)
    if found is None:
        return "Its distance to the full cache was not measured."
    words = {
        "worse": "It is worse than the full cache",
        "better": "It is better than the full cache",
        "equivalent": "It is equivalent to the full cache",
        "undecided": "Whether it keeps the full cache's quality is undecided",
    }
    if found.verdict not in words:
        return f"It can not be compared with the full cache ({found.reason or found.verdict})."
    remark = verdict_remark(found)
    more = f"; {remark}" if remark else ""
    return f"{words[found.verdict]} ({difference_text(found)}{more})."


def _safety(judged: Judged) -> str:
    assert judged.primary is not None
    label = measure(judged.primary).label
    if judged.group.full is None:
        return "Without a usable cell of the full cache no policy can be shown to keep its quality."
    safe = safe_cells(judged)
    if not safe:
        open_cells = [
            cell
            for cell in judged.group.budgeted
            if (found := judged.against_full(cell, judged.primary)) and found.verdict == "undecided"
        ]
        undecided = f"; undecided: {_names(judged, open_cells, with_budget=True)}" if open_cells else ""
        return f"No policy is shown to keep the full cache's {label} at any budget measured{undecided}."
    smallest = [cell for cell in safe if cell.budget == safe[0].budget]
    return (
        f"Smallest budget measured at which the full cache's {label} is shown to be kept: {safe[0].budget}, with "
        + (f"{_names(judged, smallest)}.")
    )


def _names(judged: Judged, cells: Sequence[CellResult], *, with_budget: bool = False) -> str:
    named = [f"`{judged.group.series_label(cell)}`" + (f" at {cell.budget}" if with_budget else "") for cell in cells]
    more = f" and {len(named) - _MOST_NAMES} more" if len(named) > _MOST_NAMES else ""
    shown = named[:_MOST_NAMES]
    if more or len(shown) == 1:
        return ", ".join(shown) + more
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _block(judged: Judged, cells: list[CellResult]) -> str:
    standing = standing_at(judged, cells, telling_quality(judged, cells) or "ppl") if judged.primary else None
    budget = escaped(cells[0].budget)
    if standing is None:
        statuses = ", ".join(sorted({cell.status for cell in cells}))
        return f"<div><h3>{budget}</h3><p>Nothing can be ranked here ({escaped(statuses)}).</p></div>"
    rows = "".join(
        f"<div><dt>{prose(name)}</dt><dd>{'<br>'.join(lines)}</dd></div>"
        for name, lines in _answers(judged, standing)
        if lines
    )
    return f"<div><h3>{budget}: {_take(judged, standing)}</h3><dl>{rows}</dl></div>"


def _take(judged: Judged, standing: Standing) -> str:
    ahead = [standing.first, *(cell for cell, _ in standing.rivals)]
    name = prose(f"`{judged.group.series_label(standing.first)}`")
    return f"take {name}" if len(ahead) == 1 else f"{name} or {prose(_names(judged, ahead[1:]))}"


def _answers(judged: Judged, standing: Standing) -> Iterator[tuple[str, list[str]]]:
    yield "How sure", [prose(line) for line in _sure(judged, standing)]
    yield "Quality", [prose(line) for line in _quality(judged, standing)]
    yield "Other measures", [prose(line) for line, _ in _other_measures(judged, standing)]
    yield "Time", [prose(line) for line in _time(judged, standing.first)]
    yield "Memory", [prose(line) for line in _memory(judged, standing.first)]
    yield "Fails on", list(_fails(judged, standing))


def _sure(judged: Judged, standing: Standing) -> Iterator[str]:
    label = measure(standing.measure).label
    if standing.beaten:
        yield f"Better in {label} than {_names(judged, standing.beaten)}{_evidence(judged, standing)}."
    for cell, found in standing.rivals[:_MOST_NAMES]:
        yield f"Against `{judged.group.series_label(cell)}`: {_rival_text(found)}."
    if len(standing.rivals) > _MOST_NAMES:
        yield f"The same holds against {len(standing.rivals) - _MOST_NAMES} more; see Verdicts."
    if len(standing.ranked) == 1:
        yield "Nothing to compare it with at this budget."
    if standing.left_out:
        names = ", ".join(f"`{judged.group.series_label(cell)}` ({cell.status})" for cell in standing.left_out)
        yield f"Not ranked: {names}."


def _evidence(judged: Judged, standing: Standing) -> str:
    """Return the samples behind the claim and the largest p value among the corrected ones."""
    found = [one for cell in standing.beaten if (one := judged.between(standing.first, cell, standing.measure))]
    p_values = [one.p_holm for one in found if one.p_holm is not None]
    if not p_values:
        return ""
    num = min(one.num_samples for one in found)
    p_text = "p < 0.001" if max(p_values) < 0.001 else f"p up to {max(p_values):.3f}"
    return f" (paired over {num} samples, {p_text} after Holm's correction)"


def _rival_text(found: Comparison | None) -> str:
    if found is None:
        return "not compared"
    remark = verdict_remark(found)
    return f"{found.verdict}, {difference_text(found)}{f' ({remark})' if remark else ''}"


def _quality(judged: Judged, standing: Standing) -> Iterator[str]:
    yield f"{measure(standing.measure).label} {_value(standing.first, standing.measure)}"
    found = judged.against_full(standing.first, standing.measure)
    if found is not None:
        yield f"against full {difference_text(found)}: {found.verdict}"


def _other_measures(judged: Judged, standing: Standing) -> Iterator[tuple[str, bool]]:
    """Yield the measures in which another policy has the best value, in words, and whether that is clear."""
    for name in judged.qualities:
        if name == standing.measure:
            continue
        other = standing_at(judged, list(standing.ranked), name)
        if other is None or len(other.ranked) < 2:
            continue
        mine, best = standing.first.estimate(name), other.first.estimate(name)
        if mine is None or best is None or not is_better(name, best.value, mine.value):
            continue
        found = judged.between(other.first, standing.first, name)
        clear = found is not None and found.verdict == "better"
        words = "is better" if clear else f"has the better value, {found.verdict if found else 'not compared'}"
        values = f"{format_value(name, best.value)} against {format_value(name, mine.value)}"
        yield f"{measure(name).label} `{judged.group.series_label(other.first)}` {words} ({values})", clear


def _time(judged: Judged, cell: CellResult) -> Iterator[str]:
    for name, ratio_name, words in _RATIOS:
        own, ratio = cell.estimate(name), cell.estimate(ratio_name)
        if own is None and ratio is None:
            continue
        found = judged.against_full(cell, ratio_name)
        shown = format_with_interval(ratio_name, ratio.value, ratio.low, ratio.high) if ratio else ""
        verdict = {"better": "faster", "worse": "slower"}.get(found.verdict, found.verdict) if found else "no verdict"
        against = f", {shown} of full: {verdict}" if shown else ""
        yield f"{format_value(name, own.value) if own else '-'} {words}{against}"


def _memory(judged: Judged, cell: CellResult) -> Iterator[str]:
    own = cell.estimate("kv_stored_bytes")
    full = judged.group.full.estimate("kv_stored_bytes") if judged.group.full else None
    if own is None:
        return
    share = f", {own.value / full.value:.2f}x of full's {format_value('kv_stored_bytes', full.value)}" if full else ""
    yield f"{format_value('kv_stored_bytes', own.value)} of KV cache per prompt{share}"
    peak = cell.estimate("peak_memory_bytes")
    before = judged.group.full.estimate("peak_memory_bytes") if judged.group.full else None
    if peak and before:
        sign = "+" if peak.value >= before.value else "-"
        change = format_value("kv_stored_bytes", abs(peak.value - before.value))
        yield f"peak of all memory {format_value('peak_memory_bytes', peak.value)}, {sign}{change} against full"


def _fails(judged: Judged, standing: Standing) -> Iterator[str]:
    losses = losses_of(judged.group, standing.first, standing.measure)
    if not losses:
        return
    collapsed = [loss for loss in losses if loss.collapsed]
    links = ", ".join(sample_link(judged.group, standing.first, loss.sample) for loss in losses[:_MOST_NAMES])
    yield prose(f"collapses on {len(collapsed)} of {len(losses)} samples; most is lost on ") + links


def _value(cell: CellResult, name: str) -> str:
    found = cell.estimate(name)
    return format_with_interval(name, found.value, found.low, found.high) if found else "-"
