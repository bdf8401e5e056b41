"""What an audit looks at, the records of a folder read and grouped, and what a check of them is.

A check is a function of a cell and of its peers, the cells that ran the same prompts on the same model. It yields
a sentence for each thing that is wrong, and a `Note` for what a reader should know and that is no fault:

    @check("R12", "dates and durations can have happened", "dates or durations were changed")
    def times(cell: Cell, peers: Peers) -> Iterator[str]: ...

What the policies and data sets of kvbench itself are is read from the configuration as text, so that a label alone
cannot rename them and no class is loaded.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from kvbench.errors import ConfigError, RecordError, close_matches
from kvbench.measures import budget_words
from kvbench.results.files import canonical_json
from kvbench.results.record import MEASURED, check_results_folder, read_record

_Value = TypeVar("_Value")
Group = Literal["policy", "dataset"]
Verdict = Literal["passed", "failed", "not applicable", "not run"]
# Cells that agree in these ran the same prompts, and share the full cache's answers.
_SHARED = ("model", "dataset", "query_visible", "batch_size", "device", "versions", "cache_semantics")
# A sealed record may hold text where a number belongs, here or in a cell it is compared with.
_WRONG_TYPES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
_TARGET = re.compile(r"^_target_:\s*(\S+)", re.MULTILINE)
_POLICIES = "kvbench.policies"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One cell: the body of its accepted record, the name of its folder, and the bodies of all its attempts.

    Each is itself alone (`eq=False`), so that what is worked out about one can be kept.
    """

    body: Mapping[str, Any]
    folder: str
    attempts: tuple[Mapping[str, Any], ...]

    @cached_property
    def name(self) -> str:
        """First digits of the key, policy and budget."""
        parts = [self.label(part) for part in ("policy", "budget", "positions")]
        shown = [budget_words(str(part)) for part in parts if part not in (None, "-", "original")]
        return f"{self.folder[:8]} {', '.join(shown)}"

    @property
    def usable(self) -> bool:
        """Whether its numbers count."""
        return self.body["status"] in MEASURED

    @property
    def is_full(self) -> bool:
        """Whether it calls itself the full cache."""
        return bool(self.label("policy") == "full")

    @cached_property
    def samples(self) -> Sequence[Mapping[str, Any]]:
        """Rows by sample."""
        return [row for row in self.body["samples"] if isinstance(row, dict)]

    @cached_property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """Rows by id."""
        return {str(row.get("id")): row for row in self.samples}

    @property
    def num_left_out(self) -> int:
        """How many samples it says were left out."""
        return len(self.body.get("skipped_items") or ())

    def label(self, name: str) -> Any:
        """Return what it is labelled, None without such a label."""
        return self.body["labels"].get(name)

    def setting(self, *names: str) -> Any:
        """Return the setting at a path, None where there is none."""
        found: Any = self.body["cell"]
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def task(self, kind: str) -> Mapping[str, Any] | None:
        """Return the settings of the task whose class is `kind`, None if it was not asked for."""
        tasks = self.setting("task")
        for task in tasks.values() if isinstance(tasks, Mapping) else ():
            if isinstance(task, Mapping) and re.split("[.:]", class_of(task))[-1] == kind:
                return task
        return None

    def value(self, name: str, part: str = "value") -> float | None:
        """Return value, low, high or n of a measurement; None if it is missing or null, or the cell failed."""
        found = self.body["measurements"].get(name, {}).get(part) if self.usable else None
        return found if is_number(found) else None

    def curve(self, name: str, width: int) -> list[list[float]]:
        """Return the rows of a curve that hold `width` numbers."""
        rows = self.body["curves"].get(name) if self.usable else None
        return [row for row in rows or () if isinstance(row, list) and len(row) == width and all(map(is_number, row))]

    def num_odd_rows(self, name: str, width: int) -> int:
        """Return how many rows of a curve do not hold `width` numbers, as every row that a run writes does."""
        return len(self.body["curves"].get(name) or ()) - len(self.curve(name, width))


@dataclass(frozen=True, kw_only=True, eq=False)
class Peers:
    """Cells that ran the same prompts on the same model."""

    cells: tuple[Cell, ...]

    @cached_property
    def usable(self) -> tuple[Cell, ...]:
        """Those whose numbers count, full caches first."""
        return tuple(sorted((cell for cell in self.cells if cell.usable), key=lambda cell: not cell.is_full))

    @cached_property
    def full(self) -> Cell | None:
        """The full cache at original positions, which everything is compared with."""
        found = (cell for cell in self.usable if cell.is_full and not cell.setting("budget"))
        return next((cell for cell in found if cell.setting("positions") in (None, "original")), None)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The cells of a folder in the order of their keys, each with the cells it may be compared with, itself included.

    `damaged` names files that cannot be read, and why.
    """

    cells: Mapping[Cell, Peers]
    damaged: tuple[tuple[str, str], ...]
    digest: str


def read_evidence(folder: Path, *, sweep: str | None = None) -> Evidence:
    """Read every record and attempt below `folder`, or those of one sweep.

    Raises: ConfigError if there is no such folder, no record in it, or no record of the sweep.
    """
    check_results_folder(folder)
    digest, damaged, cells = hashlib.sha256(), [], []
    for place in sorted((folder / "cells").glob("*")):
        bodies: dict[str, dict[str, Any]] = {}
        for path in sorted([*place.glob("record.json"), *place.glob("attempt-*.json")]):
            try:
                bodies[path.name] = read_record(path)
            except RecordError as error:
                damaged.append((path.relative_to(folder).as_posix(), str(error).removeprefix(f"{path} ")))
        accepted = bodies.pop("record.json", None)
        if accepted is not None and sweep in (None, accepted["sweep"]):
            cells.append(Cell(body=accepted, folder=place.name, attempts=tuple(bodies.values())))
            for body in (accepted, *bodies.values()):
                digest.update(f"{place.name} {canonical_json(body)}\n".encode())
    for name, why in damaged:
        digest.update(f"{name} {why}\n".encode())
    if not cells and not damaged:
        if sweep is None:
            raise ConfigError(f"{folder} has no records below cells; run a sweep first or give the right folder.")
        names = {cell.body["sweep"] for cell in read_evidence(folder).cells}
        raise ConfigError(f"no record belongs to the sweep {sweep!r}; {close_matches(sweep, names)}")
    shared = {cell: canonical_json({name: cell.setting(name) for name in _SHARED}) for cell in cells}
    groups = {text: Peers(cells=tuple(cell for cell in cells if shared[cell] == text)) for text in set(shared.values())}
    return Evidence(
        cells={cell: groups[text] for cell, text in shared.items()}, damaged=tuple(damaged), digest=digest.hexdigest()
    )


def is_number(value: object) -> bool:
    """Whether JSON holds a number there; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def answers_in(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the draws of a sample's answer, each with texts and scores of its own; the row itself is the only one."""
    draws = row.get("draws")
    return [draw for draw in draws if isinstance(draw, dict)] if isinstance(draws, list) else [row]


def usual(values: Iterable[_Value]) -> _Value | None:
    """Return the most frequent value, of equally frequent ones the first; None where there is none."""
    found = Counter(values).most_common(1)
    return found[0][0] if found else None


def class_of(settings: object) -> str:
    """Return the class of a plug-in from its settings, "kvbench:H2O" for kvbench's own; empty where none is said.

    A record of schema 1 says where the class lay. Nothing is imported: kvbench's own may have moved since.
    """
    if not isinstance(settings, Mapping):
        return ""
    return str(settings["class"]) if "class" in settings else class_at(str(settings.get("_target_", "")))


def class_at(path: str) -> str:
    """Return the class that was at a path, by name if it is kvbench's own."""
    return f"kvbench:{path.rpartition('.')[2]}" if path.startswith("kvbench.") else path


@cache
def targets(group: Group) -> Mapping[str, str]:
    """Return the class of every configuration of a group, by name."""
    texts = {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in files("kvbench.conf").joinpath(group).iterdir()
        if file.name.endswith(".yaml")
    }
    return {name: class_at(found[1]) for name, text in texts.items() if (found := _TARGET.search(text))}


@cache
def prompt_only() -> frozenset[str]:
    """Return kvbench's own policies that say in their source that they cut the prompt only; none is imported."""
    classes = (
        node
        for file in files(_POLICIES).iterdir()
        if file.name.endswith(".py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    return frozenset(
        f"kvbench:{one.name}"
        for one in classes
        for line in one.body
        if isinstance(line, ast.AnnAssign) and ast.unparse(line).startswith("when: ") and line.value is not None
        if ast.unparse(line.value) == "When.PREFILL"
    )


def rule_of(cell: Cell) -> Mapping[str, str]:
    """Return what evicts_at and budget_rounds must say; empty for policies of others and without a budget."""
    policy, budget = cell.setting("policy") or {}, cell.setting("budget")
    if not budget or class_of(policy) not in targets("policy").values():
        return {}
    up = policy.get("target_rounded_up") is True and budget.get("tokens") is None
    evicts_at = "prompt" if class_of(policy) in prompt_only() else "prompt and decode"
    return {"evicts_at": evicts_at, "budget_rounds": "up" if up else "down"}


class Note(str):
    """What a check tells and does not hold against a cell."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check, made cell by cell; `peers` are the cells that may be compared with it, itself included.

    applies: whether there is anything to check. told: a sentence for each thing that is wrong, or a `Note`.
    meaning: what a failure means.
    """

    id: str
    title: str
    meaning: str
    applies: Callable[[Cell, Peers], bool]
    told: Callable[[Cell, Peers], Iterator[str]]


def check(
    identity: str, title: str, meaning: str, applies: Callable[[Cell, Peers], bool] = lambda cell, peers: cell.usable
) -> Callable[[Callable[[Cell, Peers], Iterator[str]]], Check]:
    """Make a check of the function below: of every cell whose numbers count, or of those to which it `applies`."""
    return lambda told: Check(id=identity, title=title, meaning=meaning, applies=applies, told=told)


def any_cell(cell: Cell, peers: Peers) -> bool:
    """Apply to every cell, failed ones too."""
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A sentence about one cell, or about a file that is no cell."""

    cell: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one check found."""

    id: str
    title: str
    meaning: str
    verdict: Verdict
    num_checked: int = 0
    findings: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()


def run_check(check: Check, evidence: Evidence) -> Outcome:
    """Make `check` on every cell it applies to."""
    findings: list[Finding] = []
    notes: list[Finding] = []
    num_checked = 0
    for cell, peers in evidence.cells.items():
        try:
            if not check.applies(cell, peers):
                continue
            told = list(check.told(cell, peers))
        except _WRONG_TYPES as error:  # what has the wrong type is a problem
            why = f"{type(error).__name__}: {' '.join(str(error).split()):.80}"
            told = [f"it, or a cell it is compared with, holds what no run writes ({why})"]
        num_checked += 1
        for text in told:
            (notes if isinstance(text, Note) else findings).append(Finding(cell=cell.name, text=text))
    return Outcome(
        id=check.id,
        title=check.title,
        meaning=check.meaning,
        verdict="failed" if findings else "passed" if num_checked else "not applicable",
        num_checked=num_checked,
        findings=tuple(findings),
        notes=tuple(notes),
    )
