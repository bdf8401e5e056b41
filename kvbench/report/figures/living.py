"""What the page's script draws: every cell's numbers, the leaderboards, and how each policy looks, as plain data.

Figures on the page are drawn in it by `charts.js` from this, as SVG with real text, so that a reader may point at a
mark, hide a policy, choose another measure; `draw` makes the files for papers from the same records with the same
colours, markers and lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as Outline

from kvbench.measures import TASK_MEASURES, format_value, measure
from kvbench.report.compare import Ability, difference_unit, size_text, timing_noise
from kvbench.report.figures.costs import RATE, rates_of
from kvbench.report.figures.pareto import searches_of
from kvbench.report.figures.style import COLOUR_NAMES, Mark, Palette, axis_scale, marks_of
from kvbench.report.first_screen import COST_TEXTS, board_measures, board_rows
from kvbench.report.load import CellResult, Estimate, Group, mean_scores, natural_key
from kvbench.report.markup import budget_size
from kvbench.report.standing import Judged, asked_budget
from kvbench.results.frontier import Frontier, Search, difference_of, held_text

COSTS = (
    *("kv_stored_bytes", "tpot_ms", "tpot_ratio_to_full", "ttft_ms", "ttft_ratio_to_full", "tpot_p90_ms"),
    *("throughput_tokens_per_s", "throughput_ratio_to_full", "roof_share_fraction", "policy_ms", "settle_ms"),
    *("peak_memory_bytes", "peak_over_bound_ratio", "capacity_prompts", "capacity_ratio_to_full"),
    *("capacity_throughput_tokens_per_s", "capacity_throughput_ratio_to_full", "realised_budget_fraction"),
)
PARTS = ("peak_load_bytes", "plain_activation_bytes", "kv_stored_bytes", "peak_memory_bytes", "roof_ms")
_QUALITIES = (
    *(*TASK_MEASURES, "objects_f1", "needles_f1", "rougeL_vs_full", "ppl", "rougeL_vs_reference", "kl_to_full"),
    *("top1_agreement_fraction", "length_ratio", "ppl_released", "rougeL_released_vs_full"),
)
_MOST_STEPS = 60  # of a curve; a screen shows no more
_DASHED = (6.0, 1.6)


def group_data(judged: Judged, palette: Palette, frontiers: Iterable[Frontier] = ()) -> dict[str, Any]:
    """Return one model and data set for the script, with the searches for a smallest safe budget in it."""
    group = judged.group
    marks, series = marks_of(group, palette), list(group.by_series())
    ranked = board_measures(judged)
    names = [
        name
        for name in dict.fromkeys((*ranked, *_QUALITIES, *COSTS, *PARTS))
        if any(cell.estimate(name) for cell in group.cells)
    ]
    ability = Ability(group)
    boards = {budget: {name: board_rows(judged, budget, name) for name in ranked} for budget in group.by_budget}
    every = [row for board in boards.values() for rows in list(board.values())[:1] for row in rows]
    costs = {row["cell"]: {part: row[part] for part in COST_TEXTS if row[part]} for row in every}
    return {
        "title": group.title,
        "asked": asked_budget(judged) or "",
        "budgets": list(group.by_budget),
        "policies": [{"name": label, **look_of(marks[label])} for label in series],
        "ranked": list(ranked),
        "qualities": [name for name in names if name in _QUALITIES or name in judged.qualities],
        "costs": [name for name in COSTS if name in names],
        "measures": {name: _measure(name, group, reason=ability.reason(name)) for name in names},
        "cells": [_cell(group, cell, series, names) for cell in group.cells],
        "boards": {
            budget: {name: list(map(_lean, rows)) for name, rows in board.items()} for budget, board in boards.items()
        },
        "costs_of": costs,
        "lost": _lost(judged),
        "safe": [_safe(group, palette, *found) for found in searches_of(group, frontiers)],
    }


def _lean(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a leaderboard's row without what is empty, and what is the cell's own and stands once."""
    return {part: found for part, found in row.items() if found not in ("", []) and part not in COST_TEXTS}


def look_of(mark: Mark) -> dict[str, Any]:
    """Return colour (a name of the theme), the marker's outline around 0, its fill, and the dashes of its line."""
    line = _DASHED if mark.line == "--" else () if isinstance(mark.line, str) else mark.line[1]
    return {
        "colour": COLOUR_NAMES[mark.colour],
        "outline": outline(mark.marker),
        "fill": mark.fill,
        "dash": " ".join(f"{1.6 * part:g}" for part in line),
    }


def outline(marker: Any) -> str:
    """Return matplotlib's marker as the path of an SVG, one wide and high or less, y downwards."""
    style = MarkerStyle(marker)
    path = style.get_path().transformed(style.get_transform())
    parts: list[str] = []
    letters = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
    for points, code in path.iter_segments(curves=True, simplify=False):
        if code == Outline.CLOSEPOLY:
            parts.append("Z")
            continue
        numbers = np.asarray(points, dtype=float).reshape(-1, 2) * (1.0, -1.0)
        parts.append(letters[code] + " ".join(f"{number + 0.0:.3g}" for number in numbers.ravel()))
    return "".join(parts)


def _measure(name: str, group: Group, *, reason: str) -> dict[str, Any]:
    known, scale = measure(name), axis_scale(name, group.cells)
    return {
        "label": known.label, "title": known.title, "better": known.better, "unit": scale.label,
        "factor": scale.factor, "share": known.unit in ("score", "fraction"), "reason": reason,
    }  # fmt: skip


def _cell(group: Group, cell: CellResult, series: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    found = {name: _number(name, one) for name in names if (one := cell.estimate(name))}
    noise = {part: why for part in ("tpot", "ttft") if (why := timing_noise(cell, f"{part}_ratio_to_full"))}
    curve = cell.curves.get("entries") if not cell.failed else None
    size = budget_size(cell)
    return {
        "key": cell.key[:16],
        "policy": series.index(group.series_label(cell)),
        "budget": "" if cell.is_full else cell.budget,
        "size": None if size >= 1e18 else _short(size),
        "status": cell.status,
        "numbers": found,
        **({"noise": noise} if noise else {}),
        **({"entries": _thinned(curve)} if isinstance(curve, list) and curve else {}),
        **({"rates": [[size, *_number(RATE, rate)] for size, rate in rates]} if (rates := rates_of(cell)) else {}),
    }


def _number(name: str, found: Estimate) -> list[Any]:
    """Return value, low, high, n and the value's text."""
    low, high = (None if bound is None else _short(bound) for bound in (found.low, found.high))
    return [_short(found.value), low, high, found.n, format_value(name, found.value)]


def _short(number: float) -> float:
    """Return the number with six digits, which is more than a screen shows."""
    return float(f"{number:.6g}")


def _thinned(curve: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return seen tokens, mean and most entries at so many steps, the first and the last among them, a list each."""
    step = max(1, -(-len(curve) // _MOST_STEPS))
    kept = [*curve[::step], *([curve[-1]] if (len(curve) - 1) % step else [])]
    return [[_short(float(row[part])) for row in kept] for part in range(3)]


def _safe(group: Group, palette: Palette, frontier: Frontier, searches: Sequence[Search]) -> dict[str, Any]:
    """Return a search file for the script: by policy the smallest safe budget, and what was seen at each."""
    factor = 100.0 if frontier.budget_setting == "fraction" else 1.0
    known = {cell.key: cell for cell in group.cells}
    rows = []
    for search in searches:
        cell = next((known[one.key] for one in search.looks if one.key in known), None)
        name = search.policy if cell is None else group.series_label(cell)
        rows.append({
            "name": name, "look": look_of(palette.mark(search.policy, search.positions)), "status": search.status,
            "safe": None if search.smallest_safe is None else _short(factor * search.smallest_safe),
            "low": None if search.budget_low is None else _short(factor * search.budget_low),
            "held": held_text(frontier, search),
            "looks": [
                {"budget": _short(factor * one.budget), "outcome": one.outcome, "key": (one.key or "")[:16],
                 "difference": difference_of(one) or one.reason, "n": one.num_samples} for one in search.looks
            ],
        })  # fmt: skip
    unit = difference_unit(frontier.measure)[0]
    margin = f"{size_text(frontier.measure, frontier.margin)} {unit}".strip()
    return {
        "title": f"Smallest budget at which {measure(frontier.measure).label} is at most {margin} worse than full",
        "unit": " %" if factor > 1 else "", "ladder": [_short(factor * rung) for rung in frontier.ladder],
        "label": "tokens kept (%)" if factor > 1 else "entries per layer and KV head", "rows": rows,
    }  # fmt: skip


def _lost(judged: Judged) -> dict[str, Any] | None:
    """Return every sample's difference to the full cache in the leading quality, the samples that lose most first."""
    group, name = judged.group, judged.primary
    if name is None or group.full is None:
        return None
    full = mean_scores(group.full, name)
    by_cell: dict[int, dict[str, float]] = {}
    for index, cell in enumerate(group.cells):
        if not cell.is_full and not cell.failed:
            scores = mean_scores(cell, name)
            by_cell[index] = {sample: score - full[sample] for sample, score in scores.items() if sample in full}
    samples = {sample for differences in by_cell.values() for sample in differences}
    if not samples:
        return None
    sign = 1.0 if measure(name).better == "higher" else -1.0
    means = {
        sample: sign * float(np.mean([one[sample] for one in by_cell.values() if sample in one])) for sample in samples
    }
    order = sorted(samples, key=lambda sample: (means[sample], natural_key(sample)))
    rows = {
        index: [float(f"{one[sample]:.4g}") if sample in one else None for sample in order]
        for index, one in by_cell.items()
    }
    unit = "nats per token" if measure(name).unit == "ppl" else ""
    return {"measure": name, "unit": unit, "samples": order, "cells": rows}
