"""Who stands first at a budget, as far as the verdicts say so: the first, whom it beats, who may be as good.

Failed cells are named and never ranked. Noisy ones are: their quality does not depend on the clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.measures import measure
from kvbench.report.cell import CellResult
from kvbench.report.comparison import Comparison
from kvbench.report.comparisons import declared_budget
from kvbench.report.judged import Judged

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
