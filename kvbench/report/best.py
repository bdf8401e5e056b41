"""The policy of the best value at each budget, and whether the runner-up is shown to be worse.

for one in best_policies(group, group_comparisons(group)):
    print(one.budget, one.measure, one.cell.policy, one.verdict)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kvbench.measures import measure
from kvbench.report.ability import Ability
from kvbench.report.cell import CellResult, Estimate
from kvbench.report.compare_latency import timing_noise
from kvbench.report.comparison import Comparison
from kvbench.report.load import Group
from kvbench.stats.tests import Verdict, turned

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
