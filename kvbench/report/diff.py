"""What changed from one results folder to another: cells, settings, environment, and what became worse.

    found = diff(load_results(Path("before")), load_results(Path("after")))
    print(outcome(found), found.is_worse)

Cells are the same where their keys are; else, as a new version or another policy's source changes every key, where
their labels are, those with most settings in common. Two cells of a pair are compared as two policies are
(`report.compare`): the same sample under both, after minus before. Holm's correction is over all that is compared, so
that where nothing but chance is at work a gate closes on it once in twenty at most. What is equal in every sample is no
matter of chance and in no family. Worse is what is shown to be worse, by more than its margin; a cell that was measured
before and fails after is worse too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvbench.measures import MEASURES, format_value, measure
from kvbench.report.compare import (
    DECLARED,
    Choices,
    Comparison,
    compare,
    corrected,
    difference_text,
    is_timed,
    leading_quality,
    p_text,
    size_with_unit,
    verdict_remark,
)
from kvbench.report.load import CellResult, Group, Results, flat_settings, mean_scores, scores_of
from kvbench.report.standing import OTHER_QUALITIES, TIME_RATIOS
from kvbench.report.tables import escaped, markdown_table
from kvbench.results.record import MACHINE
from kvbench.results.redaction import printable
from kvbench.stats.tests import Verdict, is_latency_ratio

_SAME_PROMPT = ("prompt_sha256", "question", "reference", "turn1_reference")  # who has it must have the same
_MOST_CHANGES, _MOST_VERDICTS = 20, 40
_LONGEST_VALUE = 48
_OF_A_RECORD = ("key", "started_utc", "measurements", "samples")
_ORDER: tuple[Verdict, ...] = (
    *("worse", "better", "undecided", "not comparable", "equivalent", "noisy", "not ranked"),
)
_LISTED = _ORDER[:4]  # the others are counted; --format json has all
_MACHINE = (*MACHINE, "device")
_OTHER_MACHINE = "measured on another machine"
_NOT_MEASURED = "not measured in B"
_NO_SAMPLE = "no sample in common"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A setting, or a fact of the environment, that differs in so many cells; None where one side lacks it."""

    name: str
    before: object
    after: object
    num_cells: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleChange:
    """Scores of one sample, a perplexity's in nats per token; `loss` is how much worse it became."""

    sample: str
    before: float
    after: float
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One cell before and after: `same` measures are equal in every sample, `samples` are those that became worse.

    `samples` are by the measure `leading`, the worst first, out of `num_samples` that both have.
    """

    label: str
    before: CellResult
    after: CellResult
    comparisons: tuple[Comparison, ...]
    same: tuple[str, ...]
    leading: str | None
    samples: tuple[SampleChange, ...]
    num_gained: int
    num_samples: int

    @property
    def fails_now(self) -> bool:
        """Whether it was measured before and is not any more."""
        return self.after.failed and not self.before.failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Diff:
    """Everything that changed; cells of one side alone by label."""

    pairs: tuple[Pair, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    settings: tuple[Change, ...]
    environment: tuple[Change, ...]
    problems: tuple[str, ...]

    @property
    def worse(self) -> list[tuple[Pair, Comparison]]:
        """Return what is shown to be worse, and by more than its margin."""
        return [(pair, one) for pair in self.pairs for one in pair.comparisons if is_beyond(one)]

    @property
    def failing(self) -> list[Pair]:
        """Return the cells that were measured and fail now."""
        return [pair for pair in self.pairs if pair.fails_now]

    @property
    def is_worse(self) -> bool:
        """Whether a gate must close."""
        return bool(self.worse or self.failing)

    @property
    def is_empty(self) -> bool:
        """Whether no number of a cell could be set beside another one, so that nothing was shown."""
        compared = (one.verdict != "not comparable" for pair in self.pairs for one in pair.comparisons)
        return not (any(compared) or any(pair.same or pair.fails_now for pair in self.pairs))


def is_beyond(one: Comparison) -> bool:
    """Whether the first is shown to be worse than the second, by more than the margin where there is one."""
    return one.verdict == "worse" and (one.margin is None or abs(one.value) > one.margin)


def diff(before: Results, after: Results, choices: Choices = DECLARED, *, measures: Sequence[str] = ()) -> Diff:
    """Return what changed; `measures` are compared instead of those that a report compares policies by."""
    pairs = _matched(before.records, after.records)
    several = len({(cell.model, cell.dataset) for cell in (*before.records, *after.records)}) > 1
    groups = {cell.key: group for results in (after, before) for group in results.groups for cell in group.cells}
    leads = {group.title: leading_quality(group) for group in before.groups}
    made = [
        _pair(
            one,
            two,
            label=_label(one, groups, several=several),
            leading=leads[groups[one.key].title],
            choices=choices,
            measures=measures,
        )
        for one, two in pairs
    ]
    family = iter(corrected([one for pair in made for one in pair.comparisons]))
    taken = {one.key for one, _ in pairs}, {two.key for _, two in pairs}
    alone = [
        tuple(_label(cell, groups, several=several) for cell in results.records if cell.key not in keys)
        for results, keys in zip((before, after), taken, strict=True)
    ]
    return Diff(
        pairs=tuple(replace(pair, comparisons=tuple(next(family) for _ in pair.comparisons)) for pair in made),
        only_before=alone[0],
        only_after=alone[1],
        settings=_changes((one.settings, two.settings) for one, two in pairs),
        environment=_changes((one.environment, two.environment) for one, two in pairs),
        problems=tuple(f"{problem.path}: {problem.message}" for one in (before, after) for problem in one.problems),
    )


def _matched(before: Sequence[CellResult], after: Sequence[CellResult]) -> list[tuple[CellResult, CellResult]]:
    """Return the pairs in the order of the first side: equal keys, then equal labels, the most alike first."""
    by_key = {cell.key: cell for cell in after}
    found = {cell.key: by_key[cell.key] for cell in before if cell.key in by_key}
    left = [cell for cell in before if cell.key not in found]
    free = {cell.key: cell for cell in after if cell.key not in found}
    candidates = [
        (_num_different(one, two), one.key, two.key)
        for one in left
        for two in free.values()
        if one.labels == two.labels
    ]
    for _, one_key, two_key in sorted(candidates):
        if one_key not in found and two_key in free:
            found[one_key] = free.pop(two_key)
    return [(cell, found[cell.key]) for cell in before if cell.key in found]


def _num_different(one: CellResult, two: CellResult) -> int:
    mine, theirs = dict(flat_settings(one.settings)), dict(flat_settings(two.settings))
    return sum(mine.get(name) != theirs.get(name) for name in {*mine, *theirs})


def _label(cell: CellResult, groups: Mapping[str, Group], *, several: bool) -> str:
    group = groups[cell.key]
    return f"{group.cell_label(cell)}{f' ({group.title})' if several else ''}"


def _pair(
    before: CellResult,
    after: CellResult,
    *,
    label: str,
    leading: str | None,
    choices: Choices,
    measures: Sequence[str],
) -> Pair:
    one, two = _shared_samples(before, after)
    names = measures or dict.fromkeys([*([leading] if leading else ()), *OTHER_QUALITIES, *TIME_RATIOS])
    same: list[str] = []
    comparisons: list[Comparison] = []
    is_same_record = all(getattr(before, part) == getattr(after, part) for part in _OF_A_RECORD)
    for name in sorted(names, key=list(MEASURES).index):
        if before.estimate(name) is None or after.failed:
            continue
        if after.estimate(name) is None:
            comparisons.append(_not_comparable(before, after, name, _NOT_MEASURED))
            continue
        if is_same_record:
            same.append(name)
            continue
        if scores := scores_of(one, name):
            if scores == scores_of(two, name):
                same.append(name)
                continue
        elif scores_of(before, name) or scores_of(after, name):
            comparisons.append(_not_comparable(before, after, name, _NO_SAMPLE))
            continue
        if found := _compared(one, two, name, choices):
            comparisons.append(found)
    lost = _losses(one, two, leading) if leading else []
    return Pair(
        label=label,
        before=before,
        after=after,
        comparisons=tuple(comparisons),
        same=tuple(same),
        leading=leading,
        samples=tuple(sorted((found for found in lost if found.loss > 0), key=lambda found: -found.loss)),
        num_gained=sum(found.loss < 0 for found in lost),
        num_samples=len(lost),
    )


def _compared(before: CellResult, after: CellResult, name: str, choices: Choices) -> Comparison | None:
    """Return how the cell changed; None for what the full cache is by definition."""
    if is_latency_ratio(measure(name)) and before.is_full:
        return None
    if is_timed(name) and any(before.environment.get(fact) != after.environment.get(fact) for fact in _MACHINE):
        return _not_comparable(before, after, name, _OTHER_MACHINE)
    return compare(after, before, name, replace(choices, intersect=True))


def _not_comparable(before: CellResult, after: CellResult, name: str, reason: str) -> Comparison:
    return Comparison(
        measure=name, first=after, second=before, value=0.0, method="none", verdict="not comparable", reason=reason
    )


def _shared_samples(before: CellResult, after: CellResult) -> tuple[CellResult, CellResult]:
    """Return the cells with those samples alone that both have and that ask the same."""
    other = {str(sample.get("id")): sample for sample in after.samples}
    kept = {
        identity
        for sample in before.samples
        if (found := other.get(identity := str(sample.get("id")))) is not None
        and all(sample[name] == found[name] for name in _SAME_PROMPT if name in sample and name in found)
    }
    one, two = (
        replace(cell, samples=tuple(sample for sample in cell.samples if str(sample.get("id")) in kept))
        for cell in (before, after)
    )
    return one, two


def _losses(before: CellResult, after: CellResult, name: str) -> list[SampleChange]:
    mine, theirs = mean_scores(before, name), mean_scores(after, name)
    sign = 1 if measure(name).better == "higher" else -1
    return [
        SampleChange(sample=one, before=mine[one], after=theirs[one], loss=sign * (mine[one] - theirs[one]))
        for one in mine
        if one in theirs
    ]


def _changes(pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> tuple[Change, ...]:
    """Return what differs in the pairs, by name, the most frequent change of a name first."""
    counts: Counter[tuple[str, str]] = Counter()
    values: dict[tuple[str, str], tuple[object, object]] = {}
    for one, two in pairs:
        mine, theirs = dict(flat_settings(one)), dict(flat_settings(two))
        for name in {*mine, *theirs}:
            if (found := (mine.get(name), theirs.get(name)))[0] != found[1]:
                counts[name, repr(found)] += 1
                values[name, repr(found)] = found
    ordered = sorted(counts, key=lambda change: (change[0], -counts[change], change[1]))
    return tuple(
        Change(name=name, before=values[name, text][0], after=values[name, text][1], num_cells=counts[name, text])
        for name, text in ordered
    )


def verdict_counts(found: Diff) -> str:
    """Return "2 worse, 3 equivalent, 30 unchanged": the last are equal in every sample."""
    counts = Counter(one.verdict for pair in found.pairs for one in pair.comparisons)
    parts = [f"{counts[word]} {word}" for word in _ORDER if counts[word]]
    same = sum(len(pair.same) for pair in found.pairs)
    return ", ".join([*parts, *([f"{same} unchanged"] if same else ())]) or "nothing compared"


def outcome(found: Diff) -> str:
    """Return the last line: what a gate does, and why."""
    if not found.is_worse:
        return "nothing is shown to be worse beyond its margin"
    parts = [f"{len(found.worse)} worse beyond the margin"] if found.worse else []
    parts += [f"{len(found.failing)} that fail now"] if found.failing else []
    return f"worse: {', '.join(parts)}"


def _ordered(found: Diff) -> list[tuple[Pair, Comparison]]:
    """Return what is told one by one, what closes a gate first, then by verdict; else in the order of the table."""
    every = [(pair, one) for pair in found.pairs for one in pair.comparisons if one.verdict in _LISTED]
    return sorted(every, key=lambda both: (not is_beyond(both[1]), _ORDER.index(both[1].verdict)))


def _said(one: Comparison) -> tuple[str, str, str]:
    """Return the difference, the verdict and what belongs behind it."""
    if one.verdict == "not comparable" or one.low is None:
        return "", one.verdict, one.reason
    margin = f"margin {size_with_unit(one.measure, one.margin)}" if one.margin is not None else ""
    is_small = one.verdict == "worse" and not is_beyond(one)
    remark = verdict_remark(one) if one.verdict != "worse" else p_text(one.p_holm)
    units = "runs" if is_latency_ratio(measure(one.measure)) else "samples"
    counted = f"{one.num_samples} {units}" if one.num_samples else ""
    parts = [remark, "" if one.verdict == "equivalent" else margin, counted]
    return difference_text(one), "worse, within its margin" if is_small else one.verdict, ", ".join(filter(None, parts))


def _shown(value: object) -> str:
    text = "-" if value is None else printable(str(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cells_text(found: Diff) -> str:
    same = sum(pair.before.key == pair.after.key for pair in found.pairs)
    alone = f"{len(found.only_before)} only in A, {len(found.only_after)} only in B"
    return f"{_counted(len(found.pairs), 'cell')} in both ({same} with the same key), {alone}"


def _change_rows(changes: Sequence[Change]) -> Iterator[tuple[str, str, str, str]]:
    for change in changes[:_MOST_CHANGES]:
        yield printable(change.name), _shown(change.before), _shown(change.after), str(change.num_cells)


def _sample_rows(pair: Pair, num_shown: int) -> Iterator[tuple[str, str, str]]:
    assert pair.leading is not None
    unit = "kl_to_full" if measure(pair.leading).unit == "ppl" else pair.leading  # nats per token
    for sample in pair.samples[:num_shown]:
        yield printable(sample.sample), format_value(unit, sample.before), format_value(unit, sample.after)


def _sample_head(pair: Pair) -> str:
    label = measure(pair.leading or "").label
    return f"{pair.label}: {label} worse in {len(pair.samples)}, better in {pair.num_gained}, of {pair.num_samples}"


def text_lines(found: Diff, *, num_samples: int = 5) -> Iterator[str]:
    """Yield what changed, after minus before, for a terminal; the outcome is the last line."""
    yield _cells_text(found)
    for where, labels in (("A", found.only_before), ("B", found.only_after)):
        yield from (printable(f"  only in {where}: {label}") for label in labels[:_MOST_CHANGES])
    for title, changes in (("settings", found.settings), ("environment", found.environment)):
        yield f"{title}: {_counted(len(changes), 'change')}" if changes else f"{title}: the same"
        for name, before, after, cells in _change_rows(changes):
            yield f"  {name}: {before} -> {after} ({_counted(int(cells), 'cell')})"
        if len(changes) > _MOST_CHANGES:
            yield f"  and {len(changes) - _MOST_CHANGES} more; --format json has all"
    yield f"verdicts (B minus A): {verdict_counts(found)}"
    told = _ordered(found)
    rows = [(pair.label, measure(one.measure).label, *_said(one)) for pair, one in told[:_MOST_VERDICTS]]
    ordered = [(verdict, label, name, difference) for label, name, difference, verdict, _ in rows]
    widths = [max(map(len, column)) for column in zip(*ordered, strict=True)]
    for texts, row in zip(ordered, rows, strict=True):
        columns = (f"{text:<{width}}" for text, width in zip(texts, widths, strict=True))
        yield printable(f"  {'  '.join(columns)}  {row[-1]}".rstrip())
    if len(told) > _MOST_VERDICTS:
        yield f"  and {len(told) - _MOST_VERDICTS} more; --format json has all"
    for pair in found.failing:
        yield printable(f"  fails now: {pair.label}: {pair.after.status}: {pair.after.error}")[:200]
    losing = [pair for pair in found.pairs if pair.samples]
    yield "samples that became worse:" if losing and num_samples else f"samples: worse in {len(losing)} cells"
    for pair in losing if num_samples else ():
        yield f"  {printable(_sample_head(pair))}"
        yield from (f"    {sample}: {before} -> {after}" for sample, before, after in _sample_rows(pair, num_samples))
    yield from (printable(f"problem: {problem}") for problem in found.problems)
    yield outcome(found)


def markdown(found: Diff, *, num_samples: int = 5) -> str:
    """Return the same for a comment on a merge request."""
    lines = [f"**{outcome(found)}**", "", f"{_cells_text(found)}. Verdicts (B minus A): {verdict_counts(found)}.", ""]
    rows = [(pair.label, measure(one.measure).label, *_said(one)) for pair, one in _ordered(found)[:_MOST_VERDICTS]]
    rows += [
        (pair.label, "", "", "fails now", f"{pair.after.status}: {pair.after.error:.160}") for pair in found.failing
    ]
    if rows:
        lines += [*markdown_table(("cell", "measure", "B minus A", "verdict", ""), rows, "llrll"), ""]
    for where, labels in (("A", found.only_before), ("B", found.only_after)):
        lines += [f"Only in {where}: {escaped(', '.join(labels[:_MOST_CHANGES]))}", ""] if labels else []
    for title, changes in (("Settings", found.settings), ("Environment", found.environment)):
        if changes:
            lines += [
                f"### {title}",
                "",
                *markdown_table(("name", "A", "B", "cells"), _change_rows(changes), "lllr"),
                "",
            ]
    for pair in found.pairs if num_samples else ():
        if pair.samples:
            table = markdown_table(("sample", "A", "B"), _sample_rows(pair, num_samples), "lrr")
            lines += [f"### {escaped(_sample_head(pair))}", "", *table, ""]
    lines += [f"- problem: {escaped(problem)}" for problem in found.problems]
    return "\n".join(lines).rstrip() + "\n"


def as_json(found: Diff) -> dict[str, Any]:
    """Return everything as plain data, numbers in base units."""
    return {
        "is_worse": found.is_worse,
        "outcome": outcome(found),
        "only_a": list(found.only_before),
        "only_b": list(found.only_after),
        "settings": [dataclasses.asdict(change) for change in found.settings],
        "environment": [dataclasses.asdict(change) for change in found.environment],
        "cells": [_pair_json(pair) for pair in found.pairs],
        "problems": list(found.problems),
    }


_NUMBERS = (
    *("value", "low", "high", "p_value", "p_holm", "margin", "minimum_detectable", "num_samples", "num_clusters"),
    *("method", "verdict", "reason"),
)


def _pair_json(pair: Pair) -> dict[str, Any]:
    return {
        "cell": pair.label,
        "key_a": pair.before.key,
        "key_b": pair.after.key,
        "status_a": pair.before.status,
        "status_b": pair.after.status,
        "same": list(pair.same),
        "comparisons": [
            {
                "measure": one.measure,
                **{name: getattr(one, name) for name in _NUMBERS},
                "is_beyond_margin": is_beyond(one),
            }
            for one in pair.comparisons
        ],
        "leading": pair.leading,
        "worse_samples": [dataclasses.asdict(sample) for sample in pair.samples],
        "num_better_samples": pair.num_gained,
        "num_shared_samples": pair.num_samples,
    }
