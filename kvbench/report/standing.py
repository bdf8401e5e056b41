"""Who stands first in a group and what a policy loses there, as far as the verdicts say so.

    judged = judge(group)
    judged.against_full(cell, judged.primary).verdict
    for one in best_policies(group, group_comparisons(group)):
        print(one.budget, one.measure, one.cell.policy, one.verdict)

`judge` holds every comparison of a group at hand. `standing_at` ranks the cells of one budget: the first, whom it
beats, who may be as good; failed cells are named and never ranked, noisy ones are, since their quality does not depend
on the clock. `losses_of` gives the samples that a policy loses. A sample collapses where its score is under half of
the full cache's; in perplexity, where its tokens are on average more than one nat less likely. Samples on which the
full cache itself scores nothing can not collapse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kvbench.measures import MAX_TURNS, measure
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
    timing_noise,
    withheld,
)
from kvbench.report.compare import judged as corrected
from kvbench.report.load import CellResult, Estimate, Group, mean_scores, natural_key
from kvbench.stats.tests import is_latency_ratio, turned

OTHER_QUALITIES = (
    *("objects_recalled_fraction", "needles_recalled_fraction", "ppl", "rougeL_vs_reference", "kl_to_full"),
    *("ppl_released", *(f"turn{turn}_rougeL_vs_full" for turn in range(2, MAX_TURNS + 1))),
)
MOST_PAIRS = 500
_TIME_RATIOS = ("tpot_ratio_to_full", "ttft_ratio_to_full")
_FULL_KEPT = ("better", "equivalent")
_KEPT_SHARE = 0.5
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
    names = (*PRIMARY_QUALITIES, *OTHER_QUALITIES, *_TIME_RATIOS)
    found = group_comparisons(group, choices, names, between=num_pairs <= MOST_PAIRS)
    by_pair = {(one.measure, one.first.key, one.second.key): one for one in found}
    return Judged(
        group=group, primary=_primary(group), by_pair=by_pair, choices=choices, num_pairs=num_pairs,
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


def _primary(group: Group) -> str | None:
    for cells in (group.budgeted, group.cells):
        for name in PRIMARY_QUALITIES:
            if any(cell.estimate(name) for cell in cells):
                return name
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
    if not (ranked := _ranked(cells, name)):
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
        return full > 0 and score < _KEPT_SHARE * full
    return score - full > _LOST_NATS
