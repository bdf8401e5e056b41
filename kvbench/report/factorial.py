"""What a score, an allocation and a merge are worth: main effects and interactions, in nats per token.

    grid = grid_of(results, "frankenstein_long")
    for effect in grid.effects(("score",)): print(effect.levels, effect.value, effect.low, effect.high)

Every combination was measured on the same samples at one budget, so an effect is a sum of cells with weights, taken
sample by sample; its interval is that of a paired difference, by cluster (kvbench.stats.paired). Effects are measured
from the average over the grid (they add up to nothing over the levels of each factor): a main effect is how far the
average of a level's cells lies from the average of all, an interaction what two levels together add to their two main
effects. The cells hold the same bytes, so all differences are of what is kept. A level with a cell that failed, was
refused or is not there yet is left out, whole, so that the grid stays balanced; which one is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pandas as pd

from kvbench.measures import MISSING
from kvbench.report.compare import compare, difference_text
from kvbench.report.figures.draw import Row, forest_svg
from kvbench.report.load import CellResult, Results, clusters_of, scores_of
from kvbench.report.tables import csv_text, markdown_table
from kvbench.stats.intervals import SEED
from kvbench.stats.paired import Inference, infer, paired_sums

FACTORS = ("score", "allocation", "merge")
_MEASURE = "ppl"
_NUM_DRAWS = 2_000
_Levels = tuple[str, str, str]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What `levels` (factor -> level) add, with its interval, in nats per token."""

    levels: Mapping[str, str]
    value: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """Return "+0.123 [+0.100, +0.150]"."""
        if self.low is None or self.high is None:
            return f"{self.value:+.3f}"
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def is_clear(self) -> bool:
        """Whether the whole interval is on one side of nothing."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The measured cells of every combination of `levels`, and the full cache's; `left_out` are levels without one."""

    levels: tuple[tuple[str, ...], ...]
    cells: Mapping[_Levels, CellResult]
    full: CellResult | None
    left_out: tuple[str, ...]

    def effects(self, factors: Sequence[str]) -> list[Effect]:
        """Return the effect of every level of one factor, or every interaction of the levels of two or three."""
        totals, weights, clusters = self._sums
        places = [FACTORS.index(factor) for factor in factors]
        found = []
        for chosen in product(*(self.levels[place] for place in places)):
            contrast = self._contrast(dict(zip(places, chosen, strict=True)))
            # An effect is a weighted sum of cells over the common weight, set against nothing.
            arm = [(float(total), float(weight)) for total, weight in zip(contrast @ totals, weights, strict=True)]
            told = infer(paired_sums(arm, [(0.0, weight) for _, weight in arm], clusters))
            found.append(_effect(dict(zip(factors, chosen, strict=True)), told))
        return found

    def shares(self) -> list[tuple[tuple[str, ...], float, float, float]]:
        """Return for each factor and combination its share of the variance between cells, with a percentile interval.

        What only noise between samples makes of it is in it too, so a share that is small is not one of nothing.
        """
        totals, weights, clusters = self._sums
        names = sorted(set(clusters))
        member = np.array([[cluster == name for name in names] for cluster in clusters], dtype=np.float64)
        sums, sizes = totals @ member, weights @ member
        draws = np.random.default_rng(SEED).multinomial(len(names), [1 / len(names)] * len(names), size=_NUM_DRAWS)
        counts = np.vstack([np.ones(len(names)), draws]).astype(np.float64)
        means = (counts @ sums.T) / (counts @ sizes)[:, None]  # (1 + draws, cells), the first that of the samples
        spread = means.var(axis=1)
        found = []
        for order in (1, 2, 3):
            for factors in combinations(range(len(FACTORS)), order):
                share = self._variance(means, factors) / np.where(spread > 0, spread, 1.0)
                low, high = np.quantile(share[1:], [0.025, 0.975])
                found.append((tuple(FACTORS[place] for place in factors), float(share[0]), float(low), float(high)))
        return found

    def _variance(self, means: _Floats, factors: Sequence[int]) -> _Floats:
        """Return the mean square over the grid of the effects of `factors`, for each row of cell means."""
        sizes = [len(levels) for levels in self.levels]
        table = means.reshape(-1, *sizes)
        for place in range(len(FACTORS)):
            average = table.mean(axis=place + 1, keepdims=True)
            table = np.broadcast_to(table - average if place in factors else average, table.shape)
        return np.asarray((table**2).mean(axis=(1, 2, 3)), dtype=np.float64)

    def _contrast(self, chosen: Mapping[int, str]) -> _Floats:
        """Return each cell's weight in an effect: of a chosen factor the level less the average, else the average."""
        weights = np.ones(1)
        for place, levels in enumerate(self.levels):
            even = np.full(len(levels), 1 / len(levels))
            own = np.array([float(level == chosen.get(place)) for level in levels])
            weights = np.kron(weights, own - even if place in chosen else even)
        return weights

    @property
    def _sums(self) -> tuple[_Floats, _Floats, list[str]]:
        """Return totals (cells, samples), the samples' weights, which all cells share, and their clusters."""
        order = list(product(*self.levels))
        first = self.cells[order[0]]  # type: ignore[index]
        scores = [scores_of(self.cells[levels], _MEASURE) for levels in order]  # type: ignore[index]
        names = list(scores[0])
        weights = np.array([scores[0][name][1] for name in names])
        totals = np.array([[one[name][0] * weight / one[name][1] for name, weight in zip(names, weights, strict=True)]
                           for one in scores])  # fmt: skip
        clusters = clusters_of(first)
        return totals, weights, [clusters[name] for name in names]


def _effect(levels: Mapping[str, str], told: Inference) -> Effect:
    return Effect(levels=levels, value=told.value, low=told.low, high=told.high)


def levels_of(cell: CellResult) -> _Levels | None:
    """Return (score, allocation, merge) of a cell of the factorial, None of another one."""
    parts = cell.labels.get("policy", "").split("+")
    return (parts[0], parts[1], parts[2]) if len(parts) == len(FACTORS) else None


def grid_of(results: Results, dataset: str) -> Grid | None:
    """Return the largest balanced grid that a data set's records give; None where nothing can be compared.

    Of several cells of one combination, as a mended part leaves them, the newest counts.
    """
    of_data = sorted(
        (cell for cell in results.records if cell.labels.get("dataset") == dataset), key=lambda cell: cell.started_utc
    )
    cells = {
        levels: cell
        for cell in of_data
        if (levels := levels_of(cell)) is not None and scores_of(cell, _MEASURE) and cell.estimate(_MEASURE)
    }
    samples = {frozenset(scores_of(cell, _MEASURE)) for cell in cells.values()}
    most = max(samples, key=len, default=frozenset())
    cells = {levels: cell for levels, cell in cells.items() if scores_of(cell, _MEASURE).keys() == most}
    known = [list(dict.fromkeys(levels[place] for levels in cells)) for place in range(len(FACTORS))]
    known = [_ordered(place, levels) for place, levels in enumerate(known)]
    left_out: list[str] = []
    while missing := [levels for levels in product(*known) if levels not in cells]:
        place, level = max(
            ((place, level) for place, levels in enumerate(known) for level in levels),
            key=lambda one: sum(levels[one[0]] == one[1] for levels in missing) / _others(known, one[0]),
        )
        known[place].remove(level)
        left_out.append(f"{FACTORS[place]} {level}")
    if not all(len(levels) > 1 for levels in known):
        return None
    full = next((cell for cell in reversed(of_data) if cell.is_full and not cell.failed), None)
    return Grid(levels=tuple(map(tuple, known)), cells=cells, full=full, left_out=tuple(left_out))


def _absent(results: Results, dataset: str) -> list[tuple[int, str]]:
    """Return the levels, by the place of their factor, that no record of this data set has, and another's has."""
    found = [(cell.labels.get("dataset"), levels_of(cell)) for cell in results.records]
    mine = {level for name, levels in found if levels and name == dataset for level in enumerate(levels)}
    known = {level for _, levels in found if levels for level in enumerate(levels)}
    return sorted(known - mine)


def _ordered(place: int, levels: list[str]) -> list[str]:
    """Return the levels with the one that does nothing first."""
    return sorted(levels, key=lambda level: (level not in ("uniform", "drop"), level)) if place else sorted(levels)


def _others(known: Sequence[Sequence[str]], place: int) -> int:
    return int(np.prod([len(levels) for at, levels in enumerate(known) if at != place]))


_NOT_YET = "Not measured yet: the combinations make no grid of two levels each."


def main_effects_markdown(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield the effect of every level of every factor, best first."""
    if (grid := grid_of(results, words["dataset"])) is None:
        yield _NOT_YET
        return
    rows = [
        [factor, effect.levels[factor], effect.text, "yes" if effect.is_clear else "no"]
        for factor in FACTORS
        for effect in sorted(grid.effects((factor,)), key=lambda one: one.value)
    ]
    yield from markdown_table(["factor", "level", "from the average [nats/token]", "clear of 0"], rows, "llrl")
    absent = [f"{FACTORS[place]} {level}" for place, level in _absent(results, words["dataset"])]
    if left_out := [*grid.left_out, *(one for one in absent if one not in grid.left_out)]:
        part = "text" if words["dataset"] == "frankenstein_long" else "scenes"
        yield ""
        resumed_by = f"`kvbench +experiment=factorial factorial.parts=[{part}] results=FOLDER`"
        yield f"Left out, because a combination was refused, failed or is not measured yet: {', '.join(left_out)}."
        yield f"{resumed_by} goes on, FOLDER holding the records that are there."


def interactions_markdown(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield what two levels add to their main effects: `factors=score,allocation`, a row per level of the first."""
    if (grid := grid_of(results, words["dataset"])) is None:
        yield _NOT_YET
        return
    one, other = words["factors"].split(",")
    found = {(effect.levels[one], effect.levels[other]): effect for effect in grid.effects((one, other))}
    columns = grid.levels[FACTORS.index(other)]
    rows = [[level, *(found[level, column].text for column in columns)] for level in grid.levels[FACTORS.index(one)]]
    yield from markdown_table([f"{one} and {other}", *columns], rows, "l" + "r" * len(columns))


def shares_markdown(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield how much of the variance between cells each factor and each combination has."""
    if (grid := grid_of(results, words["dataset"])) is None:
        yield _NOT_YET
        return
    rows = [
        [" and ".join(factors), f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"]
        for factors, share, low, high in grid.shares()
    ]
    yield from markdown_table(["factor, or what several do together", "of the variance between cells"], rows, "lr")


def cells_markdown(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield every combination's difference to the full cache, a row per score and merge, a column per allocation."""
    if (grid := grid_of(results, words["dataset"])) is None:
        yield _NOT_YET
        return
    scores, allocations, merges = grid.levels
    rows = [
        [score, merge, *(_against_full(grid, (score, allocation, merge)) for allocation in allocations)]
        for score, merge in product(scores, merges)
    ]
    yield from markdown_table(["score", "merge", *allocations], rows, "ll" + "r" * len(allocations))


def _against_full(grid: Grid, levels: _Levels) -> str:
    found = None if grid.full is None else compare(grid.cells[levels], grid.full, _MEASURE)
    return MISSING if found is None else difference_text(found).removesuffix(" nats/token")


def effects_svg(results: Results, words: Mapping[str, str]) -> bytes:
    """Return the main effects as a figure, a panel for each of `dataset`, one or several."""
    rows: dict[str, None] = {}
    panels: dict[str, dict[str, Row]] = {}
    for dataset in words["dataset"].split(","):
        if (grid := grid_of(results, dataset)) is None:
            continue
        found = [
            (f"{factor}: {effect.levels[factor]}", effect) for factor in FACTORS for effect in grid.effects((factor,))
        ]
        rows |= dict.fromkeys(name for name, _ in found)
        panels[dataset] = {name: Row(value=one.value, low=one.low, high=one.high) for name, one in found}
    return forest_svg(list(rows), panels, label="from the average, nats per token")


def factorial_csv(results: Results) -> str:
    """Return a row per effect of one, two and three factors, for every data set, in nats per token."""
    rows = []
    for dataset in dict.fromkeys(cell.labels["dataset"] for cell in results.records):
        if (grid := grid_of(results, dataset)) is None:
            continue
        for order in (1, 2, 3):
            for factors in combinations(FACTORS, order):
                rows += [
                    {"dataset": dataset, "factors": "+".join(factors), **dict.fromkeys(FACTORS), **effect.levels,
                     "value": effect.value, "low": effect.low, "high": effect.high}
                    for effect in grid.effects(factors)
                ]  # fmt: skip
    return csv_text(pd.DataFrame(rows), digits=10)
