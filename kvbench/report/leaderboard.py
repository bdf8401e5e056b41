"""Everyone at one budget in one measure, the best first: `+experiment=leaderboard` as tables.

    for row in board(Group(model=..., dataset=..., cells=...), "ppl"):
        print(row.place, row.name, row.against_next and row.against_next.verdict)

A place is that of the estimate; whether it is one is said by the verdict against the next, of a paired difference with
its interval. All neighbours of one table share one correction (Holm's), and so do all differences to the full cache.
What holds as much as it finds to hold (`data_dependent`) has no place: its budget is not the others'. Nor has what sees
the future, nor a cell that failed. No time is compared: cells of several shards come from several processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import pairwise

import pandas as pd

from kvbench.measures import MISSING, format_value, format_with_interval, measure
from kvbench.report.compare import Ability, Comparison, compare, corrected, difference_text, difference_unit
from kvbench.report.figures.forest import Row, forest_svg
from kvbench.report.load import CellResult, Group, Results
from kvbench.report.standing import unplaced
from kvbench.report.tables import csv_text, markdown_table

TEXT_MEASURE = "ppl"
HELD, LENGTH = "realised_budget_fraction", "length_ratio"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a part of the leaderboard was measured on and by, `question` being seen or hidden while a prompt was cut.

    name: its name in +experiment=leaderboard.
    """

    title: str
    dataset: str
    task: str
    question: str = "seen"
    name: str = ""

    def has(self, cell: CellResult) -> bool:
        """Whether the cell belongs to it."""
        is_seen = bool(cell.settings.get("query_visible", True))
        tasks = cell.settings.get("task") or {self.task: {}}
        return (
            cell.labels.get("dataset") == self.dataset and self.task in tasks and is_seen == (self.question == "seen")
        )


TEXT = Part(title="text", dataset="frankenstein_long", task="perplexity", name="text")
RECALL = Part(title="recall", dataset="recall_many", task="generation", name="recall")
HIDDEN = Part(
    title="recall, question hidden", dataset="recall_many", task="generation", question="hidden", name="recall_hidden"
)
GOING_ON = Part(title="text that is gone on with", dataset="frankenstein_long", task="generation", name="rouge")
PICTURES = Part(title="pictures", dataset="scenes_asked", task="generation", name="scenes")
PARTS = (TEXT, RECALL, HIDDEN, GOING_ON, PICTURES)
RANKED = (
    (TEXT, TEXT_MEASURE),
    (RECALL, "needles_recalled_fraction"),
    (HIDDEN, "needles_recalled_fraction"),
    (GOING_ON, "rougeL_vs_full"),
    (PICTURES, "objects_recalled_fraction"),
    (PICTURES, "answers_right_fraction"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BoardRow:
    """One policy at the table's budget; `place` is None where it has none, and `remark` says why."""

    name: str
    cell: CellResult
    place: int | None = None
    against_full: Comparison | None = None
    against_next: Comparison | None = None
    remark: str = ""


def board(group: Group, name: str) -> list[BoardRow]:
    """Return the cells of one budget in the measure `name`, placed ones first, then those without a place.

    group: the full cache's cell, and those of one budget.
    """
    unable = Ability(group).reason(name)
    usable = [cell for cell in group.budgeted if cell.estimate(name)]
    placed = [cell for cell in usable if not unable and not unplaced(cell)]
    sign = -1.0 if measure(name).better == "higher" else 1.0
    placed.sort(key=lambda cell: (sign * cell.measurements[name].value, cell.sort_key))
    full = group.full
    to_full = _by_first(compare(cell, full, name) for cell in usable if full is not None)
    to_next = _by_first(compare(one, other, name) for one, other in pairwise(placed))
    rows = [
        BoardRow(
            name=group.series_label(cell), cell=cell, place=place, against_full=to_full.get(cell.key),
            against_next=to_next.get(cell.key),
        )
        for place, cell in enumerate(placed, 1)
    ]  # fmt: skip
    for cell in group.budgeted:
        if cell not in placed:
            why = f"failed: {cell.status}" if cell.failed else unable or unplaced(cell)
            if cell.failed or cell in usable:
                against = to_full.get(cell.key)
                rows.append(BoardRow(name=group.series_label(cell), cell=cell, against_full=against, remark=why))
    return rows


def _by_first(found: Iterable[Comparison | None]) -> dict[str, Comparison]:
    return {one.first.key: one for one in corrected([one for one in found if one is not None])}


def chosen_group(results: Results, part: Part, budget: float) -> Group | None:
    """Return the cells of a part at one budget, and the full cache's; None where there is none."""
    cells = [cell for cell in results.records if part.has(cell) and (cell.is_full or cell.budget_fraction == budget)]
    return Group(model=cells[0].model, dataset=cells[0].dataset, cells=tuple(cells)) if cells else None


def part_of(words: Mapping[str, str]) -> Part:
    """Return the part of a table's `dataset`, `question` and `measure`."""
    task = "perplexity" if words["measure"] == TEXT_MEASURE else "generation"
    part = Part(title="", dataset=words["dataset"], task=task, question=words.get("question", "seen"))
    alike = (one for one in PARTS if (one.dataset, one.question) == (part.dataset, part.question))
    return replace(part, name=next((one.name for one in alike if one.task == task or one is PICTURES), ""))


def _resumed_by(parts: Iterable[Part]) -> str:
    """Return the command that measures what is missing in the parts."""
    names = ",".join(part.name for part in parts)
    return f"`kvbench +experiment=leaderboard leaderboard.parts=[{names}] results=FOLDER`"


def board_markdown(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield the table of `measure` at `budget`, the full cache's value above it."""
    name, budget = words["measure"], float(words["budget"])
    group = chosen_group(results, part_of(words), budget)
    part = part_of(words)
    if group is None or not group.budgeted:
        yield f"Not measured yet: {_resumed_by([part])}."
        return
    full = group.full
    yield f"Full cache: {f'not measured yet: {_resumed_by([part])}' if full is None else _shown(full, name)}."
    yield ""
    with_length = name.endswith("_vs_full")
    heads = ["place", "policy", "cuts", measure(name).label, "held", *(["length / full"] if with_length else [])]
    heads += ["minus full", "minus the next", "against the next"]
    rows = [
        [
            MISSING if row.place is None else str(row.place),
            row.name,
            _rhythm(row.cell),
            _shown(row.cell, name),
            _value(row.cell, HELD),
            *([_value(row.cell, LENGTH)] if with_length else []),
            MISSING if row.against_full is None else difference_text(row.against_full),
            MISSING if row.against_next is None else difference_text(row.against_next),
            row.remark or (MISSING if row.against_next is None else row.against_next.verdict),
        ]
        for row in board(group, name)
    ]
    yield from markdown_table(heads, rows, "rll" + "r" * (len(heads) - 4) + "l")


def _rhythm(cell: CellResult) -> str:
    """Return when the policy cuts, in a word or two: what is generated in between it holds beside its budget."""
    every = cell.settings.get("policy", {}).get("every_tokens")
    at_steps = f"every {every} tokens" if every else "every token"
    return {"prompt": "the prompt", "prompt and decode": at_steps}.get(cell.evicts_at, MISSING)


def overview_markdown(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield every policy's values at `budget` in all that is ranked, by its place in the first of them."""
    budget = float(words["budget"])
    names: dict[str, None] = {}
    found: list[dict[str, str]] = []
    heads = ["policy"]
    for part, name in RANKED:
        if (group := chosen_group(results, part, budget)) is None:
            continue
        heads.append(f"{measure(name).label}, {part.title}")
        shown = {"full": _shown(group.full, name)} if group.full is not None else {}
        for row in board(group, name):
            place = "" if row.place is None else f" ({row.place})"
            shown[row.name] = f"{_value(row.cell, name)}{place}" if row.cell.estimate(name) else row.remark
        names |= dict.fromkeys(shown)
        found.append(shown)
    rows = [[one, *(shown.get(one, MISSING) for shown in found)] for one in names]
    yield from markdown_table(heads, rows, "l" + "r" * len(found))


def missing_markdown(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield which policies of conf/policy have no record of a part, or one that failed, and how.

    What has records at other budgets, and what the full cache lacks, can run: that is not measured yet. Of a policy
    without any record of a part that others have, the records do not tell why.
    """
    names = [entry.name for entry in (files("kvbench.conf") / "policy").iterdir()]
    known = sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
    all_cells = [cell for cell in results.records if cell.budget_fraction is not None]
    budgets = sorted({cell.budget_fraction for cell in all_cells if cell.budget_fraction is not None})
    rows, resumed = [], []
    for part in PARTS:
        cells = [cell for cell in results.records if part.has(cell)]
        there = {(cell.labels["policy"].partition(" ")[0], cell.budget_fraction) for cell in cells}
        absent = [name for name in known if name not in {policy for policy, _ in there}]
        later = [
            f"{name} at {100 * budget:g} %"
            for name in known
            if name not in ("full", *absent)
            for budget in budgets
            if (name, budget) not in there
        ]
        if cells:
            later += [name for name in absent if name == "full"]
            absent = [name for name in absent if name != "full"]
        if later or not cells:
            rows.append([part.title, ", ".join(later) if cells else "all", f"not measured yet ({part.name})"])
            resumed.append(part)
        if absent and cells:
            rows.append([part.title, ", ".join(absent), "no record: cannot run there, or not measured yet"])
        rows += [
            [part.title, f"{cell.policy}, {cell.budget}", f"{cell.status}: {cell.error[:160]}"]
            for cell in cells
            if cell.failed
        ]
    if rows:
        yield from markdown_table(["part", "policies", "why"], rows)
    else:
        yield "Every policy there is has a record in every part."
    if resumed:
        yield ""
        yield f"{_resumed_by(resumed)} goes on, FOLDER holding the records that are there."


def board_svg(results: Results, words: Mapping[str, str]) -> bytes:
    """Return every policy's difference to full in `measure`, a panel per budget, by the places of the middle one."""
    name, budgets = words["measure"], [float(budget) for budget in words["budget"].split(",")]
    part = part_of(words)
    order: list[str] = []
    panels: dict[str, dict[str, Row]] = {}
    for budget in sorted(budgets, key=lambda budget: budget != float(words["by"])):
        group = chosen_group(results, part, budget)
        rows = [] if group is None else board(group, name)
        order += [row.name for row in rows if row.name not in order]
        panels[f"{100 * budget:g} % of the tokens"] = {
            row.name: Row(value=found.value, low=found.low, high=found.high)
            for row in rows
            if (found := row.against_full) is not None
        }
    unit = difference_unit(name)[0]
    label = f"{measure(name).label} minus full{f', {unit}' if unit == 'nats/token' else ''}"
    return forest_svg(order, panels, label=label)


def boards_csv(results: Results) -> str:
    """Return a row per policy, budget and measure, in base units and full precision."""
    budgets = sorted({cell.budget_fraction for cell in results.records if cell.budget_fraction is not None})
    rows = [
        {
            "dataset": part.dataset, "question": part.question, "budget": budget, "measure": name,
            "place": row.place, "policy": row.name, "key": row.cell.key, "status": row.cell.status,
            **_numbers("", row.cell.estimate(name)), "held": _number(row.cell, HELD),
            "length_ratio": _number(row.cell, LENGTH), **_numbers("minus_full_", row.against_full),
            "verdict_against_full": None if row.against_full is None else row.against_full.verdict,
            **_numbers("minus_next_", row.against_next),
            "verdict_against_next": None if row.against_next is None else row.against_next.verdict,
            "shard": row.cell.environment.get("shard"), "gpu": row.cell.environment.get("gpu"), "remark": row.remark,
        }
        for part, name in RANKED
        for budget in budgets
        if (group := chosen_group(results, part, budget)) is not None
        for row in board(group, name)
    ]  # fmt: skip
    return csv_text(pd.DataFrame(rows))


def _numbers(prefix: str, found: object) -> dict[str, float | None]:
    return {f"{prefix}{part}": getattr(found, part, None) for part in ("value", "low", "high")}


def _number(cell: CellResult, name: str) -> float | None:
    found = cell.estimate(name)
    return None if found is None else found.value


def _value(cell: CellResult, name: str) -> str:
    return format_value(name, _number(cell, name))


def _shown(cell: CellResult, name: str) -> str:
    found = cell.estimate(name)
    return MISSING if found is None else format_with_interval(name, found.value, found.low, found.high)
