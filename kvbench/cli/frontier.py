"""`kvbench frontier`: per policy the smallest budget that is as good as full at a margin, by bisection.

kvbench frontier policy=h2o,elastic
kvbench frontier policy=h2o,snapkv measure=ppl margin=0.05 dataset=mm_vet dataset.path=FILE

Search per policy for the smallest budget that is as good as full: rungs chosen, cells run, looks read back.

A `Plan` is what is asked: a measure, a margin and a ladder of budgets. Every look is a cell of the normal sweep, so a
search that was killed finds its records and goes on.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.cli import Parser
from kvbench.config.compose import Composed
from kvbench.errors import ConfigError, KvbenchError
from kvbench.measures import MEASURES, measure, measure_named
from kvbench.report.compare import Ability, Choices, Comparison, compare
from kvbench.report.load import CellResult, Group, load_results
from kvbench.results.files import canonical_json
from kvbench.results.frontier import Frontier, Look, Outcome, Search, SearchStatus
from kvbench.stats.tests import (
    is_non_inferior,
    is_quality,
    look_confidence,
    most_looks,
    next_rung,
    smallest_margin,
    smallest_sample,
)

if TYPE_CHECKING:
    from kvbench.sweep.cell import Cell


LADDER = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
_SMALLEST_MARGIN = 1e-6
_TASKS = {
    "ppl": ["task=perplexity"],
    "ppl_released": ["task=perplexity_released"],
    "kl_to_full": ["task=fidelity"],
    "top1_agreement_fraction": ["task=fidelity"],
    "rougeL_released_vs_full": ["task=generation", "task.generation.released_rouge=true"],
}


def task_words(name: str) -> list[str]:
    """Return the settings of the task that measures `name` and nothing more than it must."""
    if re.match(r"turn\d+_", name):
        return ["task=conversation"]
    return _TASKS.get(name, ["task=generation"])


def asked(own: Mapping[str, str]) -> tuple[str, float]:
    """Return measure and margin. Raises: ConfigError."""
    name = measure_named("measure", own.get("measure", "rougeL_vs_full"), filter(is_quality, MEASURES))
    margin = _number("margin", own["margin"]) if "margin" in own else smallest_margin(name)
    assert margin is not None
    if not _SMALLEST_MARGIN <= margin < 10:
        allowed = f"at least {_SMALLEST_MARGIN:g} and below 10"
        raise ConfigError(f"margin is {own['margin']}; it must be {allowed}, in the unit of {name}")
    return name, margin


def asked_ladder(text: str | None, *, tokens: bool) -> tuple[float, ...]:
    """Return the rungs, rising. Raises: ConfigError."""
    if text is None and tokens:
        raise ConfigError("budget=tokens has no ladder of its own; add ladder=16,32,64,128")
    rungs = LADDER if text is None else tuple(_number("ladder", word) for word in text.strip("[]").split(","))
    if len(rungs) < 2 or list(rungs) != sorted(set(rungs)):
        raise ConfigError(f"ladder is {text}; it must hold at least two budgets, rising, each once")
    allowed = "whole numbers of tokens" if tokens else "shares above 0, at most 1"
    if not all((rung >= 1 and rung.is_integer()) if tokens else 0 < rung <= 1 for rung in rungs):
        raise ConfigError(f"ladder is {text}; {allowed}")
    return rungs


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}; it must be a number") from error


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked: `ladder` rises, `budget_setting` is "fraction" or "tokens"."""

    name: str
    measure: str
    margin: float
    ladder: tuple[float, ...]
    budget_setting: str
    results: Path

    @property
    def choices(self) -> Choices:
        """Return how a look is compared."""
        return Choices(margins={self.measure: self.margin}, confidence=look_confidence(len(self.ladder)))


def default_name(name: str, margin: float, ladder: Sequence[float], settings: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of a search's file: the same question has the same one, whatever versions answer it."""
    asked = {canonical_json({part: one[part] for part in one if part != "versions"}) for one in settings}
    text = canonical_json({"margin": margin, "ladder": list(ladder), "cells": sorted(asked)})
    return f"{name}-{margin:g}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _look_at(budget: float, key: str, found: Comparison, plan: Plan) -> Look:
    """Return what a comparison with full at one budget shows."""
    outcome: Outcome = "undecided"
    if found.low is not None and found.high is not None:
        higher = measure(plan.measure).better == "higher"
        if is_non_inferior(found.low, found.high, higher_is_better=higher, margin=plan.margin):
            outcome = "safe"
        elif (found.high < -plan.margin) if higher else (found.low > plan.margin):
            outcome = "worse"
    names = ("value", "low", "high", "num_samples", "num_clusters", "minimum_detectable", "reason")
    numbers: dict[str, Any] = {name: getattr(found, name) for name in names}
    realised = found.first.estimate("realised_budget_fraction")
    held = None if realised is None else realised.value
    return Look(budget=budget, outcome=outcome, key=key, realised_budget=held, **numbers)


@dataclass(kw_only=True)
class _PolicySearch:
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
                composed = _at_budget(self.composed, self.plan.budget_setting, self.plan.ladder[rung])
                self.pending = composed, cell_of(composed)
            except KvbenchError as error:
                self.looks[rung] = Look(budget=self.plan.ladder[rung], outcome="failed", reason=f"{error!s:.300}")

    def read(self, records: dict[str, CellResult]) -> None:
        """Judge the cell that was run.

        Raises: ConfigError if its task does not give the measure, or the full cache itself can not do it.
        """
        rung = self.rung
        assert self.pending is not None
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
        self.looks[rung] = _look_at(budget, key, found, self.plan)

    def result(self) -> Search:
        """Return the finished search."""
        labels, ladder, cell = self.full.labels, self.plan.ladder, cell_of(self.composed)
        safe = [rung for rung, look in self.looks.items() if look.outcome == "safe"]
        above = 1 + max((rung for rung, look in self.looks.items() if look.outcome == "worse"), default=-1)
        status: SearchStatus = "found" if safe else "no budget shown safe"
        if safe and min(safe) == 0:
            status = "every budget is safe"
        return Search(
            **{name: labels[name] for name in ("model", "dataset")},
            **{name: cell.labels[name] for name in ("policy", "positions")},
            policy_settings=dict(cell.settings["policy"]),
            full_key=self.full.key,
            status="not monotone" if self._falls() else status,
            smallest_safe=ladder[min(safe)] if safe else None,
            budget_low=ladder[above] if above < len(ladder) else None,
            looks=tuple(self.looks[rung] for rung in sorted(self.looks)),
        )

    def _falls(self) -> bool:
        """Whether some measured budget is clearly worse than a smaller one of the same policy."""
        rungs = sorted(self.cells)
        pairs = [(self.cells[b], self.cells[a]) for a in rungs for b in rungs if a < b]
        found = (compare(larger, smaller, self.plan.measure, self.plan.choices) for larger, smaller in pairs)
        return any(one is not None and one.verdict == "worse" for one in found)


def search_all(
    plan: Plan, policies: Sequence[Composed], fulls: Sequence[Composed], run: Callable[[Sequence[Composed]], None]
) -> Frontier:
    """Run all searches side by side, one look of each at a time, and return what was found."""
    by_settings = {_shared(cell): (composed, cell) for composed in fulls for cell in (cell_of(composed),)}
    distinct = {cell_of(one).key: one for one in policies}.values()
    searches = [_PolicySearch(plan=plan, composed=one, full=by_settings[_shared(cell_of(one))][1]) for one in distinct]
    needed = [composed for composed, _ in by_settings.values()]
    while True:
        for search in searches:
            search.prepare()
        active = [(search, *search.pending) for search in searches if search.pending is not None]
        if not active:
            break
        run([*needed, *(composed for _, composed, _ in active)])
        needed = []
        wanted = {key for search, _, cell in active for key in (search.full.key, cell.key)}
        records = {cell.key: cell for cell in load_results(plan.results, keys=wanted).records}
        for search, *_ in active:
            search.read(records)
    found = tuple(search.result() for search in searches)
    num_looks = sum(look.key is not None for search in found for look in search.looks)
    return Frontier(
        name=plan.name,
        measure=plan.measure,
        margin=plan.margin,
        ladder=plan.ladder,
        budget_setting=plan.budget_setting,
        confidence=look_confidence(len(plan.ladder)),
        num_cells=num_looks + len(by_settings),
        num_cells_of_grid=len(found) * len(plan.ladder) + len(by_settings),
        searches=found,
    )


def _at_budget(composed: Composed, setting: str, budget: float) -> Composed:
    """Return the same cell at another budget."""
    config = copy.deepcopy(composed.config)
    config.budget[setting] = int(budget) if setting == "tokens" else budget
    return Composed(config=config, choices=composed.choices, multirun=composed.multirun)


def cell_of(composed: Composed) -> Cell:
    """Return the typed cell. Raises: ConfigError or DataError."""
    from kvbench.config.build import build_cell

    return build_cell(composed)


def _shared(cell: Cell) -> str:
    return canonical_json(cell.shared_settings)


_OWN = ("measure", "margin", "ladder", "name")
_TEXT = """\
Per policy the smallest budget at which a quality is at most MARGIN worse than with the full cache, by bisection.

words:
  measure=rougeL_vs_full   the quality; margin=0.02: how much worse is still safe (its declared margin by default)
  ladder=0.1,0.2,0.4,0.8   budgets to choose from; by default {ladder}
  name=NAME                of the file results/frontier/NAME.json; by default measure, margin and a digest of the
                           settings, so that the same command replaces its own file and no other one

Every other KEY=VALUE is a setting of the sweep: policy=h2o,elastic model=... dataset=... budget=tokens results=FOLDER.
"""


class _Stopped(Exception):  # noqa: N818
    """A signal ended the sweep; the same command goes on."""

    def __init__(self, code: int) -> None:
        self.code = code


def frontier_command(arguments: Sequence[str]) -> int:
    """Run the search, print its table, write its file, and return the exit code. Raises: ConfigError."""
    if {"--help", "-h"} & set(arguments):
        print("usage: kvbench frontier [policy=A,B] [measure=NAME] [margin=X] [ladder=A,B,C] [KEY=VALUE ...]\n")
        print(_TEXT.format(ladder=",".join(f"{rung:g}" for rung in LADDER)))
        return 0
    parser = Parser(prog="kvbench frontier", add_help=False, allow_abbrev=False)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=os.path.abspath)
    flags, words = parser.parse_known_args(list(arguments))
    for word in words:
        if word.startswith("-") or ("=" not in word and not word.startswith("~")):
            raise ConfigError(f"{word} is neither a flag nor KEY=VALUE; kvbench frontier --help lists what there is")
    own = {name: value for name, value in (word.split("=", 1) for word in words if "=" in word) if name in _OWN}
    overrides = [word for word in words if word.split("=", 1)[0] not in _OWN]
    quality, margin = asked(own)
    ladder = asked_ladder(own.get("ladder"), tokens="budget=tokens" in overrides)
    policies, fulls = _grids(overrides, quality, ladder, flags.config_dir)
    return _search(_plan(own, quality, margin, ladder, policies), policies, fulls)


def _grids(
    overrides: list[str], quality: str, ladder: tuple[float, ...], config_dir: str | None
) -> tuple[list[Composed], list[Composed]]:
    """Return each policy's cell at the largest budget and the full cache's, all checked. Raises: ConfigError."""
    from kvbench.cli.sweep import make_importable
    from kvbench.config.compose import SUPERVISED, compose_grid

    make_importable([config_dir] if config_dir else [])
    setting = "tokens" if "budget=tokens" in overrides else "fraction"
    if any(word.startswith(("budget.fraction", "budget.tokens", "+experiment", "experiment")) for word in overrides):
        raise ConfigError("the search chooses the budget; give ladder=A,B,C instead of budgets or an experiment")
    if not any(word.startswith("policy=") for word in overrides):
        raise ConfigError("no policy is given; add policy=h2o,elastic")
    named = {word.split("=", 1)[0].lstrip("+~") for word in overrides}
    extra = [] if "task" in named else task_words(quality)
    extra += [] if "sweep" in named else ["sweep=frontier"]
    top = int(ladder[-1]) if setting == "tokens" else ladder[-1]
    policies = compose_grid([*overrides, *extra, f"budget.{setting}={top}"], multirun=True, config_dir=config_dir)
    others = [word for word in overrides if not re.match(r"[+~]*policy[.=@]", word)]
    fulls = compose_grid([*others, *extra, "policy=full"], multirun=True, config_dir=config_dir)
    for composed in [*policies, *fulls]:
        if str(composed.choices["hydra/launcher"]) != SUPERVISED:
            raise ConfigError("hydra/launcher must be supervised here: a search decides after every look")
        if composed.is_search:
            raise ConfigError("hydra/sweeper must be basic here: this search chooses the budgets itself")
        cell_of(composed)
    if any(composed.choices["policy"] == "full" for composed in policies):
        raise ConfigError("policy=full has no budget to search; it is measured by itself")
    return policies, fulls


def _plan(
    own: dict[str, str], quality: str, margin: float, ladder: tuple[float, ...], policies: list[Composed]
) -> Plan:
    from kvbench.config.build import results_folder

    cells = [cell_of(composed) for composed in policies]
    setting = "tokens" if cells[0].settings["budget"]["fraction"] is None else "fraction"
    name = own.get("name", default_name(quality, margin, ladder, [cell.settings for cell in cells]))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", name):
        raise ConfigError(f"name is {name!r}; it must be a file name of letters, digits, '.', '_' and '-'")
    return Plan(
        name=name, measure=quality, margin=margin, ladder=ladder, budget_setting=setting,
        results=results_folder(policies[0].config),
    )  # fmt: skip


def _search(plan: Plan, policies: list[Composed], fulls: list[Composed]) -> int:
    from kvbench.cli.sweep import quiet_libraries
    from kvbench.results.frontier import print_frontier, save_frontier

    quiet_libraries()
    _warn_of_few(plan, fulls[0])
    try:
        frontier = search_all(plan, policies, fulls, _run)
    except _Stopped as stopped:
        print("kvbench: stopped; finished cells are kept, the same command goes on", file=sys.stderr)
        return stopped.code
    print_frontier(frontier)
    print(f"frontier: {save_frontier(plan.results, frontier)}")
    return 0


def _run(grid: Sequence[Composed]) -> None:
    """Run the cells that have no record yet, as a sweep does."""
    from kvbench.cli.sweep import open_sweep
    from kvbench.sweep.sweep import StopRequest

    sweep = open_sweep(grid)
    with StopRequest().watching() as stop:
        sweep.run(stop)
    if stop.number is not None:
        raise _Stopped(stop.exit_code)


def _warn_of_few(plan: Plan, full: Composed) -> None:
    """Say before anything runs that a score of so few samples will hardly be shown to stay inside the margin."""
    if measure(plan.measure).unit not in ("score", "fraction"):
        return
    num = len({example.cluster for example in cell_of(full).dataset.examples()})
    needed = smallest_sample(plan.margin, look_confidence(len(plan.ladder)))
    if num < needed:
        looks = most_looks(len(plan.ladder))
        shown = f"note: {num} samples hardly show a margin of {plan.margin:g} in {looks} looks"
        print(f"{shown}, even where nothing differs; {needed} do (dataset.num_samples={needed})")
