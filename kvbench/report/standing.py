"""Who stands first in a group and what a policy loses there, as far as the verdicts say so.

    judged = judge(group)
    judged.against_full(cell, judged.primary).verdict
    for one in best_policies(group, group_comparisons(group)):
        print(one.budget, one.measure, one.cell.policy, one.verdict)

`judge` holds every comparison of a group at hand. `standing_at` ranks the cells of one budget: the first, whom it
beats, who may be as good; failed cells are named and never ranked, noisy ones are where no clock is in the measure.
`losses_of` gives the samples that a policy loses. One rule says what is worth something beside the full cache
(`KEPT_SHARE`): a sample collapses where its score is under half of the full cache's; in perplexity, where its tokens
are on average more than one nat less likely; a policy whose own score is there is not usable (`is_usable`). Samples on
which the full cache itself scores nothing can not collapse. `cautions` are what stands before every table of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from kvbench.measures import (
    MAX_TURNS,
    NEAR_LENGTH_FRACTION,
    TASK_MEASURES,
    format_value,
    has_other_length,
    measure,
)
from kvbench.report.compare import (
    DECLARED,
    PRIMARY_QUALITIES,
    Ability,
    Choices,
    Comparison,
    between_policies,
    compare,
    declared_budget,
    group_comparisons,
    leading_quality,
    subtracted,
    timing_noise,
    withheld,
)
from kvbench.report.compare import judged as corrected
from kvbench.report.load import CellResult, Estimate, Group, mean_scores, natural_key
from kvbench.report.markup import listed
from kvbench.stats.tests import is_latency_ratio, turned

OTHER_QUALITIES = (
    *(*TASK_MEASURES[:2], "ppl", "rougeL_vs_full", "rougeL_vs_reference", "kl_to_full"),
    *("ppl_released", *(f"turn{turn}_rougeL_vs_full" for turn in range(2, MAX_TURNS + 1))),
)
MOST_PAIRS = 500
TIME_RATIOS = ("tpot_ratio_to_full", "ttft_ratio_to_full")
BYTES = ("kv_stored_bytes", "peak_memory_bytes")
BEHIND = "rougeL_vs_full"  # stands behind a task's own measure, with the answers' length beside it
LENGTH = "length_ratio"
_FULL_KEPT = ("better", "equivalent")
KEPT_SHARE = 0.5  # of the full cache's score: with less, more of what that gets right is lost than kept
_LOST_NATS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Comparisons of `group` by measure and keys; `primary` is the quality measure that headlines speak of."""

    group: Group
    primary: str | None
    by_pair: Mapping[tuple[str, str, str], Comparison]
    choices: Choices
    num_pairs: int
    ability: Ability

    def against_full(self, cell: CellResult, name: str) -> Comparison | None:
        """Return the comparison of the cell with the full cache."""
        return None if self.group.full is None else self.by_pair.get((name, cell.key, self.group.full.key))

    def between(self, first: CellResult, second: CellResult, name: str) -> Comparison | None:
        """Return the comparison as seen from `first`, whichever of the two was compared with the other."""
        if found := self.by_pair.get((name, first.key, second.key)):
            return found
        if found := self.by_pair.get((name, second.key, first.key)):
            return swapped(found)
        if self.num_pairs <= MOST_PAIRS or not (found := compare(first, second, name, self.choices)):
            return None
        if found.p_value is not None:
            found = corrected(found, min(1.0, found.p_value * self.num_pairs))
        return withheld(found, self.ability.reason(name))

    @property
    def qualities(self) -> tuple[str, ...]:
        """Return the primary measure and the others that say something about quality here."""
        if self.primary is None:
            return ()
        others = (name for name in OTHER_QUALITIES if any(cell.estimate(name) for cell in self.group.budgeted))
        return tuple(dict.fromkeys((self.primary, *others)))


def judge(group: Group, choices: Choices = DECLARED) -> Judged:
    """Return the group with every comparison of quality and time that can be made in it.

    Of very many policies only those pairs are compared that are asked for, with Bonferroni's correction for all of
    them, which is stricter than Holm's.
    """
    num_pairs = sum(1 for _ in between_policies(group))
    primary = leading_quality(group)
    names = {*PRIMARY_QUALITIES, *OTHER_QUALITIES, *TIME_RATIOS, *([primary] if primary else ())}
    found = group_comparisons(group, choices, names, between=num_pairs <= MOST_PAIRS)
    by_pair = {(one.measure, one.first.key, one.second.key): one for one in found}
    return Judged(
        group=group, primary=primary or _other(group), by_pair=by_pair, choices=choices, num_pairs=num_pairs,
        ability=Ability(group),
    )  # fmt: skip


def swapped(one: Comparison) -> Comparison:
    """Return the same comparison as seen from the second cell."""
    value, low, high, t_low, t_high = (
        _turned(one.measure, number) for number in (one.value, one.high, one.low, one.t_high, one.t_low)
    )
    return replace(
        one, first=one.second, second=one.first, value=value or 0.0, low=low, high=high,
        t_low=t_low, t_high=t_high, verdict=turned(one.verdict),
    )  # fmt: skip


def _turned(name: str, value: float | None) -> float | None:
    """Return the difference the other way round: its negative, of a ratio minus 1 that of the inverse ratio."""
    if value is None or not is_latency_ratio(measure(name)):
        return None if value is None else -value
    return math.inf if value <= -1 else -value / (1 + value)


def _other(group: Group) -> str | None:
    return next((name for name in OTHER_QUALITIES if any(cell.estimate(name) for cell in group.cells)), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """The ranked cells of one budget in one measure, best value first.

    `rivals` are those that the first is not shown to beat, each with the comparison as seen from the first.
    """

    budget: str
    measure: str
    ranked: tuple[CellResult, ...]
    beaten: tuple[CellResult, ...]
    rivals: tuple[tuple[CellResult, Comparison | None], ...]
    left_out: tuple[CellResult, ...]

    @property
    def first(self) -> CellResult:
        """The cell of the best value, which is not always shown to be the best."""
        return self.ranked[0]


def standing_at(judged: Judged, cells: list[CellResult], name: str) -> Standing | None:
    """Return how the cells of one budget stand in the measure; None where none can be ranked."""
    if judged.ability.reason(name):
        return None
    if not (ranked := _ranked((cell for cell in cells if not timing_noise(cell, name)), name)):
        return None
    first, *others = ranked
    seen = [(cell, judged.between(first, cell, name)) for cell in others]
    return Standing(
        budget=first.budget,
        measure=name,
        ranked=tuple(ranked),
        beaten=tuple(cell for cell, found in seen if found is not None and found.verdict == "better"),
        rivals=tuple((cell, found) for cell, found in seen if found is None or found.verdict != "better"),
        left_out=tuple(cell for cell in cells if cell not in ranked),
    )


def _ranked(cells: Iterable[CellResult], name: str) -> list[CellResult]:
    """Return the cells that have the measure, the best value first."""
    sign = -1.0 if measure(name).better == "higher" else 1.0
    valued = [(sign * found.value, cell.sort_key, cell) for cell in cells if (found := cell.estimate(name))]
    return [cell for _, _, cell in sorted(valued, key=lambda item: item[:2])]


def telling_quality(judged: Judged, cells: list[CellResult]) -> str | None:
    """Return the primary measure, or the next one where the primary is the same for every cell and so ranks none."""
    for name in judged.qualities:
        if judged.ability.reason(name):
            continue
        if len({found.value for cell in cells if (found := cell.estimate(name))}) > 1 or len(cells) == 1:
            return name
    return judged.primary


def asked_budget(judged: Judged) -> str | None:
    """Return the budget that the headline speaks of: that of the primary comparisons."""
    return declared_budget(judged.group)


def safe_cells(judged: Judged) -> list[CellResult]:
    """Return, smallest budget first, the cells shown to be no worse than full: better, or equivalent."""
    return [
        cell
        for cells in judged.group.by_budget.values()
        for cell in cells
        if judged.primary
        and (found := judged.against_full(cell, judged.primary)) is not None
        and found.verdict in _FULL_KEPT
        and not cell.failed
    ]


def is_usable(group: Group, cell: CellResult, name: str) -> bool | None:
    """Tell whether the cell keeps enough of the full cache's own score to be worth taking; None where nothing tells."""
    own, best = cell.estimate(name), None if group.full is None else group.full.estimate(name)
    if own is None or best is None:
        return None
    return not is_collapsed(name, subtracted(name, own.value), subtracted(name, best.value))


def best_unusable(group: Group, cells: Iterable[CellResult], name: str) -> tuple[CellResult, ...]:
    """Return the cells of the best value where none of them is usable, none where one is or nothing tells."""
    known = [(cell, usable) for cell in cells if (usable := is_usable(group, cell, name)) is not None]
    if any(usable for _, usable in known):
        return ()
    ranked = _ranked((cell for cell, _ in known), name)
    return tuple(cell for cell in ranked if cell.measurements[name].value == ranked[0].measurements[name].value)


def usable_text(name: str) -> str:
    """Return what a policy must reach to be usable, in words."""
    if measure(name).better == "higher":
        return f"usable is at least {KEPT_SHARE * 100:.0f} % of the full cache's score"
    return f"usable is at most {_LOST_NATS:g} nat per token above the full cache"


def cautions(group: Group) -> list[str]:
    """Return what a reader must know before any table of quality.

    That the data set ranks nobody; else at which budgets no policy is usable, and how far answers are from the full
    cache's in length, where ROUGE is read.
    """
    if sentence := Ability(group).sentence:
        return [sentence]
    return [*_unusable(group), *length_cautions(group)]


def _unusable(group: Group) -> Iterator[str]:
    name, found = leading_quality(group), dict[str, tuple[CellResult, ...]]()
    if name is None or group.full is None or Ability(group).reason(name):
        return
    for budget, cells in group.by_budget.items():
        if best := best_unusable(group, cells, name):
            found[budget] = best
    if found:
        shown = [
            f"{_value(cells[0], name)} at {budget} ({listed([group.series_label(cell) for cell in cells])})"
            for budget, cells in found.items()
        ]
        everywhere = len(found) == len(group.by_budget) and len(found) > 1
        yield (
            f"No policy is usable at {'any budget measured' if everywhere else listed(list(found))}: best "
            f"{measure(name).label} {listed(shown)}, where the full cache reaches {_value(group.full, name)}; "
            f"{usable_text(name)}."
        )


def _value(cell: CellResult, name: str) -> str:
    found = cell.estimate(name)
    return format_value(name, found.value if found else None)


def other_lengths(group: Group) -> dict[str, list[CellResult]]:
    """Return by measure of length (one per turn) the cells whose answers are much shorter or longer than full's."""
    names = (LENGTH, *(f"turn{turn}_{LENGTH}" for turn in range(1, MAX_TURNS + 1)))
    found = {
        name: [cell for cell in group.cells if (one := cell.estimate(name)) and has_other_length(one.value)]
        for name in names
    }
    return {name: cells for name, cells in found.items() if cells}


def length_cautions(group: Group) -> Iterator[str]:
    """Yield how many cells answer at another length than the full cache, and how far from it they get."""
    found = other_lengths(group)
    ratios = [one.value for name, cells in found.items() for cell in cells if (one := cell.estimate(name))]
    if ratios:
        num, ends = len({cell.key for cells in found.values() for cell in cells}), (min(ratios), max(ratios))
        shown = " to ".join(dict.fromkeys(f"{100 * ratio:.0f} %" for ratio in ends))
        yield (
            f"Answers of {num} of {len(group.cells)} cells have {shown} of the full cache's length, more than "
            f"{100 * NEAR_LENGTH_FRACTION:.0f} % from it; ROUGE against full follows the length, so read it beside "
            f"{measure(LENGTH).label}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """`cell` has the best `estimate` of `measure` at `budget`; `verdict` is its verdict against `runner_up`."""

    budget: str
    measure: str
    cell: CellResult
    estimate: Estimate
    runner_up: CellResult
    verdict: str


def best_policies(group: Group, compared: Iterable[Comparison]) -> tuple[Best, ...]:
    """Return the best policy at each budget in every measure of `compared` (comparisons of `group`).

    A budget at which fewer than two policies have the measure has no best one. Noisy times are never the best, and
    no quality is where the full cache can not do the task.
    """
    verdicts: dict[tuple[str, str, str], str] = {}
    for one in compared:
        verdicts[one.measure, one.first.key, one.second.key] = one.verdict
        verdicts.setdefault((one.measure, one.second.key, one.first.key), turned(one.verdict))
    ability, found = Ability(group), []
    names = dict.fromkeys(name for name, *_ in verdicts if measure(name).better != "none" and not ability.reason(name))
    for budget in dict.fromkeys(cell.budget for cell in group.budgeted if not cell.failed):
        for name in names:
            cells = (cell for cell in group.budgeted if cell.budget == budget and not timing_noise(cell, name))
            ranked = _ranked(cells, name)
            if len(ranked) > 1:
                first, second, best = ranked[0], ranked[1], ranked[0].measurements[name]
                verdict = verdicts.get((name, first.key, second.key), "not compared")
                found.append(
                    Best(budget=budget, measure=name, cell=first, estimate=best, runner_up=second, verdict=verdict)
                )
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One sample under one policy; `loss` is positive where the policy is worse, in the measure's difference unit."""

    sample: str
    full: float
    score: float
    loss: float
    collapsed: bool


def rule_text(name: str) -> str:
    """Return the rule in words."""
    label = measure(name).label
    if measure(name).better == "higher":
        return f"A sample collapses where its {label} is under half of the full cache's."
    return "A sample collapses where its tokens are on average more than one nat less likely than with the full cache."


def losses_of(group: Group, cell: CellResult, name: str) -> tuple[Loss, ...]:
    """Return what the cell loses on every sample that both have, the largest loss first."""
    if group.full is None or cell.failed:
        return ()
    fulls, sign = mean_scores(group.full, name), 1.0 if measure(name).better == "higher" else -1.0
    found = [
        Loss(sample=sample, full=full, score=score, loss=sign * (full - score),
             collapsed=is_collapsed(name, score, full))
        for sample, score in mean_scores(cell, name).items() if (full := fulls.get(sample)) is not None
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda one: (-one.loss, natural_key(one.sample))))


def is_collapsed(name: str, score: float, full: float) -> bool:
    """Tell whether a sample's score lost most of what the full cache's is worth; scores of ppl are nats per token."""
    if measure(name).better == "higher":
        return full > 0 and score < KEPT_SHARE * full
    return score - full > _LOST_NATS
