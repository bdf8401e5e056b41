"""Search per policy for the smallest budget that is as good as full: rungs chosen, cells run, looks read back.

Every look is a cell of the normal sweep, so a search that was killed finds its records and goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvbench.compose import Composed
from kvbench.errors import ConfigError, KvbenchError
from kvbench.frontier_look import Plan, above, look_at
from kvbench.report.ability import Ability
from kvbench.report.cell import CellResult
from kvbench.report.compare_cells import compare
from kvbench.report.frontier import Frontier, Look, Search, SearchStatus
from kvbench.report.load import Group, load_results
from kvbench.results.files import canonical_json
from kvbench.stats.power import look_confidence, next_rung

if TYPE_CHECKING:
    from kvbench.sweep.cell import Cell

Run = Callable[[Sequence[Composed]], None]


@dataclass(kw_only=True)
class PolicySearch:
    """One policy on its way: its cell at any budget, the full cache's cell, and the looks so far by rung."""

    plan: Plan
    composed: Composed
    full: Cell
    looks: dict[int, Look] = field(default_factory=dict)
    cells: dict[int, CellResult] = field(default_factory=dict)
    pending: tuple[Composed, Cell] | None = None

    @property
    def rung(self) -> int | None:
        """Return the rung to look at next."""
        return next_rung(len(self.plan.ladder), {rung: look.outcome == "safe" for rung, look in self.looks.items()})

    def prepare(self) -> None:
        """Set the next cell to run; a budget that the policy refuses is a look without one."""
        self.pending = None
        while self.pending is None and (rung := self.rung) is not None:
            try:
                composed = at_budget(self.composed, self.plan.budget_setting, self.plan.ladder[rung])
                self.pending = composed, cell_of(composed)
            except KvbenchError as error:
                self.looks[rung] = Look(budget=self.plan.ladder[rung], outcome="failed", reason=f"{error!s:.300}")

    def read(self, records: dict[str, CellResult]) -> None:
        """Judge the cell that was run.

        Raises: ConfigError if its task does not give the measure, or the full cache itself can not do it.
        """
        assert self.pending is not None
        rung = self.rung
        assert rung is not None
        key, budget = self.pending[1].key, self.plan.ladder[rung]
        cell, full = records.get(key), records.get(self.full.key)
        if full is None or full.failed:
            raise ConfigError(
                f"the full cache's cell {self.full.key[:16]} is not ok, so nothing can be compared with it"
            )
        group = Group(model=full.model, dataset=full.dataset, cells=(full,))
        if cause := Ability(group).cause(self.plan.measure):
            raise ConfigError(
                f"no budget of {group.title} can be called safe: {cause}; take another data set or model, or longer "
                "answers"
            )
        if cell is None or cell.failed:
            status = "not measured" if cell is None else f"{cell.status}: {cell.error:.200}"
            self.looks[rung] = Look(budget=budget, outcome="failed", key=key, reason=status)
            return
        found = compare(cell, full, self.plan.measure, self.plan.choices)
        if found is None:
            raise ConfigError(f"measure={self.plan.measure} is not measured by this task on this data set")
        self.cells[rung] = cell
        self.looks[rung] = look_at(budget, key, found, self.plan)

    def result(self) -> Search:
        """Return the finished search."""
        labels, ladder = self.full.labels, self.plan.ladder
        safe = [rung for rung, look in self.looks.items() if look.outcome == "safe"]
        worse = [rung for rung, look in self.looks.items() if look.outcome == "worse"]
        cell = cell_of(self.composed)
        return Search(
            model=labels["model"],
            dataset=labels["dataset"],
            policy=cell.labels["policy"],
            positions=cell.labels["positions"],
            policy_settings=dict(cell.settings["policy"]),
            full_key=self.full.key,
            status=self._status(safe),
            smallest_safe=ladder[min(safe)] if safe else None,
            budget_low=above(ladder, max(worse, default=-1)),
            looks=tuple(self.looks[rung] for rung in sorted(self.looks)),
        )

    def _status(self, safe: list[int]) -> SearchStatus:
        if self._falls():
            return "not monotone"
        if not safe:
            return "no budget shown safe"
        return "every budget is safe" if min(safe) == 0 else "found"

    def _falls(self) -> bool:
        """Whether some measured budget is clearly worse than a smaller one of the same policy."""
        rungs = sorted(self.cells)
        pairs = [(self.cells[b], self.cells[a]) for a in rungs for b in rungs if a < b]
        found = (compare(larger, smaller, self.plan.measure, self.plan.choices) for larger, smaller in pairs)
        return any(one is not None and one.verdict == "worse" for one in found)


def search_all(plan: Plan, policies: Sequence[Composed], fulls: Sequence[Composed], run: Run) -> Frontier:
    """Run all searches side by side, one look of each at a time, and return what was found."""
    by_settings = {_shared(cell): (composed, cell) for composed in fulls for cell in (cell_of(composed),)}
    distinct = {cell_of(one).key: one for one in policies}.values()
    searches = [PolicySearch(plan=plan, composed=one, full=by_settings[_shared(cell_of(one))][1]) for one in distinct]
    needed = [composed for composed, _ in by_settings.values()]
    while True:
        for search in searches:
            search.prepare()
        active = [search for search in searches if search.pending is not None]
        if not active:
            break
        run([*needed, *(search.pending[0] for search in active if search.pending is not None)])
        needed = []
        wanted = {search.full.key for search in active} | {search.pending[1].key for search in active if search.pending}
        records = {cell.key: cell for cell in load_results(plan.results, keys=wanted).records}
        for search in active:
            search.read(records)
    return _frontier(plan, [search.result() for search in searches], len(by_settings))


def at_budget(composed: Composed, setting: str, budget: float) -> Composed:
    """Return the same cell at another budget."""
    config = copy.deepcopy(composed.config)
    config.budget[setting] = int(budget) if setting == "tokens" else budget
    return Composed(config=config, choices=composed.choices, multirun=composed.multirun)


def cell_of(composed: Composed) -> Cell:
    """Return the typed cell. Raises: ConfigError or DataError."""
    from kvbench.config import build_cell

    return build_cell(composed)


def _shared(cell: Cell) -> str:
    return canonical_json(cell.shared_settings)


def _frontier(plan: Plan, searches: Sequence[Search], num_fulls: int) -> Frontier:
    num_looks = sum(look.key is not None for search in searches for look in search.looks)
    return Frontier(
        name=plan.name,
        measure=plan.measure,
        margin=plan.margin,
        ladder=plan.ladder,
        budget_setting=plan.budget_setting,
        confidence=look_confidence(len(plan.ladder)),
        num_cells=num_looks + num_fulls,
        num_cells_of_grid=len(searches) * len(plan.ladder) + num_fulls,
        searches=tuple(searches),
    )
