"""The page's answer: which policy to take at each budget, how sure that is, what it costs, and where it fails.

Every word comes from a verdict; where samples do not decide, all that may be the best are named, and where none keeps
enough of the full cache's score to be usable none is. Without any answer scored it is about speed and memory. Below
that, the samples that collapse under each policy at every budget, with links to the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from markupsafe import Markup

from kvbench.measures import format_value, format_with_interval, measure
from kvbench.report.compare import (
    DECLARED,
    Choices,
    Comparison,
    difference_text,
    leading_quality,
    size_text,
    size_with_unit,
    verdict_remark,
)
from kvbench.report.load import CellResult, Group, is_better, natural_key
from kvbench.report.markup import Head, TableCell, TableView, listed, render, row_head
from kvbench.report.samples import SampleLinks, short_name
from kvbench.report.standing import (
    BEHIND,
    BYTES,
    LENGTH,
    MOST_PAIRS,
    TIME_RATIOS,
    Judged,
    Loss,
    Standing,
    asked_budget,
    best_unusable,
    cautions,
    is_usable,
    judge,
    losses_of,
    rule_text,
    safe_cells,
    standing_at,
    telling_quality,
    unplaced,
    usable_text,
)
from kvbench.stats.tests import is_latency_ratio, smallest_margin

MOST_NAMES = 3
_RATIOS = (("tpot_ms", "tpot_ratio_to_full", "per output token"), ("ttft_ms", "ttft_ratio_to_full", "to first token"))
_WORDS = {
    "worse": "It is worse than the full cache",
    "better": "It is better than the full cache",
    "equivalent": "It is equivalent to the full cache",
    "undecided": "Whether it keeps the full cache's quality is undecided",
}


def answer_sentences(judged: Judged) -> list[str]:
    """Return what to take at the budget asked for, and what is shown to keep full's quality, in some sentences."""
    budget = asked_budget(judged)
    if judged.ability.sentence:
        return [judged.ability.sentence]
    if costs := _cost_sentences(judged):
        return costs
    if judged.primary is None or budget is None:
        return ["No cell with a budget has a quality measurement yet, so no policy can be recommended."]
    cells = judged.group.by_budget[budget]
    if best := best_unusable(judged.group, cells, judged.primary):
        return [_none_usable(judged, best), *_elsewhere(judged, budget)]
    standing = standing_at(judged, cells, telling_quality(judged, cells) or judged.primary)
    if standing is None:
        return [f"At {budget} no cell ended well enough to be ranked, so no policy can be recommended there."]
    contrary = [line for line, clear in other_measures(judged, standing) if clear]
    but = f" But in {'; in '.join(contrary)}." if contrary else ""
    lost = _collapses_text(judged, standing.first, standing.measure)
    return [f"{_choice(judged, standing)} {_distance(judged, standing)}{lost}{but}", _safety(judged)]


def _none_usable(judged: Judged, best: Sequence[CellResult]) -> str:
    """Say that no policy keeps enough of the full cache's score at a budget, and what the best of them does."""
    group, name = judged.group, judged.primary
    assert name is not None
    assert group.full is not None
    lost = _collapses_text(judged, best[0], name) if len(best) == 1 else ""
    return (
        f"No policy is usable at {best[0].budget}: best {measure(name).label} {value_text(best[0], name)} "
        f"({names(judged, best)}), where the full cache reaches {value_text(group.full, name)}; "
        f"{usable_text(name)}.{lost}"
    )


def _elsewhere(judged: Judged, asked: str) -> Iterator[str]:
    """Yield at which other budget a policy is usable, and whether any keeps the full cache's quality."""
    group, name = judged.group, judged.primary
    assert name is not None
    label, unusable = measure(name).label, list[str]()
    for budget, cells in group.by_budget.items():
        usable = [cell for cell in cells if is_usable(group, cell, name)]
        if usable and (standing := standing_at(judged, usable, name)):
            shown = f"{value_text(standing.first, name)} (`{group.series_label(standing.first)}`)"
            yield f"Smallest budget measured at which a policy is usable: {budget}, best {label} {shown}."
            yield _safety(judged)
            return
        if budget != asked and (best := best_unusable(group, cells, name)):
            unusable.append(f"{value_text(best[0], name)} at {budget} ({names(judged, best)})")
    if unusable:
        yield f"None is usable at any other budget measured: best {label} {listed(unusable)}."


def _collapses_text(judged: Judged, cell: CellResult, name: str) -> str:
    """Return on how many samples the cell collapses, as a sentence; "" where on none."""
    losses = losses_of(judged.group, cell, name)
    num = sum(loss.collapsed for loss in losses)
    return f" `{judged.group.series_label(cell)}` collapses on {num} of {len(losses)} samples." if num else ""


def sentences_before(group: Group, choices: Choices = DECLARED) -> list[str]:
    """Return what stands before every table of the group: `cautions`; of costs alone the answer about them."""
    return cautions(group) if leading_quality(group) else _cost_sentences(judge(group, choices))


def _cost_sentences(judged: Judged) -> list[str]:
    """Return the answer where no answer was scored; nothing where one was, or nothing else was measured either."""
    budget = asked_budget(judged)
    costs = [] if judged.primary or budget is None else list(_costs(judged, budget))
    return ["No answer was scored here, so this is about speed and memory alone.", *costs] if costs else []


def _costs(judged: Judged, budget: str) -> Iterator[str]:
    """Yield who is fastest and who holds least at a budget; nothing where neither time nor bytes were measured."""
    cells = [cell for cell in judged.group.by_budget[budget] if not cell.failed]
    for own_name, ratio_name, words in _RATIOS:
        if not any(cell.estimate(ratio_name) for cell in cells):
            continue
        standing = standing_at(judged, cells, ratio_name)
        if standing is None:
            yield f"At {budget} every {measure(own_name).title.lower()} is noisy, so none is ranked."
            continue
        first = standing.first
        alike = [cell for cell, found in standing.rivals if found is not None and found.verdict == "equivalent"]
        unsure = [cell for cell, _ in standing.rivals if cell not in alike]
        parts = (("faster than", standing.beaten), ("equivalent within the margin to", alike),
                 ("not shown to be faster than", unsure))  # fmt: skip
        others = "; ".join(f"{text} {names(judged, some)}" for text, some in parts if some)
        line = next(_time_lines(judged, first, ((own_name, ratio_name, words),)))
        more = f" It is {others}." if others else ""
        yield f"At {budget} the shortest time is that of `{judged.group.series_label(first)}`, {line}.{more}"
    for name, words in zip(
        BYTES, ("the least KV cache is stored by", "the peak of all memory is lowest with"), strict=True
    ):
        held = {cell.key: found.value for cell in cells if (found := cell.estimate(name))}
        if held:
            least = min(held.values())
            shown = format_value(name, least)  # some bytes more or less are no difference
            who = names(judged, [cell for cell in cells if format_value(name, held.get(cell.key)) == shown])
            yield f"At {budget} {words} {who}: {shown}{_of_full(judged, name, least)}."


def _of_full(judged: Judged, name: str, value: float) -> str:
    """Return ", 0.20x of full's 8.51 GiB", or "" without a full cache."""
    full = None if judged.group.full is None else judged.group.full.estimate(name)
    return f", {value / full.value:.2f}x of full's {format_value(name, full.value)}" if full and full.value else ""


def _choice(judged: Judged, standing: Standing) -> str:
    """Say what to take at a budget, or between which the samples do not decide.

    Of policies that can not be compared with the first that is said; what the samples decide is said of the others.
    """
    at, label, first = f"At {standing.budget}", measure(standing.measure).label, standing.first
    name, value = f"`{judged.group.series_label(first)}`", value_text(first, standing.measure)
    if len(standing.ranked) == 1:
        return f"{at} only {name} can be judged: {label} {value}."
    if not standing.rivals:
        count = len(standing.beaten)
        others = f"each of the {count} other policies" if count > 1 else "the other policy"
        if sum(not cell.failed for cell in judged.group.by_budget[standing.budget]) > count + 1:
            others = names(judged, standing.beaten)  # these are not all that there are
        return f"{at} take {name}: {label} {value}, better than {others}."
    if apart := [(cell, found) for cell, found in standing.rivals if is_apart(found)]:
        reasons = ", ".join(dict.fromkeys(found.reason if found else "not scored alike" for _, found in apart))
        who = f"{names(judged, [cell for cell, _ in apart])} ({reasons})"
        left = {cell.key for cell, _ in apart}
        ranked = tuple(cell for cell in standing.ranked if cell.key not in left)
        rivals = tuple((cell, found) for cell, found in standing.rivals if cell.key not in left)
        if len(ranked) == 1:
            return f"{at} {name} has the best {label} so far, {value}, but is not comparable with {who}."
        others = _choice(judged, replace(standing, ranked=ranked, rivals=rivals))
        return f"{others} {name} is not comparable with {who}."
    known = names(judged, [cell for cell, _ in standing.rivals])
    if all(found is not None and found.verdict == "equivalent" for _, found in standing.rivals):
        return f"{at} take {name} ({label} {value}) or {known}: equivalent within the margin."
    return f"{at} the samples do not decide between {name} (best {label} so far, {value}) and {known}."


def is_apart(found: Comparison | None) -> bool:
    """Tell whether two policies can not be compared, however many samples there are."""
    return found is None or found.verdict == "not comparable"


def _distance(judged: Judged, standing: Standing) -> str:
    found = judged.against_full(standing.first, standing.measure)
    if found is None:
        return "Its distance to the full cache was not measured."
    if found.verdict not in _WORDS:
        return f"It can not be compared with the full cache ({found.reason or found.verdict})."
    more = "; ".join(filter(None, (difference_text(found), verdict_remark(found))))
    return f"{_WORDS[found.verdict]} ({more})."


def _safety(judged: Judged) -> str:
    assert judged.primary is not None
    if judged.group.full is None:
        return "Without a usable cell of the full cache no policy can be shown to keep its quality."
    label, margin, safe = measure(judged.primary).label, _margin_text(judged), safe_cells(judged)
    if safe:
        smallest = names(judged, [cell for cell in safe if cell.budget == safe[0].budget])
        budget = f"{safe[0].budget}, with {smallest}"
        return f"Smallest budget measured at which the full cache's {label} is shown to be kept{margin}: {budget}."
    against = ((cell, judged.against_full(cell, judged.primary)) for cell in judged.group.budgeted)
    undecided = names(judged, [cell for cell, one in against if one and one.verdict == "undecided"], with_budget=True)
    rest = f"; undecided: {undecided}" if undecided else ""
    return f"No policy is shown to keep the full cache's {label}{margin} at any budget measured{rest}."


def _margin_text(judged: Judged) -> str:
    """Return " (margin 0.020)", and that it was chosen where it is not the declared one."""
    assert judged.primary is not None
    margin = smallest_margin(judged.primary, judged.choices.margins)
    if margin is None:
        return ""
    declared = smallest_margin(judged.primary)
    other = "" if margin == declared else f", chosen for this page; declared: {size_text(judged.primary, declared)}"
    return f" (margin {size_with_unit(judged.primary, margin)}{other})"


def names(judged: Judged, cells: Sequence[CellResult], *, with_budget: bool = False) -> str:
    """Return the first few cells by name, and how many more there are."""
    named = [f"`{judged.group.series_label(cell)}`" + (f" at {cell.budget}" if with_budget else "") for cell in cells]
    more = f" and {len(named) - MOST_NAMES} more" if len(named) > MOST_NAMES else ""
    return ", ".join(named[:MOST_NAMES]) + more if more or not named else listed(named)


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
    ("% tokens kept", "`tokens kept` is a share of all tokens seen so far"),
    ("% prompt tokens kept", "`prompt tokens kept` is a share of the prompt"),
    (" tokens", "`tokens` is a fixed number"),
)
_MOST_OPEN = 6


def answer_html(judged: Judged, links: SampleLinks | None = None) -> Markup:
    """Return the sentences, what measure and budgets are for who sees the page first, and a block per budget."""
    group = judged.group
    blocks = (
        []
        if judged.ability.sentence
        else [_block(judged, cells, links or SampleLinks()) for cells in group.by_budget.values()]
    )
    return render(
        "answer.html.j2",
        sentences=answer_sentences(judged),
        known=judged.primary and measure(judged.primary),
        kinds=[text for end, text in _BUDGET_KINDS if any(cell.budget.endswith(end) for cell in group.budgeted)],
        blocks=blocks,
        most_open=_MOST_OPEN,
    )


def _block(judged: Judged, cells: list[CellResult], links: SampleLinks) -> Mapping[str, object]:
    """Return a budget with what to take there and why, or with the reason that nothing can be ranked."""
    name = telling_quality(judged, cells) if judged.primary else TIME_RATIOS[0]
    standing = standing_at(judged, cells, name or TIME_RATIOS[0])
    if standing is None:
        withheld = judged.ability.reason(judged.primary) if judged.primary else ""
        statuses = withheld or ", ".join(sorted({cell.status for cell in cells if cell.status != "ok"}) or ["no times"])
        return {"budget": cells[0].budget, "nothing": statuses}
    group, first = judged.group, standing.first
    named, rivals = f"`{group.series_label(first)}`", [cell for cell, found in standing.rivals if not is_apart(found)]
    take = f"take {named}" if standing.beaten or not standing.rivals else f"{named}, compared with none"
    take = f"{named} or {names(judged, rivals)}" if rivals else take
    quality = list(_quality(judged, standing))
    losses = losses_of(group, first, standing.measure)
    if judged.primary and best_unusable(group, cells, judged.primary):
        take = f"no policy is usable; best value with {named}"
    return {
        "budget": cells[0].budget,
        "nothing": "",
        "take": take if judged.primary else f"fastest step: {take.removeprefix('take ')}",
        "answers": [
            ("How sure", list(_sure(judged, standing))),
            ("Quality", quality),
            ("Other measures", [line for line, _ in other_measures(judged, standing)]),
            ("Time", list(_time_lines(judged, first))),
            ("Memory", list(_memory(judged, first))),
        ],
        "num_losses": len(losses),
        "num_collapsed": sum(loss.collapsed for loss in losses),
        "worst": [links.add(group, first, loss.sample) for loss in losses[:MOST_NAMES]],
    }


def _quality(judged: Judged, standing: Standing) -> Iterator[str]:
    """Yield the measure that ranks, its distance to full, and behind it ROUGE with the length that it follows."""
    first, name = standing.first, standing.measure
    if judged.primary is None:
        return
    yield f"{measure(name).label} {value_text(first, name)}"
    if found := judged.against_full(first, name):
        yield f"against full {difference_text(found)}: {found.verdict}"
    if first.estimate(BEHIND):
        told = "" if name == BEHIND else f"{measure(BEHIND).label} {value_text(first, BEHIND)}, "
        if told or first.estimate(LENGTH):
            yield f"{told}{measure(LENGTH).label} {value_text(first, LENGTH)}"


def _sure(judged: Judged, standing: Standing) -> Iterator[str]:
    label = measure(standing.measure).label
    if standing.beaten:
        yield f"Better in {label} than {names(judged, standing.beaten)}{_evidence(judged, standing)}."
    for cell, found in standing.rivals[:MOST_NAMES]:
        remark = verdict_remark(found) if found else ""
        more = f" ({remark})" if remark else ""
        text = f"{found.verdict}, {difference_text(found)}{more}" if found else "not compared"
        yield f"Against `{judged.group.series_label(cell)}`: {text}."
    if len(standing.rivals) > MOST_NAMES:
        yield f"{len(standing.rivals) - MOST_NAMES} more are not beaten either."
    if len(standing.ranked) == 1:
        yield "Nothing to compare it with at this budget."
    if standing.left_out:
        why = ((cell, cell.status if cell.failed else unplaced(cell) or "noisy times") for cell in standing.left_out)
        cells = ", ".join(f"`{judged.group.series_label(cell)}` ({reason})" for cell, reason in why)
        yield f"Not ranked: {cells}."


def _evidence(judged: Judged, standing: Standing) -> str:
    """Return the samples behind the claim and the largest p value among the corrected ones."""
    found = [one for cell in standing.beaten if (one := judged.between(standing.first, cell, standing.measure))]
    p_values = [one.p_holm for one in found if one.p_holm is not None]
    if not p_values:
        return ""
    num = min(one.num_samples for one in found)
    p_text = "p < 0.001" if max(p_values) < 0.001 else f"p <= {max(p_values):.3f}"
    who = "Holm" if judged.num_pairs <= MOST_PAIRS else "Bonferroni"
    what = "runs" if is_latency_ratio(measure(standing.measure)) else "samples"
    return f" (paired over {num} {what}, {p_text} after {who}'s correction)"


def _time_lines(judged: Judged, cell: CellResult, shown: Sequence[tuple[str, str, str]] | None = None) -> Iterator[str]:
    for name, ratio_name, how in _RATIOS if shown is None else shown:
        own, ratio = cell.estimate(name), cell.estimate(ratio_name)
        if own is None and ratio is None:
            continue
        found = judged.against_full(cell, ratio_name)
        text = format_with_interval(ratio_name, ratio.value, ratio.low, ratio.high) if ratio else ""
        verdict = {"better": "faster", "worse": "slower"}.get(found.verdict, found.verdict) if found else "no verdict"
        reason = f" ({found.reason})" if found and found.verdict == "noisy" and found.reason else ""
        against = f", {text} of full: {verdict}{reason}" if text else ""
        yield f"{format_value(name, own.value) if own else '-'} {how}{against}"


def _memory(judged: Judged, cell: CellResult) -> Iterator[str]:
    stored, peak = BYTES
    own, mine = cell.estimate(stored), cell.estimate(peak)
    before = judged.group.full and judged.group.full.estimate(peak)
    if own is None:
        return
    yield f"{format_value(stored, own.value)} of KV cache stored{_of_full(judged, stored, own.value)}"
    if mine and before:
        change = f"{'+' if mine.value >= before.value else '-'}{format_value(stored, abs(mine.value - before.value))}"
        yield f"peak of all memory {format_value(peak, mine.value)}, {change} against full"


_MOST_ROWS = 32
_MOST_ROWS_OF_MANY, _MANY_CELLS = 8, 30
_MOST_LINKS = 8
_MOST_COUNTED = 8  # policies, by name
_COLLAPSED = "\u2715"


Losses = Mapping[str, Loss]  # of one sample at one budget, by the key of every cell that has it


def failures_html(judged: Judged, links: SampleLinks | None = None) -> Markup:
    """Return a part per budget, or "" where samples carry no score."""
    if judged.primary is None:
        return Markup()
    whole = ([cell for cell in cells if not cell.failed] for cells in judged.group.by_budget.values())
    budgets = [found for cells in whole if (found := _budget(judged, cells, judged.primary, links or SampleLinks()))]
    if not budgets:
        return Markup()
    return render("failures.html.j2", rule=rule_text(judged.primary), budgets=budgets)


def _budget(judged: Judged, cells: Sequence[CellResult], name: str, links: SampleLinks) -> Mapping[str, object] | None:
    """Return the table of a budget and, where samples are shared, which of them collapse under every policy."""
    group = judged.group
    by_sample: dict[str, dict[str, Loss]] = {}
    for cell in cells:
        for loss in losses_of(group, cell, name):
            by_sample.setdefault(loss.sample, {})[cell.key] = loss
    if not by_sample:
        return None
    collapses = {sample: sum(one.collapsed for one in losses.values()) for sample, losses in by_sample.items()}
    means = {sample: sum(one.loss for one in losses.values()) / len(losses) for sample, losses in by_sample.items()}
    items = sorted(by_sample, key=lambda sample: (-collapses[sample], -means[sample], natural_key(sample)))
    shown = items[: _MOST_ROWS_OF_MANY if len(group.cells) > _MANY_CELLS else _MOST_ROWS]
    cut = f", the {len(shown)} of {len(items)} that lose most" if len(shown) < len(items) else ""
    view = TableView(
        caption=f"{measure(name).label} of every sample at {cells[0].budget}, {group.title}{cut}; "
        f"{_COLLAPSED} marks a collapse",
        heads=[
            Head("sample", kind="text"),
            Head("collapses under", f"of {len(cells)}"),
            Head("full"),
            *(Head(group.series_label(cell), cell=group.cell_label(cell)) for cell in cells),
        ],
        rows=[list(_cells(judged, sample, by_sample[sample], cells, name)) for sample in shown],
        row_data=[{"sample": sample} for sample in shown],
        classes="losses",
        group=group.title,
    )
    for sample, cell in ((sample, cell) for sample in shown for cell in cells if cell.key in by_sample[sample]):
        links.add(group, cell, sample)
    every = [sample for sample in items if 1 < len(by_sample[sample]) == collapses[sample]]
    linked = every[:_MOST_LINKS]
    holders = [next(cell for cell in cells if cell.key in by_sample[sample]) for sample in linked]
    return {
        "budget": cells[0].budget,
        "is_open": cells[0].budget == asked_budget(judged),
        "counts": _counts(judged, by_sample, cells),
        "is_shared": any(len(losses) > 1 for losses in by_sample.values()),
        "every": [links.add(group, cell, sample) for sample, cell in zip(linked, holders, strict=True)],
        "num_every": len(every),
        "num_samples": len(items),
        "num_unhurt": sum(not count for count in collapses.values()),
        "num_policies": len(cells) if all(len(losses) == len(cells) for losses in by_sample.values()) else None,
        "view": view,
    }


def _counts(judged: Judged, by_sample: Mapping[str, Losses], cells: Sequence[CellResult]) -> str:
    """Say how many samples each policy loses, of those that it has; the number once where it is the same for all.

    Of many policies the fewest and the most; each one's number stands in the leaderboard.
    """
    found = [[losses[cell.key] for losses in by_sample.values() if cell.key in losses] for cell in cells]
    is_same = len({len(losses) for losses in found}) == 1
    if is_same and len(cells) > _MOST_COUNTED:
        counts = [sum(loss.collapsed for loss in losses) for losses in found]
        fewest, most = (
            f"{end} ({names(judged, [cell for cell, count in zip(cells, counts, strict=True) if count == end])})"
            for end in (min(counts), max(counts))
        )
        return f"{len(cells)} policies collapse on {fewest} to {most} of {len(by_sample)} samples"
    parts = []
    for cell, losses in zip(cells, found, strict=True):
        of, count = "" if is_same else f" of {len(losses)}", sum(loss.collapsed for loss in losses)
        parts.append(
            f"`{judged.group.series_label(cell)}` " + (f"collapses on {count}{of}" if losses else "has no scores")
        )
    return ", ".join(parts) + (f" of {len(by_sample)} samples" if is_same else "")


def _cells(judged: Judged, sample: str, losses: Losses, cells: Sequence[CellResult], name: str) -> Iterator[TableCell]:
    def text(score: float) -> str:
        return f"{score:.3f}" if name == "ppl" else format_value(name, score)

    full, count = next(iter(losses.values())).full, sum(loss.collapsed for loss in losses.values())
    yield row_head(short_name(judged.group, sample))
    yield TableCell(str(count) if len(losses) == len(cells) else f"{count} of {len(losses)}", sort=count)
    yield TableCell(text(full), sort=full)
    for cell in cells:
        if (loss := losses.get(cell.key)) is None:
            yield TableCell("-")
            continue
        kind = "collapsed" if loss.collapsed else ""
        yield TableCell(text(loss.score), sort=loss.score, kind=kind, role="link")
