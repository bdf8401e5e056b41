"""The page's answer: which policy to take at each budget, how sure that is, what it costs, and where it fails.

Every word comes from a verdict; where samples do not decide, all that may be the best are named. Below that, the
samples that collapse under each policy at every budget, with links to the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from kvbench.measures import format_value, format_with_interval, measure
from kvbench.report.compare import Comparison, difference_text, difference_unit, size_text, verdict_remark
from kvbench.report.load import CellResult, is_better, natural_key
from kvbench.report.markup import Head, SampleLink, TableCell, TableView, listed, render, row_head
from kvbench.report.samples import sample_link, short_name
from kvbench.report.standing import (
    MOST_PAIRS,
    Judged,
    Loss,
    Standing,
    asked_budget,
    losses_of,
    rule_text,
    safe_cells,
    standing_at,
    telling_quality,
)
from kvbench.stats.tests import smallest_margin

MOST_NAMES = 3
_WORDS = {
    "worse": "It is worse than the full cache",
    "better": "It is better than the full cache",
    "equivalent": "It is equivalent to the full cache",
    "undecided": "Whether it keeps the full cache's quality is undecided",
}


def answer_sentences(judged: Judged) -> list[str]:
    """Return one or two sentences: what to take at the budget asked for, and what is shown to keep full's quality."""
    budget = asked_budget(judged)
    if judged.ability.sentence:
        return [judged.ability.sentence]
    if judged.primary is None or budget is None:
        return ["No cell with a budget has a quality measurement yet, so no policy can be recommended."]
    cells = judged.group.by_budget[budget]
    standing = standing_at(judged, cells, telling_quality(judged, cells) or judged.primary)
    if standing is None:
        return [f"At {budget} no cell ended well enough to be ranked, so no policy can be recommended there."]
    contrary = [line for line, clear in other_measures(judged, standing) if clear]
    but = f" But in {'; in '.join(contrary)}." if contrary else ""
    return [f"{_choice(judged, standing)} {_distance(judged, standing)}{but}", _safety(judged)]


def _choice(judged: Judged, standing: Standing) -> str:
    label, first = measure(standing.measure).label, standing.first
    name, value = judged.group.series_label(first), value_text(first, standing.measure)
    if len(standing.ranked) == 1:
        return f"At {standing.budget} only `{name}` can be judged: {label} {value}."
    if not standing.rivals:
        others = _others(judged, standing)
        return f"At {standing.budget} take `{name}`: {label} {value}, better than {others}."
    if apart := [pair for pair in standing.rivals if is_apart(pair[1])]:
        return _without_those_apart(judged, standing, apart)
    rivals = names(judged, [cell for cell, _ in standing.rivals])
    if all(found is not None and found.verdict == "equivalent" for _, found in standing.rivals):
        return f"At {standing.budget} take `{name}` ({label} {value}) or {rivals}: equivalent within the margin."
    return (
        f"At {standing.budget} the samples do not decide between `{name}` (best {label} so far, {value}) and {rivals}."
    )


def _others(judged: Judged, standing: Standing) -> str:
    """Return the beaten in words; by name where they are not all that there are."""
    count = len(standing.beaten)
    if sum(not cell.failed for cell in judged.group.by_budget[standing.budget]) > count + 1:
        return names(judged, standing.beaten)
    return f"each of the {count} other policies" if count > 1 else "the other policy"


def is_apart(found: Comparison | None) -> bool:
    """Tell whether two policies can not be compared, however many samples there are."""
    return found is None or found.verdict == "not comparable"


def _without_those_apart(
    judged: Judged, standing: Standing, apart: Sequence[tuple[CellResult, Comparison | None]]
) -> str:
    """Say who can not be compared with the first; what the samples decide is said of the others."""
    left = {cell.key for cell, _ in apart}
    others = replace(
        standing,
        ranked=tuple(cell for cell in standing.ranked if cell.key not in left),
        rivals=tuple((cell, found) for cell, found in standing.rivals if cell.key not in left),
    )
    reasons = ", ".join(dict.fromkeys(found.reason if found else "not scored alike" for _, found in apart))
    label, first = measure(standing.measure).label, standing.first
    name, value = judged.group.series_label(first), value_text(first, standing.measure)
    who = f"{names(judged, [cell for cell, _ in apart])} ({reasons})"
    if len(others.ranked) == 1:
        return f"At {standing.budget} `{name}` has the best {label} so far, {value}, but is not comparable with {who}."
    return f"{_choice(judged, others)} `{name}` is not comparable with {who}."


def _distance(judged: Judged, standing: Standing) -> str:
    found = judged.against_full(standing.first, standing.measure)
    if found is None:
        return "Its distance to the full cache was not measured."
    if found.verdict not in _WORDS:
        return f"It can not be compared with the full cache ({found.reason or found.verdict})."
    remark = verdict_remark(found)
    more = f"; {remark}" if remark else ""
    return f"{_WORDS[found.verdict]} ({difference_text(found)}{more})."


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
        undecided = f"; undecided: {names(judged, open_cells, with_budget=True)}" if open_cells else ""
        what = f"{label}{_margin_text(judged)}"
        return f"No policy is shown to keep the full cache's {what} at any budget measured{undecided}."
    smallest = [cell for cell in safe if cell.budget == safe[0].budget]
    return (
        f"Smallest budget measured at which the full cache's {label} is shown to be kept{_margin_text(judged)}: "
        f"{safe[0].budget}, with {names(judged, smallest)}."
    )


def _margin_text(judged: Judged) -> str:
    """Return " (margin 0.020)", and that it was chosen where it is not the declared one."""
    assert judged.primary is not None
    margin = smallest_margin(judged.primary, judged.choices.margins)
    if margin is None:
        return ""
    unit = difference_unit(judged.primary)[0]
    size = f"margin {size_text(judged.primary, margin)}{f' {unit}' if unit else ''}"
    declared = smallest_margin(judged.primary)
    other = "" if margin == declared else f", chosen for this page; declared: {size_text(judged.primary, declared)}"
    return f" ({size}{other})"


def names(judged: Judged, cells: Sequence[CellResult], *, with_budget: bool = False) -> str:
    """Return the first few cells by name, and how many more there are."""
    named = [f"`{judged.group.series_label(cell)}`" + (f" at {cell.budget}" if with_budget else "") for cell in cells]
    more = f" and {len(named) - MOST_NAMES} more" if len(named) > MOST_NAMES else ""
    return ", ".join(named[:MOST_NAMES]) + more if more else listed(named)


def other_measures(judged: Judged, standing: Standing) -> Iterator[tuple[str, bool]]:
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


def value_text(cell: CellResult, name: str) -> str:
    """Return the cell's value with its interval."""
    found = cell.estimate(name)
    return format_with_interval(name, found.value, found.low, found.high) if found else "-"


_BUDGET_KINDS = (
    ("of seen", "`of seen` is a share of all tokens seen so far"),
    ("of prompt", "`of prompt` is a share of the prompt"),
    ("tokens", "`tokens` is a fixed number"),
)
_MOST_OPEN = 6
_RATIOS = (("tpot_ms", "tpot_ratio_to_full", "per output token"), ("ttft_ms", "ttft_ratio_to_full", "to first token"))


def answer_html(judged: Judged) -> Markup:
    """Return the sentences and a block per budget."""
    cannot = bool(judged.ability.sentence)
    blocks = [] if cannot else [_block(judged, cells) for cells in judged.group.by_budget.values()]
    return render(
        "answer.html.j2",
        sentences=answer_sentences(judged),
        explained=_explained(judged),
        blocks=blocks,
        most_open=_MOST_OPEN,
    )


def _explained(judged: Judged) -> str:
    """Say what the measure and the budgets are, for who sees the page first."""
    if judged.primary is None:
        return ""
    known = measure(judged.primary)
    kinds = [text for end, text in _BUDGET_KINDS if any(cell.budget.endswith(end) for cell in judged.group.budgeted)]
    budgets = f" Budgets count cache entries per layer and KV head: {'; '.join(kinds)}." if kinds else ""
    return f"{known.label}: {known.definition}{budgets}"


def _block(judged: Judged, cells: list[CellResult]) -> Mapping[str, object]:
    """Return a budget with what to take there and why, or with the reason that nothing can be ranked."""
    standing = standing_at(judged, cells, telling_quality(judged, cells) or "ppl") if judged.primary else None
    if standing is None:
        withheld = judged.ability.reason(judged.primary) if judged.primary else ""
        statuses = withheld or ", ".join(sorted({cell.status for cell in cells}))
        return {"budget": cells[0].budget, "nothing": statuses}
    group, first = judged.group, standing.first
    losses = losses_of(group, first, standing.measure)
    fails = f"collapses on {sum(loss.collapsed for loss in losses)} of {len(losses)} samples; most is lost on "
    answers: list[tuple[str, Sequence[str], Sequence[SampleLink]]] = [
        ("How sure", list(_sure(judged, standing)), ()),
        ("Quality", list(_quality(judged, standing)), ()),
        ("Other measures", [line for line, _ in other_measures(judged, standing)], ()),
        ("Time", list(_time(judged, first)), ()),
        ("Memory", list(_memory(judged, first)), ()),
        ("Fails on", [fails] if losses else [], [sample_link(group, first, one.sample) for one in losses[:MOST_NAMES]]),
    ]
    return {"budget": cells[0].budget, "nothing": "", "take": _take(judged, standing), "answers": answers}


def _take(judged: Judged, standing: Standing) -> str:
    rivals = [cell for cell, found in standing.rivals if not is_apart(found)]
    first = f"`{judged.group.series_label(standing.first)}`"
    if rivals:
        return f"{first} or {names(judged, rivals)}"
    return f"take {first}" if standing.beaten or not standing.rivals else f"{first}, compared with none"


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


_MOST_ROWS = 32
_MOST_ROWS_OF_MANY, _MANY_CELLS = 8, 60
_MOST_LINKS = 8
_COLLAPSED = "\u2715"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    """One sample at one budget, under every policy that has it."""

    sample: str
    losses: Mapping[str, Loss]

    @property
    def num_collapsed(self) -> int:
        return sum(loss.collapsed for loss in self.losses.values())

    @property
    def mean_loss(self) -> float:
        return sum(loss.loss for loss in self.losses.values()) / len(self.losses)


def failures_html(judged: Judged) -> Markup:
    """Return a part per budget, or "" where samples carry no score."""
    if judged.primary is None:
        return Markup()
    budgets = [
        _budget(judged, items, cells, judged.primary)
        for several in judged.group.by_budget.values()
        for cells in ([cell for cell in several if not cell.failed],)
        if (items := _items(judged, cells, judged.primary))
    ]
    if not budgets:
        return Markup()
    return render("failures.html.j2", rule=rule_text(judged.primary), budgets=budgets, most_links=_MOST_LINKS)


def _items(judged: Judged, cells: Sequence[CellResult], name: str) -> list[_Item]:
    by_sample: dict[str, dict[str, Loss]] = {}
    for cell in cells:
        for loss in losses_of(judged.group, cell, name):
            by_sample.setdefault(loss.sample, {})[cell.key] = loss
    items = [_Item(sample=sample, losses=losses) for sample, losses in by_sample.items()]
    return sorted(items, key=lambda item: (-item.num_collapsed, -item.mean_loss, natural_key(item.sample)))


def _budget(
    judged: Judged, items: Sequence[_Item], cells: Sequence[CellResult], name: str
) -> Mapping[str, object]:  # fmt: skip
    """Return the table of a budget and, where samples are shared, which of them collapse under every policy."""
    group, budget = judged.group, cells[0].budget
    shown = items[: _MOST_ROWS_OF_MANY if len(group.cells) > _MANY_CELLS else _MOST_ROWS]
    cut = f", the {len(shown)} of {len(items)} that lose most" if len(shown) < len(items) else ""
    heads = [
        Head("sample", kind="text"),
        Head("collapses under", f"of {len(cells)}"),
        Head("full"),
        *(Head(group.series_label(cell)) for cell in cells),
    ]
    view = TableView(
        caption=f"{measure(name).label} of every sample at {budget}{cut}; {_COLLAPSED} marks a collapse",
        heads=heads,
        rows=[list(_cells(judged, item, cells, name)) for item in shown],
        classes="losses",
    )
    shared = [item for item in items if len(item.losses) > 1]
    every = [item for item in shared if item.num_collapsed == len(item.losses)]
    none = sum(item.num_collapsed == 0 for item in items)
    under_none = f"{none} of {len(items)} under none" if none else "every sample collapses under at least one"
    have_all = {len(item.losses) for item in items} == {len(cells)}
    holders = [next(cell for cell in cells if cell.key in item.losses) for item in every]
    return {
        "budget": budget,
        "is_open": budget == asked_budget(judged),
        "counts": _counts(judged, items, cells),
        "every": [sample_link(group, cell, item.sample) for item, cell in zip(every, holders, strict=True)],
        "under_none": under_none if shared else None,
        "policies": f"all {len(cells)} policies" if have_all else "every policy that has them",
        "view": view,
    }


def _counts(judged: Judged, items: Sequence[_Item], cells: Sequence[CellResult]) -> str:
    """Say how many samples each policy loses, of those that it has; the number once where it is the same for all."""
    losses = {cell.key: [item.losses[cell.key] for item in items if cell.key in item.losses] for cell in cells}
    nums = {len(found) for found in losses.values()}
    parts = []
    for cell in cells:
        found, name = losses[cell.key], f"`{judged.group.series_label(cell)}`"
        of = "" if len(nums) == 1 else f" of {len(found)}"
        count = sum(loss.collapsed for loss in found)
        parts.append(f"{name} collapses on {count}{of}" if found else f"{name} has no scores")
    return ", ".join(parts) + (f" of {len(items)} samples" if len(nums) == 1 else "")


def _cells(judged: Judged, item: _Item, cells: Sequence[CellResult], name: str) -> Iterator[TableCell]:
    def text(score: float) -> str:
        return f"{score:.3f}" if name == "ppl" else format_value(name, score)

    yield row_head(short_name(judged.group, item.sample))
    of = "" if len(item.losses) == len(cells) else f" of {len(item.losses)}"
    yield TableCell(f"{item.num_collapsed}{of}", sort=item.num_collapsed)
    full = next(iter(item.losses.values())).full
    yield TableCell(text(full), sort=full)
    for cell in cells:
        loss = item.losses.get(cell.key)
        if loss is None:
            yield TableCell("-")
            continue
        link = sample_link(judged.group, cell, loss.sample, text(loss.score))
        mark, kind = (_COLLAPSED, "collapsed") if loss.collapsed else ("", "")
        yield TableCell(link.text, mark, sort=loss.score, kind=kind, link=link)
