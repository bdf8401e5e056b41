"""The page's answer: which policy to take at each budget, how sure that is, what it costs, and where it fails.

Every word comes from a verdict; where samples do not decide, the answer names all that may be the best.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.measures import format_value, format_with_interval, measure
from kvbench.report.answer_words import MOST_NAMES, answer_sentences, is_apart, names, other_measures, value_text
from kvbench.report.cell import CellResult
from kvbench.report.collapses import losses_of
from kvbench.report.comparison import Comparison
from kvbench.report.difference_text import difference_text, verdict_remark
from kvbench.report.judged import MOST_PAIRS, Judged
from kvbench.report.page_markup import escaped, prose
from kvbench.report.page_sample_links import sample_link
from kvbench.report.standing import (
    Standing,
    standing_at,
    telling_quality,
)

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
    if judged.ability.sentence:
        return lines + _explained(judged)
    blocks = [_block(judged, cells) for cells in judged.group.by_budget.values()]
    drawn = f"<div class=answers>{''.join(blocks)}</div>"
    if len(blocks) > _MOST_OPEN:
        drawn = f"<details><summary>All {len(blocks)} budgets</summary>{drawn}</details>"
    return lines + _explained(judged) + (drawn if blocks else "")


def _explained(judged: Judged) -> str:
    """Say what the measure and the budgets are, for who sees the page first."""
    if judged.primary is None:
        return ""
    known = measure(judged.primary)
    kinds = [text for end, text in _BUDGET_KINDS if any(cell.budget.endswith(end) for cell in judged.group.budgeted)]
    budgets = f" Budgets count cache entries per layer and KV head: {'; '.join(kinds)}." if kinds else ""
    return f"<p class=quiet>{prose(f'{known.label}: {known.definition}{budgets}')}</p>"


def _block(judged: Judged, cells: list[CellResult]) -> str:
    standing = standing_at(judged, cells, telling_quality(judged, cells) or "ppl") if judged.primary else None
    budget = escaped(cells[0].budget)
    if standing is None:
        withheld = judged.ability.reason(judged.primary) if judged.primary else ""
        statuses = withheld or ", ".join(sorted({cell.status for cell in cells}))
        return f"<div><h3>{budget}</h3><p>Nothing can be ranked here ({escaped(statuses)}).</p></div>"
    rows = "".join(
        f"<div><dt>{prose(name)}</dt><dd>{'<br>'.join(lines)}</dd></div>"
        for name, lines in _answers(judged, standing)
        if lines
    )
    return f"<div><h3>{budget}: {_take(judged, standing)}</h3><dl>{rows}</dl></div>"


def _take(judged: Judged, standing: Standing) -> str:
    rivals = [cell for cell, found in standing.rivals if not is_apart(found)]
    first = prose(f"`{judged.group.series_label(standing.first)}`")
    if rivals:
        return f"{first} or {prose(names(judged, rivals))}"
    return f"take {first}" if standing.beaten or not standing.rivals else f"{first}, compared with none"


def _answers(judged: Judged, standing: Standing) -> Iterator[tuple[str, list[str]]]:
    yield "How sure", [prose(line) for line in _sure(judged, standing)]
    yield "Quality", [prose(line) for line in _quality(judged, standing)]
    yield "Other measures", [prose(line) for line, _ in other_measures(judged, standing)]
    yield "Time", [prose(line) for line in _time(judged, standing.first)]
    yield "Memory", [prose(line) for line in _memory(judged, standing.first)]
    yield "Fails on", list(_fails(judged, standing))


def _sure(judged: Judged, standing: Standing) -> Iterator[str]:
    label = measure(standing.measure).label
    if standing.beaten:
        yield f"Better in {label} than {names(judged, standing.beaten)}{_evidence(judged, standing)}."
    for cell, found in standing.rivals[:MOST_NAMES]:
        yield f"Against `{judged.group.series_label(cell)}`: {_rival_text(found)}."
    if len(standing.rivals) > MOST_NAMES:
        yield f"{len(standing.rivals) - MOST_NAMES} more are not beaten either."
    if len(standing.ranked) == 1:
        yield "Nothing to compare it with at this budget."
    if standing.left_out:
        cells = ", ".join(f"`{judged.group.series_label(cell)}` ({cell.status})" for cell in standing.left_out)
        yield f"Not ranked: {cells}."


def _evidence(judged: Judged, standing: Standing) -> str:
    """Return the samples behind the claim and the largest p value among the corrected ones."""
    found = [one for cell in standing.beaten if (one := judged.between(standing.first, cell, standing.measure))]
    p_values = [one.p_holm for one in found if one.p_holm is not None]
    if not p_values:
        return ""
    num = min(one.num_samples for one in found)
    p_text = "p < 0.001" if max(p_values) < 0.001 else f"p up to {max(p_values):.3f}"
    who = "Holm" if judged.num_pairs <= MOST_PAIRS else "Bonferroni"
    return f" (paired over {num} samples, {p_text} after {who}'s correction)"


def _rival_text(found: Comparison | None) -> str:
    if found is None:
        return "not compared"
    remark = verdict_remark(found)
    return f"{found.verdict}, {difference_text(found)}{f' ({remark})' if remark else ''}"


def _quality(judged: Judged, standing: Standing) -> Iterator[str]:
    yield f"{measure(standing.measure).label} {value_text(standing.first, standing.measure)}"
    found = judged.against_full(standing.first, standing.measure)
    if found is not None:
        yield f"against full {difference_text(found)}: {found.verdict}"


def _time(judged: Judged, cell: CellResult) -> Iterator[str]:
    for name, ratio_name, words in _RATIOS:
        own, ratio = cell.estimate(name), cell.estimate(ratio_name)
        if own is None and ratio is None:
            continue
        found = judged.against_full(cell, ratio_name)
        shown = format_with_interval(ratio_name, ratio.value, ratio.low, ratio.high) if ratio else ""
        verdict = {"better": "faster", "worse": "slower"}.get(found.verdict, found.verdict) if found else "no verdict"
        reason = f" ({found.reason})" if found and found.verdict == "noisy" and found.reason else ""
        against = f", {shown} of full: {verdict}{reason}" if shown else ""
        yield f"{format_value(name, own.value) if own else '-'} {words}{against}"


def _memory(judged: Judged, cell: CellResult) -> Iterator[str]:
    own = cell.estimate("kv_stored_bytes")
    full = judged.group.full.estimate("kv_stored_bytes") if judged.group.full else None
    if own is None:
        return
    share = f", {own.value / full.value:.2f}x of full's {format_value('kv_stored_bytes', full.value)}" if full else ""
    yield f"{format_value('kv_stored_bytes', own.value)} of KV cache stored{share}"
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
    links = ", ".join(sample_link(judged.group, standing.first, loss.sample) for loss in losses[:MOST_NAMES])
    yield prose(f"collapses on {len(collapsed)} of {len(losses)} samples; most is lost on ") + links
