"""A group with its verdicts at hand: each cell against full, and any two policies at one budget.

judged = judge(group)
judged.against_full(cell, judged.primary).verdict

Who stands first at a budget, as far as the verdicts say so: the first, whom it beats, who may be as good.

Failed cells are named and never ranked. Noisy ones are: their quality does not depend on the clock.

The policy of the best value at each budget, and whether the runner-up is shown to be worse.

for one in best_policies(group, group_comparisons(group)):
    print(one.budget, one.measure, one.cell.policy, one.verdict)

Which samples a policy loses: their scores beside the full cache's, and where they collapse.

A sample collapses where its score is under half of the full cache's; in perplexity, where its tokens are on average
more than one nat less likely. Samples on which the full cache itself scores nothing can not collapse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from kvbench.measures import MAX_TURNS, measure
from kvbench.report.ability import Ability
from kvbench.report.compare import (
    DECLARED,
    PRIMARY_QUALITIES,
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
from kvbench.report.load import CellResult, Estimate, Group, natural_key, sample_score
from kvbench.stats.tests import Verdict, is_latency_ratio, turned

OTHER_QUALITIES = (
    *("objects_recalled_fraction", "needles_recalled_fraction", "ppl", "rougeL_vs_reference", "kl_to_full"),
    "ppl_released",
    *(f"turn{turn}_rougeL_vs_full" for turn in range(2, MAX_TURNS + 1)),
)
MOST_PAIRS = 500
TIME_RATIOS = ("tpot_ratio_to_full", "ttft_ratio_to_full")


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
        found = self.by_pair.get((name, first.key, second.key))
        if found is not None:
            return found
        found = self.by_pair.get((name, second.key, first.key))
        if found is not None or self.num_pairs <= MOST_PAIRS:
            return None if found is None else swapped(found)
        found = compare(first, second, name, self.choices)
        if found is None:
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
    names = (*PRIMARY_QUALITIES, *OTHER_QUALITIES, *TIME_RATIOS)
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


FULL_KEPT = ("better", "equivalent")


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
    ranked = _ranked([cell for cell in cells if not cell.failed], name)
    if not ranked:
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
        and found.verdict in FULL_KEPT
        and not cell.failed
    ]


def _ranked(cells: list[CellResult], name: str) -> list[CellResult]:
    sign = -1.0 if measure(name).better == "higher" else 1.0
    valued = [(sign * found.value, cell.sort_key, cell) for cell in cells if (found := cell.estimate(name))]
    return [cell for _, _, cell in sorted(valued, key=lambda item: item[:2])]


_Verdicts = Mapping[tuple[str, str, str], Verdict]  # by measure and the keys of both cells


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
    verdicts = {(one.measure, one.first.key, one.second.key): one.verdict for one in compared}
    ability = Ability(group)
    names = dict.fromkeys(
        name for name, _, _ in verdicts if measure(name).better != "none" and not ability.reason(name)
    )
    budgets = dict.fromkeys(cell.budget for cell in group.budgeted if not cell.failed)
    return tuple(best for budget in budgets for name in names for best in _best(group, budget, name, verdicts))


def _best(group: Group, budget: str, name: str, verdicts: _Verdicts) -> Iterator[Best]:
    usable = [
        (found, cell)
        for cell in group.budgeted
        if cell.budget == budget and (found := cell.estimate(name)) and not timing_noise(cell, name)
    ]
    ranked = sorted(usable, key=lambda pair: pair[0].value, reverse=measure(name).better == "higher")
    if len(ranked) > 1:
        (found, first), (_, second) = ranked[:2]
        verdict = _verdict(verdicts, name, first, second)
        yield Best(budget=budget, measure=name, cell=first, estimate=found, runner_up=second, verdict=verdict)


def _verdict(verdicts: _Verdicts, name: str, first: CellResult, second: CellResult) -> str:
    """Return what is known of the first cell against the second, whichever way round they were compared."""
    found = verdicts.get((name, first.key, second.key))
    if found is not None:
        return found
    found = verdicts.get((name, second.key, first.key))
    return "not compared" if found is None else turned(found)


KEPT_SHARE = 0.5
LOST_NATS = 1.0


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
    others = scores_of(group.full, name)
    found = [
        _loss(identity, others[identity], score, name)
        for identity, score in scores_of(cell, name).items()
        if identity in others
    ]
    return tuple(sorted(found, key=lambda one: (-one.loss, natural_key(one.sample))))


def scores_of(cell: CellResult, name: str) -> Mapping[str, float]:
    """Return each sample's score by its id; a perplexity's is nats per token."""
    scored = ((str(sample.get("id")), sample_score(sample, name)) for sample in cell.samples)
    return {identity: score[0] / score[1] for identity, score in scored if score is not None}


def is_collapsed(name: str, score: float, full: float) -> bool:
    """Tell whether a sample's score lost most of what the full cache's is worth; scores of ppl are nats per token."""
    if measure(name).better == "higher":
        return full > 0 and score < KEPT_SHARE * full
    return score - full > LOST_NATS


def _loss(sample: str, full: float, score: float, name: str) -> Loss:
    loss = full - score if measure(name).better == "higher" else score - full
    return Loss(sample=sample, full=full, score=score, loss=loss, collapsed=is_collapsed(name, score, full))
