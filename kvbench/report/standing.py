"""Who stands first in a group and what a policy loses there, as far as the verdicts say so.

    judged = judge(group)
    judged.against_full(cell, judged.primary).verdict
    for row in next(matrices(judged)).rows: print(row.policy, [one and one.word for one in row.matches])
    for one in best_policies(group, group_comparisons(group)):
        print(one.budget, one.measure, one.cell.policy, one.verdict)

`judge` holds every comparison of a group at hand. `standing_at` ranks the cells of one budget: the first, whom it
beats, who may be as good; failed cells are named and never ranked, noisy ones are where no clock is in the measure.
`losses_of` gives the samples that a policy loses. One rule says what is worth something beside the full cache
(`KEPT_SHARE`): a sample collapses where its score is under half of the full cache's; in perplexity, where its tokens
are on average more than one nat less likely; a policy whose own score is there is not usable (`is_usable`). Samples on
which the full cache itself scores nothing can not collapse. `cautions` are what stands before every table of a group.
`matrices` set each policy against each other at equal budget, like with like.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from kvbench.measures import (
    FACT_MEASURES,
    MAX_TURNS,
    NEAR_LENGTH_FRACTION,
    format_value,
    has_other_length,
    measure,
)
from kvbench.report.compare import (
    DECLARED,
    PRIMARY_QUALITIES,
    Ability,
    Choices,
    Comparison,
    between_policies,
    compare,
    declared_budget,
    difference_interval,
    difference_unit,
    difference_value,
    group_comparisons,
    leading_quality,
    p_text,
    subtracted,
    timing_noise,
    verdict_remark,
    withheld,
)
from kvbench.report.compare import judged as corrected
from kvbench.report.load import CellResult, Estimate, Group, mean_scores, natural_key
from kvbench.report.markup import listed
from kvbench.stats.tests import is_latency_ratio, turned

OTHER_QUALITIES = (
    *(*FACT_MEASURES, "ppl", "rougeL_vs_full", "rougeL_vs_reference", "kl_to_full"),
    *("ppl_released", *(f"turn{turn}_rougeL_vs_full" for turn in range(2, MAX_TURNS + 1))),
)
MOST_PAIRS = 500
TIME_RATIOS = ("tpot_ratio_to_full", "ttft_ratio_to_full")
BYTES = ("kv_stored_bytes", "peak_memory_bytes")
BEHIND = "rougeL_vs_full"  # stands behind a task's own measure, with the answers' length beside it
LENGTH = "length_ratio"
_FULL_KEPT = ("better", "equivalent")
KEPT_SHARE = 0.5  # of the full cache's score: with less, more of what that gets right is lost than kept
_LOST_NATS = 1.0
_DATA_DEPENDENT, _SEES = "data_dependent", "(sees the future)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Comparisons of `group` by measure and keys; `primary` is the quality measure that headlines speak of."""

    group: Group
    primary: str | None
    by_pair: Mapping[tuple[str, str, str], Comparison]
    choices: Choices
    num_pairs: int
    ability: Ability
    asked: dict[tuple[str, str, str], Comparison | None] = field(
        default_factory=dict
    )  # of very many, those made so far

    def against_full(self, cell: CellResult, name: str) -> Comparison | None:
        """Return the comparison of the cell with the full cache."""
        return None if self.group.full is None else self.by_pair.get((name, cell.key, self.group.full.key))

    def between(self, first: CellResult, second: CellResult, name: str) -> Comparison | None:
        """Return the comparison as seen from `first`, whichever of the two was compared with the other."""
        if found := self.by_pair.get((name, first.key, second.key)):
            return found
        if found := self.by_pair.get((name, second.key, first.key)):
            return swapped(found)
        if self.num_pairs <= MOST_PAIRS:
            return None
        for one, other in ((first, second), (second, first)):
            if (place := (name, one.key, other.key)) in self.asked:
                known = self.asked[place]
                return known if one is first else known and swapped(known)
        found = compare(first, second, name, self.choices)
        if found and found.p_value is not None:
            found = corrected(found, min(1.0, found.p_value * self.num_pairs), self.num_pairs)
        self.asked[name, first.key, second.key] = made = found and withheld(found, self.ability.reason(name))
        return made

    @property
    def qualities(self) -> tuple[str, ...]:
        """Return the primary measure and the others that say something about quality here."""
        if self.primary is None:
            return ()
        others = (name for name in OTHER_QUALITIES if any(cell.estimate(name) for cell in self.group.budgeted))
        return tuple(dict.fromkeys((self.primary, *others)))


def judge(
    group: Group, choices: Choices = DECLARED, *, leading_alone: bool = False, only: Collection[str] = ()
) -> Judged:
    """Return the group with every comparison of quality and time in it, in `only` some measures, or its primary one.

    Of very many policies only those pairs are compared that are asked for, with Bonferroni's correction for all of
    them, which is stricter than Holm's.
    """
    num_pairs = sum(1 for _ in between_policies(group))
    primary = leading_quality(group) or _other(group)
    names = {*PRIMARY_QUALITIES, *OTHER_QUALITIES, *TIME_RATIOS, *([primary] if primary else ())}
    only = only or ((primary,) if leading_alone and primary else names)
    found = group_comparisons(group, choices, only, between=num_pairs <= MOST_PAIRS)
    by_pair = {(one.measure, one.first.key, one.second.key): one for one in found}
    return Judged(
        group=group, primary=primary, by_pair=by_pair, choices=choices, num_pairs=num_pairs,
        ability=Ability(group),
    )  # fmt: skip


def swapped(one: Comparison) -> Comparison:
    """Return the same comparison as seen from the second cell."""
    value, low, high, t_low, t_high = (
        _turned(one.measure, number) for number in (one.value, one.high, one.low, one.t_high, one.t_low)
    )
    return replace(
        one, first=one.second, second=one.first, value=value or 0.0, low=low, high=high,
        t_low=t_low, t_high=t_high, verdict=turned(one.verdict),
    )  # fmt: skip


def _turned(name: str, value: float | None) -> float | None:
    """Return the difference the other way round: its negative, of a ratio minus 1 that of the inverse ratio."""
    if value is None or not is_latency_ratio(measure(name)):
        return None if value is None else -value
    return math.inf if value <= -1 else -value / (1 + value)


def _other(group: Group) -> str | None:
    return next((name for name in OTHER_QUALITIES if any(cell.estimate(name) for cell in group.cells)), None)


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


def unplaced(cell: CellResult) -> str:
    """Return why a cell is not to be ranked with others of its budget, "" where it is."""
    if _SEES in cell.policy:
        return "sees the future: a bound, no method"
    return "its budget is what it finds to hold" if cell.budget_total == _DATA_DEPENDENT else ""


def standing_at(judged: Judged, cells: list[CellResult], name: str) -> Standing | None:
    """Return how the cells of one budget stand in the measure; None where none can be ranked."""
    if judged.ability.reason(name):
        return None
    fair = (cell for cell in cells if not timing_noise(cell, name) and not unplaced(cell))
    if not (ranked := _ranked(fair, name)):
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


def _ranked(cells: Iterable[CellResult], name: str) -> list[CellResult]:
    """Return the cells that have the measure, the best value first."""
    sign = -1.0 if measure(name).better == "higher" else 1.0
    valued = [(sign * found.value, cell.sort_key, cell) for cell in cells if (found := cell.estimate(name))]
    return [cell for _, _, cell in sorted(valued, key=lambda item: item[:2])]


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
    """Return, smallest budget first, the cells shown to be no worse than full: better, or equivalent.

    None of what sees the future, which nobody can take, nor of what holds more than its budget says.
    """
    return [
        cell
        for cells in judged.group.by_budget.values()
        for cell in cells
        if judged.primary
        and (found := judged.against_full(cell, judged.primary)) is not None
        and found.verdict in _FULL_KEPT
        and not cell.failed
        and not unplaced(cell)
    ]


def is_usable(group: Group, cell: CellResult, name: str) -> bool | None:
    """Tell whether the cell keeps enough of the full cache's own score to be worth taking; None where nothing tells."""
    own, best = cell.estimate(name), None if group.full is None else group.full.estimate(name)
    if own is None or best is None:
        return None
    return not is_collapsed(name, subtracted(name, own.value), subtracted(name, best.value))


def best_unusable(group: Group, cells: Iterable[CellResult], name: str) -> tuple[CellResult, ...]:
    """Return the cells of the best value where none of them is usable, none where one is or nothing tells."""
    known = [(cell, usable) for cell in cells if (usable := is_usable(group, cell, name)) is not None]
    if any(usable for _, usable in known):
        return ()
    ranked = _ranked((cell for cell, _ in known), name)
    return tuple(cell for cell in ranked if cell.measurements[name].value == ranked[0].measurements[name].value)


def usable_text(name: str) -> str:
    """Return what a policy must reach to be usable, in words."""
    if measure(name).better == "higher":
        return f"usable is at least {KEPT_SHARE * 100:.0f} % of the full cache's score"
    return f"usable is at most {_LOST_NATS:g} nat per token above the full cache"


def cautions(group: Group) -> list[str]:
    """Return what a reader must know before any table of quality.

    That the data set ranks nobody; else at which budgets no policy is usable, and how far answers are from the full
    cache's in length, where ROUGE is read.
    """
    if sentence := Ability(group).sentence:
        return [sentence]
    return [*_unusable(group), *length_cautions(group)]


def _unusable(group: Group) -> Iterator[str]:
    name, found = leading_quality(group), dict[str, tuple[CellResult, ...]]()
    if name is None or group.full is None or Ability(group).reason(name):
        return
    for budget, cells in group.by_budget.items():
        if best := best_unusable(group, cells, name):
            found[budget] = best
    if found:
        shown = [
            f"{_value(cells[0], name)} at {budget} ({listed([group.series_label(cell) for cell in cells])})"
            for budget, cells in found.items()
        ]
        everywhere = len(found) == len(group.by_budget) and len(found) > 1
        yield (
            f"No policy is usable at {'any budget measured' if everywhere else listed(list(found))}: best "
            f"{measure(name).label} {listed(shown)}, where the full cache reaches {_value(group.full, name)}; "
            f"{usable_text(name)}."
        )


def _value(cell: CellResult, name: str) -> str:
    found = cell.estimate(name)
    return format_value(name, found.value if found else None)


def other_lengths(group: Group) -> dict[str, list[CellResult]]:
    """Return by measure of length (one per turn) the cells whose answers are much shorter or longer than full's."""
    names = (LENGTH, *(f"turn{turn}_{LENGTH}" for turn in range(1, MAX_TURNS + 1)))
    found = {
        name: [cell for cell in group.cells if (one := cell.estimate(name)) and has_other_length(one.value)]
        for name in names
    }
    return {name: cells for name, cells in found.items() if cells}


def length_cautions(group: Group) -> Iterator[str]:
    """Yield how many cells answer at another length than the full cache, and how far from it they get."""
    found = other_lengths(group)
    ratios = [one.value for name, cells in found.items() for cell in cells if (one := cell.estimate(name))]
    if ratios:
        num, ends = len({cell.key for cells in found.values() for cell in cells}), (min(ratios), max(ratios))
        shown = " to ".join(dict.fromkeys(f"{100 * ratio:.0f} %" for ratio in ends))
        yield (
            f"Answers of {num} of {len(group.cells)} cells have {shown} of the full cache's length, more than "
            f"{100 * NEAR_LENGTH_FRACTION:.0f} % from it; ROUGE against full follows the length, so read it beside "
            f"{measure(LENGTH).label}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """`cell` has the best `estimate` of `measure` at `budget`; `verdict` is its verdict against `runner_up`."""

    budget: str
    measure: str
    cell: CellResult
    estimate: Estimate
    runner_up: CellResult
    verdict: str


def best_policies(group: Group, compared: Iterable[Comparison]) -> tuple[Best, ...]:
    """Return the best policy at each budget in every measure of `compared` (comparisons of `group`).

    A budget at which fewer than two policies have the measure has no best one. Noisy times are never the best, and
    no quality is where the full cache can not do the task.
    """
    verdicts: dict[tuple[str, str, str], str] = {}
    for one in compared:
        verdicts[one.measure, one.first.key, one.second.key] = one.verdict
        verdicts.setdefault((one.measure, one.second.key, one.first.key), turned(one.verdict))
    ability, found = Ability(group), []
    names = dict.fromkeys(name for name, *_ in verdicts if measure(name).better != "none" and not ability.reason(name))
    for budget in dict.fromkeys(cell.budget for cell in group.budgeted if not cell.failed):
        for name in names:
            here = (cell for cell in group.budgeted if cell.budget == budget and not unplaced(cell))
            cells = (cell for cell in here if not timing_noise(cell, name))
            ranked = _ranked(cells, name)
            if len(ranked) > 1:
                first, second, best = ranked[0], ranked[1], ranked[0].measurements[name]
                verdict = verdicts.get((name, first.key, second.key), "not compared")
                found.append(
                    Best(budget=budget, measure=name, cell=first, estimate=best, runner_up=second, verdict=verdict)
                )
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One sample under one policy; `loss` is positive where the policy is worse, in the measure's difference unit."""

    sample: str
    full: float
    score: float
    loss: float
    collapsed: bool


def rule_text(name: str) -> str:
    """Return the rule in words."""
    label = measure(name).label
    if measure(name).better == "higher":
        return f"A sample collapses where its {label} is under half of the full cache's."
    return "A sample collapses where its tokens are on average more than one nat less likely than with the full cache."


def losses_of(group: Group, cell: CellResult, name: str) -> tuple[Loss, ...]:
    """Return what the cell loses on every sample that both have, the largest loss first."""
    if group.full is None or cell.failed:
        return ()
    fulls, sign = mean_scores(group.full, name), 1.0 if measure(name).better == "higher" else -1.0
    found = [
        Loss(sample=sample, full=full, score=score, loss=sign * (full - score),
             collapsed=is_collapsed(name, score, full))
        for sample, score in mean_scores(cell, name).items() if (full := fulls.get(sample)) is not None
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda one: (-one.loss, natural_key(one.sample))))


def is_collapsed(name: str, score: float, full: float) -> bool:
    """Tell whether a sample's score lost most of what the full cache's is worth; scores of ppl are nats per token."""
    if measure(name).better == "higher":
        return full > 0 and score < KEPT_SHARE * full
    return score - full > _LOST_NATS


MOST_SIDE = 33  # policies of a matrix that a reader still finds a pair in
_MOST_REASONS = 3
_LIKE = ("positions", "variant")
_TOLD = ("better", "worse", "equivalent", "undecided")


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """A row's policy against a column's, seen from the row; `reason` is why there is no comparison, or no verdict."""

    comparison: Comparison | None
    reason: str

    @property
    def word(self) -> str:
        """Return the verdict in a word."""
        return self.comparison.verdict if self.comparison else "not compared"

    @property
    def numbers(self) -> tuple[str, ...]:
        """Return the difference, its interval, and p where there is a verdict that it may speak for."""
        one = self.comparison
        if one is None:
            return ()
        p_value = p_text(one.p_holm) if one.verdict in _TOLD else ""
        return tuple(filter(None, (difference_value(one), difference_interval(one), p_value)))

    @property
    def turned(self) -> Match:
        """Return it as seen from the column."""
        return replace(self, comparison=self.comparison and swapped(self.comparison))

    @property
    def text(self) -> str:
        """Return the match on one line."""
        return f"{self.word}: {', '.join(self.numbers)}".replace(", [", " [") if self.numbers else self.word


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixRow:
    """A policy at a budget against every column's at the same one; None where that is itself."""

    budget: str
    policy: str
    matches: tuple[Match | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """Every policy against every other in one measure, budget by budget."""

    title: str
    measure: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[MatrixRow, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        """Return what stands above the texts."""
        return "budget", "policy", *(f"against {name}" for name in self.columns)

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """Return the rows as texts."""
        return [
            (row.budget, row.policy, *("" if one is None else one.text for one in row.matches)) for row in self.rows
        ]


def matrices(judged: Judged) -> Iterator[Matrix]:
    """Yield who beats whom, the leading measure first, then all others in which two policies have an interval.

    Of very many pairs, which are compared only when asked for, the leading measure alone.
    """
    names = dict.fromkeys((*judged.qualities, *(name for name, _, _ in judged.by_pair)))
    for name in list(names)[: 1 if judged.num_pairs > MOST_PAIRS else None]:
        if found := _matrix(judged, name):
            yield found


def leading_matrix(group: Group, choices: Choices = DECLARED) -> Matrix | None:
    """Return the first of them by itself, for where there is room for one."""
    return next(matrices(judge(group, choices, leading_alone=True)), None)


def _matrix(judged: Judged, name: str) -> Matrix | None:
    """Return the matrix of a measure, of very many policies the best; None where no pair has an interval."""
    group, measured = judged.group, [cell for cell in judged.group.budgeted if cell.estimate(name)]
    every = dict.fromkeys(map(group.series_label, measured))
    best = list(dict.fromkeys(map(group.series_label, _ranked(measured, name))))[:MOST_SIDE]
    columns = tuple(label for label in every if label in best)
    rows, seen = list[MatrixRow](), list[Match]()
    for budget, cells in group.by_budget.items():
        here = {group.series_label(cell): cell for cell in cells}
        if sum(cell.estimate(name) is not None for cell in cells) < 2:
            continue
        known: dict[tuple[str, str], Match] = {}
        for row in (label for label in columns if label in here):
            for column in (label for label in columns if label != row):
                if back := known.get((column, row)):
                    known[row, column] = back.turned
                else:
                    seen.append(known.setdefault((row, column), _match(judged, here, row, column, name)))
            rows.append(MatrixRow(budget=budget, policy=row, matches=tuple(known.get((row, one)) for one in columns)))
    if all(one.comparison is None or one.comparison.low is None for one in seen):
        return None
    return Matrix(
        title=f"Policy against policy: {measure(name).label} ({measure(name).better} is better)",
        measure=name,
        note=_matrix_note(judged, name, seen)
        + (f" The {len(best)} best of {len(every)} policies." if len(every) > len(best) else ""),
        columns=columns,
        rows=tuple(rows),
    )


def _matrix_note(judged: Judged, name: str, pairs: Iterable[Match]) -> str:
    """Return how to read it, and why pairs that are not told are not."""
    what, unit = "Row minus column at the same budget", difference_unit(name)[0]
    if is_latency_ratio(measure(name)):
        what = "The row's time over the column's at the same budget, minus 1"
    who = "Holm" if judged.num_pairs <= MOST_PAIRS else "Bonferroni"
    untold: dict[str, Counter[str]] = {}
    for one in pairs:
        if one.word not in _TOLD:
            untold.setdefault(one.word, Counter())[one.reason] += 1
    said = [
        f" {word.capitalize()}, {reasons.total()} pair{'s' if reasons.total() > 1 else ''}: "
        f"{'; '.join(reason for reason, _ in reasons.most_common(_MOST_REASONS))}"
        f"{f'; and {len(reasons) - _MOST_REASONS} other reasons' if len(reasons) > _MOST_REASONS else ''}."
        for word, reasons in untold.items()
    ]
    return (
        f"{what}{f', in {unit}' if unit else ''}; better: the row beats the column. [low, high] is the 95 % interval, "
        f"not corrected; p is after {who}'s correction over all pairs at equal budget in this measure.{''.join(said)}"
    )


def _match(judged: Judged, here: Mapping[str, CellResult], row: str, column: str, name: str) -> Match:
    """Return the match of two policies at the budget of the cells `here`, like with like only."""
    for label in (row, column):
        cell = here.get(label)
        if cell is None or cell.estimate(name) is None:
            ended = f"ended {cell.status}" if cell and cell.failed else "was not measured"
            return Match(comparison=None, reason=f"{label} {ended} at this budget")
    if reason := unlike(here[row], here[column], here.values()):
        return Match(comparison=None, reason=reason)
    found = judged.between(here[row], here[column], name)
    if found is not None and found.noise:
        noisy = next((label for label in (row, column) if timing_noise(here[label], name) == found.noise), "")
        return Match(comparison=found, reason=f"{noisy}: {found.noise}")
    return Match(comparison=found, reason=verdict_remark(found) if found else "there is no difference of such numbers")


def unlike(one: CellResult, other: CellResult, cells: Collection[CellResult]) -> str:
    """Return why two of the cells of a budget are not like with like, "" where they are.

    They differ in position mode or variant, though one of the two policies was measured as the other was. A policy that
    knows only its own mode stands for itself.
    """
    for part in _LIKE:
        mine, theirs = getattr(one, part), getattr(other, part)
        known = {(cell.policy, getattr(cell, part)) for cell in cells}
        if mine != theirs and ((one.policy, theirs) in known or (other.policy, mine) in known):
            return f"not like with like: {part} {' and '.join(one or 'as declared' for one in sorted((mine, theirs)))}"
    return ""
