"""Every policy ranked at one budget in one measure: what a reader of a report sees first.

    board = leaderboard(judged, "20 % tokens kept", "ppl")
    for place in board: print(place.rank, place.policy, place.word)

Behind each place stands the verdict against the next one, so that an order which the samples do not show is not taken
for one. `headline` says the same in two sentences: what to take and how sure that is; what it costs and where it fails.
Where the full cache can not do the task, or no answer was scored, nobody is ranked by quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from kvbench.measures import MISSING, format_interval, format_value, measure
from kvbench.report.answer import value_text
from kvbench.report.compare import (
    Comparison,
    difference_interval,
    difference_text,
    difference_unit,
    difference_value,
    p_text,
    timing_noise,
    verdict_remark,
)
from kvbench.report.load import CellResult, Estimate
from kvbench.report.markup import render
from kvbench.report.standing import (
    TIME_RATIOS,
    Judged,
    asked_budget,
    best_unusable,
    losses_of,
    standing_at,
    telling_quality,
    unplaced,
)
from kvbench.report.tables import markdown_table

STORED, STEP, STEP_RATIO = "kv_stored_bytes", "tpot_ms", "tpot_ratio_to_full"
_HELD = "realised_budget_fraction"
NOT_MEASURED = "not measured"
_LOG_FROM = 5.0
_MOST_MEASURES = 8
_SHORT = {
    "sees the future: a bound, no method": "a bound, sees the future",
    "its budget is what it finds to hold": "own budget",
    "the full cache itself does not do this task": "not ranked",
}
_AGAINST = {
    "equivalent": "equivalent to",
    "undecided": "undecided against",
    "not comparable": "not comparable with",
    "not ranked": "not ranked against",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One cell on a leaderboard; `rank` is None for the full cache and for what can not be ranked, with the `reason`.

    `share` is the cell's number over the full cache's, `next` the comparison with the place behind this one.
    """

    rank: int | None
    cell: CellResult
    policy: str
    quality: Estimate | None
    share: float | None
    stored: Estimate | None
    stored_share: float | None
    step: Estimate | None
    step_ratio: Estimate | None
    noise: str
    next: Comparison | None
    num_collapsed: int | None
    num_samples: int
    reason: str

    @property
    def word(self) -> str:
        """Return the verdict against the next place in a word, or why the cell has no rank."""
        return self.next.verdict if self.next else _SHORT.get(self.reason, self.reason)


def board_measures(judged: Judged) -> tuple[str, ...]:
    """Return what policies can be ranked by here: the leading quality first, then the others, then times."""
    times = (name for name in TIME_RATIOS if any(cell.estimate(name) for cell in judged.group.budgeted))
    return (*judged.qualities[:_MOST_MEASURES], *times)


def leaderboard(judged: Judged, budget: str, name: str) -> tuple[Place, ...]:
    """Return the full cache, then the cells of the budget, the best value first, then those that have no rank.

    The one ranking: of the page, of W&B and of docs/leaderboard.md. The verdict against the next is corrected over all
    pairs of policies at equal budget in the measure, as that of any other two is: which two stand side by side is told
    by the same numbers that compare them, and a reader takes the pair that interests from the whole order. So a pair
    has one verdict, here, in the sentence above and in the table of all pairs.
    """
    group = judged.group
    cells, full = group.by_budget.get(budget, []), group.full
    standing = standing_at(judged, cells, name)
    ranked = list(standing.ranked) if standing else []
    follows = {one.key: judged.between(one, other, name) for one, other in pairwise(ranked)}
    found = [_place(judged, full, name, None, "reference", None)] if full is not None else []
    found += [_place(judged, cell, name, rank, "", follows.get(cell.key)) for rank, cell in enumerate(ranked, 1)]
    for cell in (cell for cell in cells if cell not in ranked):
        found.append(_place(judged, cell, name, None, _why_not(judged, cell, name), None))
    return tuple(found)


def _why_not(judged: Judged, cell: CellResult, name: str) -> str:
    """Return in a few words why a cell has no rank."""
    if cell.failed:
        return cell.status
    if reason := judged.ability.reason(name):
        return reason
    if timing_noise(cell, name):
        return "noisy"
    return unplaced(cell) if cell.estimate(name) else NOT_MEASURED


def _place(
    judged: Judged, cell: CellResult, name: str, rank: int | None, reason: str, after: Comparison | None
) -> Place:
    group, own, stored = judged.group, cell.estimate(name), cell.estimate(STORED)
    full, is_ratio = group.full, name.endswith("_ratio_to_full")
    best, held = (full and full.estimate(one) for one in (name, STORED))
    losses = losses_of(group, cell, name) if not cell.is_full and name in judged.qualities else ()
    return Place(
        rank=rank,
        cell=cell,
        policy=group.series_label(cell),
        quality=own,
        share=own.value / best.value if own and best and best.value > 0 and not is_ratio else None,
        stored=stored,
        stored_share=stored.value / held.value if stored and held and held.value > 0 else None,
        step=cell.estimate(STEP),
        step_ratio=None if cell.is_full else cell.estimate(STEP_RATIO),
        noise=timing_noise(cell, STEP_RATIO),
        next=after,
        num_collapsed=sum(loss.collapsed for loss in losses) if losses else None,
        num_samples=len(losses),
        reason=reason,
    )


def headline(judged: Judged, budget: str) -> list[str]:
    """Return what to take at a budget and how sure that is, and what it costs and where it fails; a sentence each.

    Empty where nothing was measured that ranks.
    """
    group = judged.group
    cells = group.by_budget.get(budget, [])
    name = telling_quality(judged, cells) if judged.primary else TIME_RATIOS[0]
    standing = standing_at(judged, cells, name) if name else None
    if standing is None or name is None:
        return [judged.ability.sentence] if judged.ability.sentence else []
    first, label = standing.first, measure(name).label
    unusable = judged.primary is not None and bool(best_unusable(group, cells, name))
    value, policy = f"{label} {value_text(first, name)}", f"`{group.series_label(first)}`"
    rivals = [f"`{group.series_label(cell)}`" for cell, _ in standing.rivals]
    are_equal = all(found is not None and found.verdict == "equivalent" for _, found in standing.rivals)
    lead = "take" if not rivals else "the best value is"
    if judged.primary is None:
        lead = "the shortest step is that of"
    elif unusable:
        lead = "no policy is usable; the best value is that of"
    if rivals:
        others = f"{len(rivals)} others" if len(rivals) > 2 else " and ".join(rivals)
        sure = f"{'equivalent to' if are_equal else 'not shown to be better than'} {others}"
        joined = ", and" if are_equal else ", but"
        sure += f"{joined} better than {len(standing.beaten)} more" if standing.beaten else ""
    elif standing.beaten:
        several = len(standing.beaten) > 1
        who = f"each of the {len(standing.beaten)} others" if several else f"`{group.series_label(standing.beaten[0])}`"
        sure = f"shown to be better than {who}"
    else:
        sure = "with nothing to compare it with"
    return [f"At {budget} {lead} {policy} ({value}), {sure}.", _second(judged, first, name)]


def in_short(judged: Judged, budget: str) -> str:
    """Return the first at a budget, its value, and how many others are not shown to be worse; "" where none ranks."""
    cells = judged.group.by_budget.get(budget, [])
    name = telling_quality(judged, cells) if judged.primary else TIME_RATIOS[0]
    standing = standing_at(judged, cells, name) if name else None
    if standing is None or name is None:
        return ""
    first, num = standing.first, len(standing.rivals)
    unusable = judged.primary is not None and best_unusable(judged.group, cells, name)
    sure = f"{num or 'no'} other{'' if num == 1 else 's'} not shown to be worse"
    usable = "; no policy is usable" if unusable else ""
    value = format_value(name, first.measurements[name].value)
    return f"`{judged.group.series_label(first)}`, {measure(name).label} {value}, {sure}{usable}"


def _second(judged: Judged, first: CellResult, name: str) -> str:
    """Say how far the first is from the full cache, what it costs, and on how many samples it fails."""
    parts = []
    if judged.primary and (found := judged.against_full(first, name)):
        remark = verdict_remark(found)
        verdict = _AGAINST.get(found.verdict, f"{found.verdict} than")
        parts.append(f"it is {verdict} the full cache ({difference_text(found)}{f', {remark}' if remark else ''})")
    place = _place(judged, first, name, None, "", None)
    if place.stored is not None:
        share = f", {place.stored_share:.2f}x of full's" if place.stored_share is not None else ""
        parts.append(f"stores {format_value(STORED, place.stored.value)} of keys and values{share}")
    if place.step is not None:
        ratio = f", {format_value(STEP_RATIO, place.step_ratio.value)} of full's time" if place.step_ratio else ""
        noisy = " (noisy)" if place.noise else ""
        parts.append(f"takes {format_value(STEP, place.step.value)} per token{ratio}{noisy}")
    if place.stored is None and place.step is None and (held := first.estimate(_HELD)):
        parts.append(f"holds {format_value(_HELD, held.value)} of the tokens (bytes and times were not measured here)")
    if place.num_collapsed is not None:
        parts.append(f"fails on {place.num_collapsed} of {place.num_samples} samples")
    if not parts:
        return "Its cost and its distance to the full cache were not measured."
    text = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    return f"{text[:1].upper()}{text[1:]}." if text.startswith("it is") else f"It {text}."


def board_rows(judged: Judged, budget: str, name: str) -> list[dict[str, Any]]:
    """Return the leaderboard as texts, for the page and for its script; numbers only where a bar is drawn."""
    places = leaderboard(judged, budget, name)
    at = _scale([place.quality for place in places if place.quality], name)
    indices = {cell.key: index for index, cell in enumerate(judged.group.cells)}
    return [{"cell": indices[place.cell.key], **_texts(place, name), **at(place.quality)} for place in places]


def _texts(place: Place, name: str) -> dict[str, Any]:
    own, one = place.quality, place.next
    share = "" if place.share is None else f"{100 * place.share:.0f} %" if _is_share(name) else f"{place.share:.2f}x"
    unit = difference_unit(name)[0]
    return {
        "rank": "" if place.rank is None else str(place.rank),
        "policy": place.policy,
        "value": format_value(name, own.value) if own else MISSING,
        "interval": format_interval(name, own.value, own.low, own.high) if own else "",
        "n": "" if own is None or own.n is None else f"n = {own.n}",
        "share": share or MISSING,
        **_costs(place),
        "word": place.word,
        "numbers": [] if one is None else [difference_value(one), difference_interval(one)],
        "unit": unit,
        "remark": "" if one is None else "; ".join(filter(None, (p_text(one.p_holm), verdict_remark(one)))),
        "lost": "" if place.num_collapsed is None else f"{place.num_collapsed} of {place.num_samples}",
    }


COST_TEXTS = ("stored", "stored_share", "step", "step_ratio", "noise")


def _costs(place: Place) -> dict[str, str]:
    texts = (
        format_value(STORED, place.stored.value) if place.stored else MISSING,
        "" if place.stored_share is None else f"{place.stored_share:.2f}x",
        format_value(STEP, place.step.value) if place.step else MISSING,
        format_value(STEP_RATIO, place.step_ratio.value) if place.step_ratio else "",
        place.noise,
    )
    return dict(zip(COST_TEXTS, texts, strict=True))


def _is_share(name: str) -> bool:
    return measure(name).unit in ("score", "fraction")


def _scale(shown: Sequence[Estimate], name: str) -> Callable[[Estimate | None], dict[str, Any]]:
    """Return what places a number and its interval on the bars of one board, in per cent of their width."""
    ends = [bound for one in shown for bound in (*one.bounds, one.value)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    if _is_share(name):
        low, high = min(0.0, low), max(1.0, high)
    is_log = low > 0 and high / low > _LOG_FROM

    def along(number: float) -> float:
        if high <= low:
            return 50.0
        share = math.log(number / low) / math.log(high / low) if is_log else (number - low) / (high - low)
        return round(100 * share, 2)

    def at(found: Estimate | None) -> dict[str, Any]:
        if found is None:
            return {}
        low, high = found.bounds
        return {"at": [along(low), along(found.value), along(high)]}

    return at


def board_markdown(judged: Judged, budget: str, name: str) -> list[str]:
    """Return the leaderboard as lines of a markdown table."""
    heads = ("", "policy", measure(name).label, "of full", "KV bytes", "TPOT", "against the next")
    rows = []
    for row in board_rows(judged, budget, name):
        numbers = " ".join(row["numbers"])
        verdict = f"{row['word']}: {numbers}" if numbers else row["word"]
        beside = (f"{row['value']} {row['interval']}".strip(), row["share"])
        costs = (f"{row['stored']} {row['stored_share']}".strip(), f"{row['step']} {row['step_ratio']}".strip())
        rows.append((row["rank"], row["policy"], *beside, *costs, verdict))
    return list(markdown_table(heads, rows, "rlrrrrl"))


def board_html(judged: Judged, number: int) -> Markup:
    """Return the first screen of a group: two sentences per budget, controls, the leaderboard and room for a figure."""
    asked, names = asked_budget(judged), board_measures(judged)
    if asked is None or not names:
        return Markup()
    sentences = {budget: headline(judged, budget) for budget in judged.group.by_budget}
    name = names[0]
    label, better = measure(name).label, measure(name).better
    return render(
        "first_screen.html.j2", number=number, title=judged.group.title, asked=asked, label=label,
        way=f"{better} is better", sentences=sentences, rows=board_rows(judged, asked, name),
    )  # fmt: skip
