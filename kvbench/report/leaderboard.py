"""Everyone at one budget in one measure, the best first: `+experiment=leaderboard` as tables.

    for place in board(judged_part(results, RECALL, "ppl"), 0.2, "ppl"):
        print(place.rank, place.policy, place.word)

Places and verdicts are those of the page (`first_screen.leaderboard`): a place is that of the estimate; whether it is
one is said by the verdict against the next. What holds as much as it finds to hold (`data_dependent`) has no place: its
budget is not the others'. Nor has what sees the future, nor a cell that failed. No time is compared: cells of several
shards come from several processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files

import pandas as pd

from kvbench.errors import check_known
from kvbench.measures import MISSING, format_value, format_with_interval, measure
from kvbench.report.compare import difference_text, difference_unit
from kvbench.report.figures.draw import Row, forest_svg
from kvbench.report.first_screen import NOT_MEASURED, Place, leaderboard
from kvbench.report.load import CellResult, Group, Results
from kvbench.report.standing import Judged, judge
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


def board(judged: Judged, budget: float, name: str) -> list[Place]:
    """Return the cells of one budget in the measure `name` that have it or failed, placed ones first."""
    label = next((one for one, cells in judged.group.by_budget.items() if cells[0].budget_fraction == budget), "")
    places = leaderboard(judged, label, name)
    return [place for place in places if not place.cell.is_full and place.reason != NOT_MEASURED]


def judged_part(results: Results, part: Part, name: str) -> Judged | None:
    """Return the cells of a part and their comparisons in the measure; None where there is no cell.

    Of several cells of one policy at one budget, as a mended policy leaves them, the newest that did not fail counts.
    """
    mine = [cell for cell in results.records if part.has(cell)]
    mine.sort(key=lambda cell: (not cell.failed, cell.started_utc))
    newest = {(cell.labels["policy"], cell.positions, cell.budget_fraction): cell.key for cell in mine}
    keys = set(newest.values())
    cells = tuple(cell for cell in results.records if cell.key in keys)
    return judge(Group(model=cells[0].model, dataset=cells[0].dataset, cells=cells), only=(name,)) if cells else None


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
    part = part_of(words)
    judged = judged_part(results, part, name)
    if judged is None or not (places := board(judged, budget, name)):
        yield f"Not measured yet: {_resumed_by([part])}."
        return
    full = judged.group.full
    yield f"Full cache: {f'not measured yet: {_resumed_by([part])}' if full is None else _shown(full, name)}."
    yield ""
    with_length = name.endswith("_vs_full")
    heads = ["place", "policy", "cuts", measure(name).label, "held", *(["length / full"] if with_length else [])]
    heads += ["minus full", "minus the next", "against the next"]
    rows = [
        [
            MISSING if place.rank is None else str(place.rank),
            place.policy,
            _rhythm(place.cell),
            _shown(place.cell, name),
            _value(place.cell, HELD),
            *([_value(place.cell, LENGTH)] if with_length else []),
            difference_text(found) if (found := judged.against_full(place.cell, name)) else MISSING,
            difference_text(place.next) if place.next else MISSING,
            _remark(place) or (place.next.verdict if place.next else MISSING),
        ]
        for place in places
    ]
    yield from markdown_table(heads, rows, "rll" + "r" * (len(heads) - 4) + "l")


def _remark(place: Place) -> str:
    """Return why a cell has no place."""
    return f"failed: {place.reason}" if place.cell.failed else place.reason


def _rhythm(cell: CellResult) -> str:
    """Return when the policy cuts, in a word or two: what is generated in between it holds beside its budget."""
    every = cell.settings.get("policy", {}).get("every_tokens")
    at_steps = f"every {every} tokens" if every else "every token"
    return {"prompt": "the prompt", "prompt and decode": at_steps}.get(cell.evicts_at, MISSING)


def overview_markdown(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield every policy's values at `budget` in all that is ranked, by its place in the first of them.

    `parts` and `policies`: some of them, with intervals, since there is room. Raises: ConfigError for an unknown one.
    """
    budget = float(words["budget"])
    parts, some = words["parts"].split(",") if "parts" in words else None, words.get("policies")
    check_all("a part", parts or (), (part.name for part in PARTS))
    wanted = check_all("a policy", some.split(",") if some else (), known_policies(results))
    names: dict[str, None] = {}
    found: list[dict[str, str]] = []
    heads = ["policy"]
    for part, name in RANKED:
        if (parts and part.name not in parts) or (judged := judged_part(results, part, name)) is None:
            continue
        heads.append(f"{measure(name).label}, {part.title}")
        full = judged.group.full
        shown = {"full": _shown(full, name)} if full is not None else {}
        for place in board(judged, budget, name):
            rank = "" if place.rank is None else f" ({place.rank})"
            value = _shown(place.cell, name) if some else _value(place.cell, name)
            shown[place.policy] = f"{value}{rank}" if place.quality else _remark(place)
        names |= dict.fromkeys(shown)
        found.append(shown)
    chosen = [one for one in names if some is None or one.partition(" ")[0] in wanted]
    rows = [[one, *(shown.get(one, MISSING) for shown in found)] for one in chosen]
    yield from markdown_table(heads, rows, "l" + "r" * len(found))


def known_policies(results: Results) -> set[str]:
    """Return the names of conf/policy and of the records, which may hold others, without positions and remarks."""
    return {*_shipped(), *(cell.labels["policy"].partition(" ")[0] for cell in results.records)}


def _shipped() -> list[str]:
    names = [entry.name for entry in (files("kvbench.conf") / "policy").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def check_all(what: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names that a table's block asks for. Raises: ConfigError for one that is not known."""
    chosen, all_known = list(names), list(known)
    for name in chosen:
        check_known(f"{what} of a table", name, all_known)
    return chosen


def missing_markdown(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield which policies of conf/policy have no record of a part, or one that failed, and how.

    What has records at other budgets, and what the full cache lacks, can run: that is not measured yet. Of a policy
    without any record of a part that others have, the records do not tell why.
    """
    known = _shipped()
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
    judged = judged_part(results, part_of(words), name)
    order: list[str] = []
    panels: dict[str, dict[str, Row]] = {}
    for budget in sorted(budgets, key=lambda budget: budget != float(words["by"])):
        places = board(judged, budget, name) if judged else []
        order += [place.policy for place in places if place.policy not in order]
        panels[f"{100 * budget:g} % of the tokens"] = {
            place.policy: Row(value=found.value, low=found.low, high=found.high)
            for place in places
            if judged and (found := judged.against_full(place.cell, name)) is not None
        }
    unit = difference_unit(name)[0]
    label = f"{measure(name).label} minus full{f', {unit}' if unit == 'nats/token' else ''}"
    return forest_svg(order, panels, label=label)


def boards_csv(results: Results) -> str:
    """Return a row per policy, budget and measure, in base units, to 10 digits."""
    budgets = sorted({cell.budget_fraction for cell in results.records if cell.budget_fraction is not None})
    rows = [
        {
            "dataset": part.dataset, "question": part.question, "budget": budget, "measure": name,
            "place": place.rank, "policy": place.policy, "key": place.cell.key, "status": place.cell.status,
            **_numbers("", place.quality), "held": _number(place.cell, HELD),
            "length_ratio": _number(place.cell, LENGTH),
            **_numbers("minus_full_", to_full := judged.against_full(place.cell, name)),
            "verdict_against_full": to_full.verdict if to_full else None,
            **_numbers("minus_next_", place.next),
            "verdict_against_next": place.next.verdict if place.next else None,
            "shard": place.cell.environment.get("shard"), "gpu": place.cell.environment.get("gpu"),
            "remark": _remark(place),
        }
        for part, name in RANKED
        if (judged := judged_part(results, part, name)) is not None
        for budget in budgets
        for place in board(judged, budget, name)
    ]  # fmt: skip
    return csv_text(pd.DataFrame(rows), digits=10)


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
