"""Read results folders: every accepted record as a cell, and every file that could not be used and why.

    results = load_results(Path("results"), sweep="first")
    results = load_folders([Path("laptop"), Path("cluster/results")])   # as one: every cell once

A damaged or foreign file costs its own cell only; it is listed as a problem and the rest is reported. Of a cell that
several folders hold the newest attempt that can be used counts. Everything is checked here once, so that later code
can trust it. Cells come in table order, names in the order in which a reader counts ("32 samples" before "256
samples"), and cells whose labels are equal are told apart by the settings in which they differ.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np

from kvbench.errors import ConfigError, RecordError, close_matches
from kvbench.measures import FACT_MEASURES, MEASURES, bounds_on_scale, budget_words, measure, score_scale
from kvbench.results.files import canonical_json
from kvbench.results.frontier import Frontier, load_frontier
from kvbench.results.record import MEASURED, CellRecord, Problem, check_results_folder, read_cell
from kvbench.stats.intervals import (
    FEW_METHOD,
    ClusterSums,
    Interval,
    median_interval,
    sums_by_cluster,
    with_few_differing,
)
from kvbench.stats.paired import POOLED

_DIGITS = re.compile(r"([0-9]+)")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_TEXT_LABELS = ("model", "dataset", "policy", "budget", "positions")
AGAINST_FULL = ("_vs_full", "top1_agreement_fraction")  # the full cache has all of it by definition
BANDWIDTH = "copy_bandwidth_bytes_per_s"
_MACHINE = ("gpu", "cpu_model", "num_threads")
_LARGEST = 1e300
_LARGEST_SCORE = 1e100  # squares and sums of what is larger leave the floats; no score and no log-loss is
_TIMED = ("speed", "memory")  # the tasks whose batch is one of the settings; capacity searches its own
_MAX_NAME = 40  # longer texts of settings give way to a digest
_Key = TypeVar("_Key", bound=Hashable)


def natural_key(text: str) -> tuple[object, ...]:
    """Return what to sort by: runs of digits count as numbers of any length; different texts have different keys."""
    parts = _DIGITS.split(_THOUSANDS.sub("", text))
    numbers = ((len(digits), digits) for digits in (part.lstrip("0") for part in parts[1::2]))
    return (*(one for pair in zip(parts[::2], (*numbers, ()), strict=True) for one in pair), text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One measured number in base units with its 95 % interval, where one exists, and sample count."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    method: str

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the interval, or the value twice when there is none."""
        if self.low is None or self.high is None:
            return self.value, self.value
        return self.low, self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """The accepted record of one cell.

    `variant` tells cells apart whose labels are equal, and `model` and `dataset` may have got an end that does, the
    latter with `asked`: how its data was asked, where that was in several ways; `labels` holds them as they were
    recorded. `folder` names the results folder where several are read; `cell_folder` is where the record lies, for what
    lies beside it, and `num_measured` how often it was measured there.
    `evicts_at` is when its policy cuts, "" in a record that does not say it; `budget_total` what its allocation makes
    of the total, "" for the uniform one. `own_bandwidth` is the copy bandwidth that the cell saw itself; among its
    measurements stands that of its machine and sweep, and what follows from it.
    """

    key: str
    sweep: str
    status: str
    phase: str | None
    error: str
    model: str
    dataset: str
    policy: str
    budget: str
    budget_fraction: float | None
    budget_tokens: int | None
    positions: str
    measurements: Mapping[str, Estimate]
    samples: tuple[Mapping[str, Any], ...]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    curves: Mapping[str, Any]
    started_utc: str
    duration_s: float
    variant: str = ""
    asked: str = ""
    folder: str = ""
    cell_folder: Path | None = None
    num_measured: int = 1
    evicts_at: str = ""
    budget_total: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    own_bandwidth: float | None = None

    @property
    def failed(self) -> bool:
        """True when no number of this cell may be used; of a noisy one only the times are out."""
        return self.status not in MEASURED

    @property
    def is_full(self) -> bool:
        """True for the cache that keeps everything."""
        return self.policy == "full"

    def estimate(self, name: str) -> Estimate | None:
        """Return the measurement, None if the cell failed or has no such number."""
        return None if self.failed else self.measurements.get(name)

    @property
    def series(self) -> tuple[str, str, str]:
        """Cells with the same series differ in budget only, so a line may join them."""
        return self.policy, self.positions, self.variant

    @property
    def data(self) -> str:
        """Return the name of the data set, however it was asked."""
        return self.dataset.removesuffix(f", {self.asked}") if self.asked else self.dataset

    @property
    def sort_key(self) -> tuple[object, ...]:
        """Order: model, dataset, full first, policy, positions, variant (numbers in names by size), budget."""
        series = (not self.is_full, *map(natural_key, (self.policy, self.positions, self.variant)))
        return natural_key(self.model), natural_key(self.dataset), *series, *self.budget_order, self.key

    @property
    def budget_order(self) -> tuple[object, ...]:
        """Order of budgets whatever the policy: shares before numbers of tokens, the smallest first."""
        budget = self.budget_fraction if self.budget_fraction is not None else self.budget_tokens or 0
        return self.budget_fraction is None, budget, self.budget


def parse_cell(body: Mapping[str, Any]) -> CellResult:
    """Return `body` (a verified record body) as a cell. Raises: RecordError saying which label is wrong."""
    labels, error = body["labels"], body["error"]
    for name in _TEXT_LABELS:
        if not isinstance(labels.get(name), str) or not labels[name]:
            raise RecordError(f"label {name} is {labels.get(name)!r:.60}; it must be text. Run the cell again.")
    if any(not isinstance(sample, dict) for sample in body["samples"]):
        raise RecordError("a sample is not a JSON object. Run the cell again.")
    texts, tokens = {name: labels[name] for name in _TEXT_LABELS}, _number(labels.get("budget_tokens"))
    cell = CellResult(
        **texts | {"budget": budget_words(texts["budget"])},
        labels=texts,
        evicts_at=str(labels.get("evicts_at") or ""),
        budget_total=str(labels.get("budget_total") or ""),
        **{name: body[name] for name in ("key", "sweep", "status", "phase", "environment", "started_utc", "curves")},
        error="" if error is None else f"{error.get('type', 'error')}: {error.get('message', '')}",
        budget_fraction=_number(labels.get("budget_fraction")),
        budget_tokens=None if tokens is None else int(tokens),
        measurements={
            name: found
            for name in MEASURES
            if (found := _estimate(name, body["measurements"].get(name, {}))) is not None
        },
        samples=tuple(body["samples"]),
        settings=body["cell"],
        duration_s=float(body["duration_s"]),
    )
    return replace(cell, measurements={name: _bounded(cell, name, one) for name, one in cell.measurements.items()})


def _estimate(name: str, entry: Mapping[str, Any]) -> Estimate | None:
    value, low, high, n = (_number(entry.get(part)) for part in ("value", "low", "high", "n"))
    if value is None:
        return None
    if low is not None and high is not None:  # older records hold bounds outside of what the measure can be
        low, high = bounds_on_scale(name, value, low, high)
    method = str(entry.get("method") or "")
    return Estimate(value=value, low=low, high=high, n=None if n is None else int(n), method=method)


def _bounded(cell: CellResult, name: str, found: Estimate) -> Estimate:
    """Return a number of samples with bounds that these can show; older records have some without any width.

    None where every sample gives the same and no scale says how far another one might be.
    """
    if found.low is None or found.high is None or not (scores := scores_of(cell, name)):
        return found
    if cell.is_full and name.endswith(AGAINST_FULL):
        return replace(found, low=None, high=None, method="the full cache against itself: no interval")
    if (scale := score_scale(name)) is not None and found.method != FEW_METHOD:
        clusters = clusters_of(cell)
        columns = sums_by_cluster(np.array(list(scores.values()), dtype=np.float64), [clusters[one] for one in scores])
        told = Interval(value=found.value, low=found.low, high=found.high, n=len(columns), method=found.method)
        wide = with_few_differing(told, ClusterSums(columns=columns), scale)
        return replace(found, low=wide.low, high=wide.high, method=wide.method)
    if found.low == found.high:
        return replace(found, low=None, high=None, method="the same in every sample: no interval")
    return found


def _is_number(value: object, largest: float) -> TypeGuard[int | float]:
    """Tell whether a float can hold it; JSON may also hold integers that no float can."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest


def _number(value: object) -> float | None:
    return float(value) if _is_number(value, _LARGEST) else None


def is_better(name: str, one: float, two: float) -> bool:
    """Tell whether `one` is a better value of `name` than `two`."""
    return one > two if measure(name).better == "higher" else one < two


def sample_score(sample: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Return (total, weight) of one sample; perplexity and KL weigh their samples by tokens."""
    total: object = sample.get(name)
    weight: object = 1
    if name in POOLED:
        total, weight = (sample.get(part) for part in POOLED[name])
    if not _is_number(total, _LARGEST_SCORE) or not _is_number(weight, _LARGEST_SCORE) or weight <= 0:
        return None
    return total, weight


def scores_of(cell: CellResult, name: str) -> dict[str, tuple[float, float]]:
    """Return (total, weight) of every sample of the cell that has the measure, by its id."""
    found = ((str(sample.get("id")), sample_score(sample, name)) for sample in cell.samples)
    return {identity: score for identity, score in found if score is not None}


def clusters_of(cell: CellResult) -> dict[str, str]:
    """Return the cluster of every sample by its id: its own where none is named."""
    return {str(sample.get("id")): str(sample.get("cluster") or sample.get("id")) for sample in cell.samples}


def mean_scores(cell: CellResult, name: str) -> dict[str, float]:
    """Return each sample's score by its id; a perplexity's is nats per token."""
    return {identity: total / weight for identity, (total, weight) in scores_of(cell, name).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The cells of one model on one data set: the only ones whose numbers may be compared."""

    model: str
    dataset: str
    cells: tuple[CellResult, ...]

    @property
    def title(self) -> str:
        """Return the heading of the group."""
        return f"{self.model} on {self.dataset}"

    @property
    def full(self) -> CellResult | None:
        """The full cache's cell, if it was run and did not fail; of several the one with most measurements."""
        found = [cell for cell in self.cells if cell.is_full and not cell.failed]
        return max(found, key=lambda cell: len(cell.measurements), default=None)

    @property
    def budgeted(self) -> tuple[CellResult, ...]:
        """Every cell but those of the full cache."""
        return tuple(cell for cell in self.cells if not cell.is_full)

    @property
    def by_budget(self) -> dict[str, list[CellResult]]:
        """Return the budgeted cells by budget, the smallest first, each in table order; failed ones too."""
        return _by(sorted(self.budgeted, key=lambda cell: cell.budget_order), lambda cell: cell.budget)

    def by_series(self) -> dict[str, list[CellResult]]:
        """Return the cells by series label, in table order."""
        return _by(self.cells, self.series_label)

    def series_label(self, cell: CellResult) -> str:
        """Return the policy, with positions where they are not the original ones or its cells differ in them."""
        several = len({other.positions for other in self.cells if other.policy == cell.policy}) > 1
        several = several or cell.positions != "original"
        extras = [text for text in (cell.positions if several else "", cell.variant) if text]
        return f"{cell.policy} ({', '.join(extras)})" if extras else cell.policy

    def cell_label(self, cell: CellResult) -> str:
        """Return series and budget."""
        return self.series_label(cell) if cell.is_full else f"{self.series_label(cell)}, {cell.budget}"


def _by(cells: Iterable[CellResult], key: Callable[[CellResult], _Key]) -> dict[_Key, list[CellResult]]:
    found: dict[_Key, list[CellResult]] = {}
    for cell in cells:
        found.setdefault(key(cell), []).append(cell)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A cell that several folders hold: where it was taken from, and (folder, status, start) of the others."""

    key: str
    folder: str
    others: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """All usable cells in table order, and the problems met while reading.

    Of several folders also what was chosen; `frontiers` are the searches for a smallest safe budget beside them;
    `sweep` is the one that was asked for, None for all.
    """

    records: tuple[CellResult, ...]
    problems: tuple[Problem, ...]
    folders: tuple[str, ...] = ("",)
    choices: tuple[Choice, ...] = ()
    frontiers: tuple[Frontier, ...] = ()
    sweep: str | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """Return the cells by model and data set; those with answers or a perplexity before those of costs alone."""
        by_name = itertools.groupby(self.records, key=lambda cell: (cell.model, cell.dataset))
        found = (Group(model=model, dataset=data, cells=tuple(cells)) for (model, data), cells in by_name)
        return tuple(sorted(found, key=lambda group: not any(cell.samples for cell in group.cells)))

    @property
    def policies(self) -> tuple[str, ...]:
        """Return every policy name, in table order."""
        return tuple(dict.fromkeys(sorted((c.policy for c in self.records), key=lambda name: (name != "full", name))))


def load_results(folder: Path, *, sweep: str | None = None, keys: Collection[str] | None = None) -> Results:
    """Read what counts of every cell below `folder`/cells, only of `sweep` or with a key in `keys` where given.

    Raises: ConfigError if the folder is missing or no record belongs to `sweep`.
    """
    cells, problems = _read(folder, keys)
    return Results(records=_ordered(_of_sweep(cells, sweep)), problems=tuple(problems), sweep=sweep)


def load_folders(folders: Sequence[Path], *, sweep: str | None = None) -> Results:
    """Read every folder; of cells with the same key the newest that did not fail counts, then the newest.

    One folder reads as `load_results` does. Of several, each cell and problem names its folder by the shortest end
    of its path that tells the folders apart, so that the page does not depend on where they lie.
    Raises: ConfigError if a folder is missing or no record belongs to `sweep`.
    """
    unique = {folder.resolve(): folder for folder in folders}
    names = folder_names(list(unique)) if len(unique) > 1 else [""]
    cells: list[CellResult] = []
    problems: list[Problem] = []
    frontiers: list[Frontier] = []
    for folder, name in zip(unique.values(), names, strict=True):
        found, doubts = _read(folder)
        for path in sorted((folder / "frontier").glob("*.json")):
            try:
                frontiers.append(load_frontier(path))
            except RecordError as error:
                doubts.append(_problem(folder, path, error))
        cells.extend(replace(cell, folder=name) for cell in found)
        problems.extend(replace(doubt, path=f"{name}/{doubt.path}" if name else doubt.path) for doubt in doubts)
    chosen: list[CellResult] = []
    choices: list[Choice] = []
    for key, same in _by(cells, lambda cell: cell.key).items():
        best = max(same, key=lambda cell: (not cell.failed, cell.started_utc))
        chosen.append(best)
        if len(same) > 1:
            others = tuple((cell.folder, cell.status, cell.started_utc) for cell in same if cell is not best)
            choices.append(Choice(key=key, folder=best.folder, others=others))
    return Results(
        records=_ordered(_of_sweep(chosen, sweep)),
        problems=tuple(problems),
        folders=tuple(names),
        choices=tuple(choices),
        frontiers=tuple(frontiers),
        sweep=sweep,
    )


def folder_names(folders: Sequence[Path]) -> list[str]:
    """Return for each path (absolute, all different) the shortest end that no other one has."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]).replace("//", "/") for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, keys: Collection[str] | None = None) -> tuple[list[CellResult], list[Problem]]:
    """Return the cells of one folder as they lie there, and its problems. Raises: ConfigError if it is missing."""
    check_results_folder(folder)
    cells: list[CellResult] = []
    problems: list[Problem] = []
    for path in sorted((folder / "cells").glob("*/record.json")):
        try:
            found = read_cell(path.parent)
            wanted = keys is None or found.body["key"] in keys
            if wanted:
                cell = replace(parse_cell(found.body), cell_folder=path.parent, num_measured=found.num_measured)
                cells.append(cell)
        except RecordError as error:
            problems.append(_problem(folder, path, error))
        else:
            name = path.relative_to(folder).as_posix()
            problems.extend(Problem(path=name, message=text) for text in _doubts(found.body, path))
            if wanted:
                problems.extend(_later_failures(found, path.parent.relative_to(folder).as_posix()))
    return cells, problems


def _problem(folder: Path, path: Path, error: RecordError) -> Problem:
    return Problem(path=path.relative_to(folder).as_posix(), message=str(error).removeprefix(f"{path} "))


def _of_sweep(cells: list[CellResult], sweep: str | None) -> list[CellResult]:
    chosen = [cell for cell in cells if sweep in (None, cell.sweep)]
    if sweep is not None and not chosen:
        known = close_matches(sweep, {cell.sweep for cell in cells})
        raise ConfigError(f"no record belongs to the sweep {sweep!r}; {known}")
    return chosen


def _doubts(body: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Yield what is odd about a record that can still be used."""
    for name in sorted(set(body["measurements"]) - set(MEASURES)):
        yield f"unknown measurement {name!r} is not shown; {close_matches(name, MEASURES)}"
    if not body["key"].startswith(path.parent.name):
        yield f"the record's key starts with {body['key'][:16]}, not with its folder's name; was it moved?"


def _later_failures(found: CellRecord, folder: str) -> Iterator[Problem]:
    """Yield that the cell was tried again in vain; its numbers stay those that were measured."""
    for body in found.later_failures:
        error = body["error"] or {}
        why = " ".join(f"{error.get('type', '')} {error.get('message', '')}".split())[:160]
        message = (
            f"this later attempt of {body['started_utc'][:19]} failed ({body['status']}{': ' if why else ''}{why}); "
            f"the cell's numbers are those measured at {found.body['started_utc'][:19]}"
        )
        yield Problem(path=f"{folder}/attempt-{body['attempt']}.json", message=message)


def _ordered(cells: list[CellResult]) -> tuple[CellResult, ...]:
    """Sort, after telling apart cells whose labels are the same."""
    named: list[CellResult] = []
    cells = [replace(cell, dataset=_with_batch(cell)) for cell in map(_with_answer_time, _with_one_roof(cells))]
    cells = _with_conditions(_with_distinct_names(_with_distinct_names(cells, "model"), "dataset"))
    for twins in _by(cells, lambda cell: (cell.model, cell.dataset, *cell.series)).values():
        by_budget = list(_by(twins, lambda cell: cell.budget).values())
        named.extend(_with_variants(twins, by_budget) if any(len(same) > 1 for same in by_budget) else twins)
    return tuple(sorted(named, key=lambda cell: cell.sort_key))


def _with_batch(cell: CellResult) -> str:
    """Return the name of the cell's data; drawn prompts, which nothing but their size tells, have batch and tokens."""
    tasks, tokens = cell.settings.get("task"), (cell.settings.get("dataset") or {}).get("prompt_tokens")
    if not isinstance(tokens, int) or not isinstance(tasks, dict):
        return cell.dataset
    batch = next((found for name in _TIMED if (found := (tasks.get(name) or {}).get("batch_size"))), None)
    size = f"{f'batch {batch}, ' if batch else ''}{tokens:,} prompt tokens"
    return cell.dataset.replace(f"{tokens} tokens", size)


def _with_answer_time(cell: CellResult) -> CellResult:
    """Give a cell of problems that was timed too how long its own answers take; the times come from the speed pass.

    Answers have the length that the policy makes them have, so this is what a policy saves, or loses, end to end.
    """
    first, further = cell.estimate("ttft_ms"), cell.estimate("tpot_ms")
    facts = [name for name in FACT_MEASURES if cell.estimate(name)]
    answers = [row["draws"] if isinstance(row.get("draws"), list) else [row] for row in cell.samples]
    lengths = [[_number(one.get("num_new_tokens")) for one in same if isinstance(one, dict)] for same in answers]
    is_known = bool(lengths) and all(same and all(same) for same in lengths)
    if not first or not further or not is_known or facts != ["answers_right_fraction"]:
        return cell
    means = [math.fsum(one for one in same if one is not None) / len(same) for same in lengths]
    more = math.fsum(means) / len(means) - 1
    (low, high), (step_low, step_high) = first.bounds, further.bounds
    told = Estimate(
        value=first.value + more * further.value,
        low=low + more * step_low,
        high=high + more * step_high,
        n=len(means),
        method=f"computed from {len(means)} answers, TTFT and TPOT",
    )
    return replace(cell, measurements={**cell.measurements, "answer_ms": told})


def _with_one_roof(cells: Iterable[CellResult]) -> list[CellResult]:
    """Give the cells of one machine and sweep one copy bandwidth, and the roofs that follow.

    It is the fastest of theirs on a GPU, where no step can be faster and some cells' buffers lie badly, and the median
    on a CPU, whose interval is the roof's. A share of it is as sure as the launches and the bandwidth together.
    """
    found: list[CellResult] = []
    for (_, kind, *_), same in _by(cells, _machine_of).items():
        copies = [one.value for cell in same if (one := cell.estimate(BANDWIDTH)) and one.value > 0]
        common = _fastest(copies) if kind == "cuda" and copies else median_interval(copies)
        for cell in same:
            seen = cell.estimate(BANDWIDTH)
            known = seen is not None and seen.value > 0 and len(copies) > 1
            found.append(_under_roof(cell, seen.value, common) if seen is not None and known else cell)
    return found


def _fastest(copies: Sequence[float]) -> Interval:
    return Interval(value=max(copies), low=None, high=None, n=len(copies), method=f"fastest of {len(copies)}")


def _machine_of(cell: CellResult) -> tuple[str, ...]:
    kind = str(cell.environment.get("device", "")).partition(":")[0]  # workers of one machine may have a GPU each
    return cell.sweep, kind, *(str(cell.environment.get(name)) for name in _MACHINE)


def _under_roof(cell: CellResult, own: float, common: Interval) -> CellResult:
    assert common.value is not None
    method = f"{common.method} cells of the machine and sweep"
    copy = Estimate(value=common.value, low=common.low, high=common.high, n=common.n, method=method)
    least, most = copy.bounds
    told = {BANDWIDTH: copy}
    for name in ("roof_ms", "full_roof_ms", "roof_share_fraction", "full_roof_share_fraction"):
        if one := cell.measurements.get(name):
            is_roof = name.endswith("_ms")
            has_bounds = (copy if is_roof else one).low is not None
            told[name] = replace(
                one,
                value=one.value * own / copy.value,
                low=one.bounds[0] * own / most if has_bounds else None,
                high=one.bounds[1] * own / least if has_bounds else None,
                n=copy.n if is_roof else one.n,
                method=f"computed; copy bandwidth: {method}" if is_roof else one.method,
            )
    return replace(cell, measurements={**cell.measurements, **told}, own_bandwidth=own)


def _with_distinct_names(cells: list[CellResult], part: str) -> list[CellResult]:
    """Tell apart models, or data sets, that share a name but not their settings: they are not comparable.

    The settings that differ are named; a digest of all of them where they are many, long or alike.
    """
    named: list[CellResult] = []
    for same in _by(cells, lambda cell: str(getattr(cell, part))).values():
        settings = {canonical_json(cell.settings.get(part)): cell.settings.get(part) or {} for cell in same}
        flat = [dict(flat_settings(one)) for one in settings.values()]
        names = sorted(_differing_names(flat))
        differing = (" ".join(f"{name}={one.get(name)}" for name in names) for one in flat)
        texts = dict(zip(settings, differing, strict=True))
        if len(set(texts.values())) < len(texts) or max(map(len, texts.values())) > _MAX_NAME:
            texts = {text: f"#{hashlib.sha256(text.encode()).hexdigest()[:6]}" for text in texts}
        for cell in same:
            name: dict[str, Any] = {part: f"{getattr(cell, part)} {texts[canonical_json(cell.settings.get(part))]}"}
            named.append(replace(cell, **name) if len(settings) > 1 else cell)
    return named


def _with_conditions(cells: list[CellResult]) -> list[CellResult]:
    """Say of data that was asked in several ways how: with its question hidden, or by tasks that share nothing.

    Neither is a property of a policy, so policies of one are not ranked among those of the other.
    """
    named: list[CellResult] = []
    for same in _by(cells, lambda cell: (cell.model, cell.dataset)).values():
        tasks = {frozenset(cell.settings.get("task") or ()) for cell in same}
        apart = len(tasks) > 1 and sum(map(len, tasks)) == len(frozenset().union(*tasks)) and _measured_twice(same)
        hides = len({cell.settings.get("query_visible", True) for cell in same}) > 1
        for cell in same:
            said = [", ".join(sorted(cell.settings.get("task") or ()))] if apart else []
            said += ["question hidden"] if hides and not cell.settings.get("query_visible", True) else []
            how = ", ".join(said)
            named.append(replace(cell, dataset=f"{cell.dataset}, {how}", asked=how) if said else cell)
    return named


def _measured_twice(cells: Sequence[CellResult]) -> bool:
    """Whether some policy has two cells at one budget."""
    found = _by(cells, lambda cell: (*cell.series, cell.budget))
    return any(len(same) > 1 for same in found.values())


def _with_variants(cells: list[CellResult], by_budget: Collection[list[CellResult]]) -> list[CellResult]:
    """Name the settings in which cells with the same labels differ; the key if there is no such setting.

    Two settings name a cell, more where two do not tell all of them apart. Where only the tasks differ, the cell with
    most of them needs no name.
    """
    flat = {cell.key: dict(_told(cell.settings)) for cell in cells}
    differing = set().union(*(_differing_names([flat[cell.key] for cell in same]) for same in by_budget))
    for count in range(2, max(2, len(differing)) + 1):
        shown = sorted(differing)[:count]
        texts = {cell.key: " ".join(f"{name}={flat[cell.key].get(name)}" for name in shown) for cell in cells}
        if all(len({texts[cell.key] for cell in same}) == len(same) for same in by_budget):
            break
    if shown == ["tasks"]:
        texts |= {max(same, key=lambda cell: len(cell.settings.get("task") or ())).key: "" for same in by_budget}
    return [replace(cell, variant=texts[cell.key] if shown else f"key {cell.key[:8]}") for cell in cells]


def _differing_names(flat: Sequence[Mapping[str, object]]) -> set[str]:
    """Return the settings that are not the same in all; of a task that one lacks only that it lacks it."""
    names = set().union(*flat)
    lacking = {name for name in names if name.startswith("task.") and any(name not in one for one in flat)}
    return {name for name in names - lacking if len({repr(one.get(name)) for one in flat}) > 1}


def _told(settings: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield from flat_settings(settings)
    if isinstance(tasks := settings.get("task"), dict):
        names = "+".join(sorted(tasks))
        yield "tasks", names if len(names) <= _MAX_NAME // 2 else len(tasks)


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield nested settings under names like "ask.kind"."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
