"""What a comparison of two cells says, and how its numbers become a verdict.

    for one in group_comparisons(group):
        print(one.first.policy, one.measure, one.verdict, one.value, one.low, one.high)

Two cells are compared sample by sample, the same sample under both, so that its difficulty cancels. Times are compared
with the full cache's in the same runs, or two policies by their ratios to it. What has no samples is compared by
the two cells' own intervals. Where the full cache itself can not do the task (`Ability`), numbers are shown but nobody
is ranked. `difference_text` and its neighbours are the one wording for terminal, page, Markdown, CSV and LaTeX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations

from kvbench.measures import FACT_MEASURES, MAX_TURNS, MEASURES, format_value, format_with_interval, measure
from kvbench.report.load import AGAINST_FULL, CellResult, Estimate, Group, clusters_of, scores_of
from kvbench.stats.paired import CONFIDENCE, Inference, between, from_interval, infer, noise_reason, paired_sums
from kvbench.stats.tests import (
    HEADROOM_FRACTION,
    LEVEL,
    MOST_EMPTY_FRACTION,
    Verdict,
    constant_answer_score,
    floor_of,
    holm,
    is_latency_ratio,
    is_quality,
    more_samples,
    smallest_margin,
    unpaired_p_value,
    verdict_of,
)

PRIMARY_QUALITIES = ("rougeL_vs_full", "ppl", "rougeL_vs_reference", "turn1_rougeL_vs_full")
PRIMARY_LATENCY = "tpot_ratio_to_full"
_PRIMARY_BUDGET = 0.2
_NOT_OF_THE_POLICY = ("full_", "copy_bandwidth_")
TIMES = ("tpot_ms", "ttft_ms")
_OF_TIMES = ("_ratio_to_full", "roof_share_fraction")
_EXACT = "exact_fraction"
_TEXTS = (_EXACT, "rougeL_vs_reference")  # else one of these is enough: long references are never met exactly
_WITHHELD = (
    "Scores and differences are shown, but no policy is called better, worse or safe by them; times and bytes are "
    "compared as ever."
)
# How a window goes on is no answer, right or wrong: its perplexity is the measure.
_RUNNING_TEXT = "kvbench:TextWindows"
_TURN = re.compile(r"turn\d+_")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison(Inference):
    """First cell minus second: in the measure's unit, ppl in nats per token, times relative to full minus 1.

    `low` and `high` are the 95 % interval, None where there is none; `p_holm` is corrected for the comparisons of
    its family, `minimum_detectable` is what the samples would show in 80 % of repetitions (from the few that differ
    where `is_sparse`), and `more_samples` says about how many more would decide. `reason` says why something is not
    comparable, decided or ranked at all, `noise` why its times are noisy.
    """

    measure: str
    first: CellResult
    second: CellResult
    p_holm: float | None = None
    margin: float | None = None
    verdict: Verdict
    more_samples: int | None = None
    primary: bool = False
    reason: str = ""
    noise: str = ""

    @property
    def is_clear(self) -> bool:
        """True when one of the two is shown to be better."""
        return self.verdict in ("better", "worse")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What the reader chose: margins by measure, whether unequal sample sets are cut to the common ones, confidence."""

    margins: Mapping[str, float] = field(default_factory=dict)
    intersect: bool = False
    confidence: float = CONFIDENCE


DECLARED = Choices()


def compare(first: CellResult, second: CellResult, name: str, choices: Choices = DECLARED) -> Comparison | None:
    """Return how `first` differs from `second` in the measure `name`; None if either has none.

    None too where no side is better, and for what describes the full cache or the machine, not the policy.
    """
    one, two = first.estimate(name), second.estimate(name)
    if measure(name).better == "none" or one is None or name.startswith(_NOT_OF_THE_POLICY):
        return None
    base = Comparison(
        measure=name, first=first, second=second, value=0.0, method="none", verdict="not comparable",
        margin=smallest_margin(name, choices.margins),
    )  # fmt: skip
    if is_latency_ratio(measure(name)):
        return judged(_of_times(base, one, two)) if second.is_full or two else None
    if two is None:
        return None
    values = [subtracted(name, found.value) for found in (one, two)]
    if -math.inf in values:
        return None
    base = replace(base, value=values[0] - values[1])
    mine, theirs = scores_of(first, name), scores_of(second, name)
    if not mine and not theirs:
        return _of_intervals(base, one, two)
    shared = [identity for identity in mine if identity in theirs]
    if not shared or (len(shared) < max(len(mine), len(theirs)) and not choices.intersect):
        counts = f"{len(shared)} samples have a number in both, of {len(mine)} and {len(theirs)}"
        return replace(base, reason=f"{counts}; --intersect compares those" if shared else counts)
    clusters = clusters_of(first)
    pairs = paired_sums(
        [mine[identity] for identity in shared],
        [theirs[identity] for identity in shared],
        [clusters[identity] for identity in shared],
    )
    # No answer is closer to the full cache's than that itself.
    most = (
        0.0
        if name.endswith(AGAINST_FULL) and all(total == weight for total, weight in map(theirs.__getitem__, shared))
        else 1.0
    )
    scale = (-1.0, most) if measure(name).unit in ("score", "fraction") else None
    found = infer(pairs, scale=scale, confidence=choices.confidence)
    inferred = {part.name: getattr(found, part.name) for part in fields(Inference)}
    return judged(replace(base, verdict="undecided", **inferred))


def subtracted(name: str, number: float) -> float:
    """Return a number of the measure as it is subtracted: a perplexity in nats per token."""
    if measure(name).unit != "ppl":
        return number
    return math.log(number) if number > 0 else -math.inf


_ONCE = "observed once, so nothing says how far chance reaches"


def _of_times(base: Comparison, one: Estimate, two: Estimate | None) -> Comparison:
    """Return the ratio of the first to the second minus 1, before any verdict but noisy.

    Each cell's own number is its ratio to the full cache that it was interleaved with.
    """
    against_full = base.second.is_full or two is None
    value = one.value / (1.0 if against_full or two is None else two.value) - 1
    noise = "" if base.first.is_full else timing_noise(base.first, base.measure)
    if not noise and not base.second.is_full:
        noise = timing_noise(base.second, base.measure) or apart(base.first, base.second)
    base = replace(base, value=value, num_samples=one.n or 0, num_clusters=one.n or 0, noise=noise)
    ratios = [
        None if found.low is None or found.high is None
        else from_interval(found.value, found.low, found.high, found.n or 0)
        for found in ((one,) if against_full or two is None else (one, two))
    ]  # fmt: skip
    mine, other = ratios[0], ratios[-1]
    if mine is None or other is None:
        return replace(base, method="single observations: no interval", reason=_ONCE)
    found = mine if against_full else between(mine, other)
    low, high = found.bounds()
    method = "t of paired log ratios of runs" + ("" if against_full else ", each to its own full cache")
    return replace(
        base, value=math.expm1(found.mean), verdict="undecided", low=low, high=high, method=method,
        p_value=found.p_value(), minimum_detectable=found.minimum_detectable(),
    )  # fmt: skip


def is_timed(name: str) -> bool:
    """Whether a clock is in the measure; how many prompts fit is the same on any."""
    is_time = measure(name).unit in ("ms", "tokens/s") or name.endswith(_OF_TIMES)
    return is_time and name != "capacity_ratio_to_full"


def timing_noise(cell: CellResult, name: str = "tpot_ratio_to_full") -> str:
    """Return why a time or rate of the cell is noisy; empty where it is not, or the measure is neither."""
    if not is_timed(name):
        return ""
    # A whole run and a whole answer have both parts.
    parts = (
        ("tpot", "ttft") if "throughput" in name or name == "answer_ms" else ("ttft",) if "ttft" in name else ("tpot",)
    )
    spreads = [found.value for part in parts if (found := cell.estimate(f"{part}_spread_fraction"))]
    drift, foreign = cell.estimate("reference_drift_fraction"), cell.estimate("foreign_gpu_processes")
    if cell.status == "noisy" and not spreads and drift is foreign is None:
        return "the cell is noisy"
    num_foreign = None if foreign is None else int(foreign.value)
    return noise_reason(max(spreads, default=None), None if drift is None else drift.value, num_foreign)


def apart(first: CellResult, second: CellResult) -> str:
    """Return why the times of two cells do not compare: other hardware, or another share of a sweep; "" if they do.

    Shares run when and where they like, each beside other work; each cell's ratio to its own full cache stands.
    """
    for name in ("gpu", "cpu_model", "shard"):
        mine, other = first.environment.get(name), second.environment.get(name)
        if mine != other:
            return f"times of two {'shards' if name == 'shard' else 'machines'} do not compare: {mine} and {other}"
    return ""


def noisy_text(cells: Iterable[CellResult]) -> str:
    """Return "TPOT noisy in 3, TTFT in 11", in how many cells each time is; empty where none is."""
    usable = [cell for cell in cells if not cell.failed]
    counts = {name: sum(bool(timing_noise(cell, name)) for cell in usable) for name in TIMES}
    text = ", ".join(f"{measure(name).label} in {count}" for name, count in counts.items() if count)
    return text.replace(" in ", " noisy in ", 1)


def _of_intervals(base: Comparison, one: Estimate, two: Estimate) -> Comparison:
    """Return whether the two cells' own intervals are apart, in the unit of the difference.

    It is stricter than pairing: the interval of the difference reaches from one's low to the other's high.
    """
    bounds = [subtracted(base.measure, bound) for found in (one, two) for bound in found.bounds]
    known = all(found.low is not None and found.high is not None and (found.n or 0) > 1 for found in (one, two))
    if not known or not all(map(math.isfinite, bounds)):
        return replace(base, method="single observations: no interval", reason=_ONCE)
    low, high, other_low, other_high = bounds
    noise = next(filter(None, (timing_noise(cell, base.measure) for cell in (base.first, base.second))), "")
    p_value = unpaired_p_value(base.value, (high - low, other_high - other_low), (one.n or 0, two.n or 0))
    method = "the two cells' own intervals, not paired"
    return judged(
        replace(base, low=low - other_high, high=high - other_low, p_value=p_value, method=method, noise=noise)
    )


def judged(one: Comparison, p_holm: float | None = None, num_compared: int = 1) -> Comparison:
    """Return the comparison with its verdict under the corrected p value, its own where there is no family.

    `num_compared` is how many differences share the level with it at Holm's step.
    """
    p_value = one.p_value if p_holm is None else p_holm
    if one.noise:
        return replace(one, verdict="noisy", p_holm=p_holm, reason=one.noise)
    if one.low is None or one.high is None or p_value is None:
        verdict: Verdict = "not comparable" if one.verdict == "not comparable" else "undecided"
        return replace(one, verdict=verdict, p_holm=p_holm, reason=one.reason or one.method)
    higher = measure(one.measure).better == "higher"
    verdict = verdict_of(one.low, one.high, higher_is_better=higher, margin=one.margin, p_value=p_value)
    decided = replace(one, verdict=verdict, p_holm=p_holm, more_samples=None, reason="")
    if verdict != "undecided":
        return decided
    sizes = one.value, one.minimum_detectable or 0.0, one.num_samples, one.margin
    more = more_samples(*sizes, is_sparse=one.is_sparse, num_compared=num_compared)
    return replace(decided, more_samples=more, reason=_reason(one, p_value, more))


def _reason(one: Comparison, p_value: float, more: int | None) -> str:
    """Return why the samples do not decide; empty where more of them would."""
    if one.low is not None and one.high is not None and (one.low > 0 or one.high < 0):
        if one.p_value is not None and one.p_value <= LEVEL:
            return f"not clear after Holm's correction (p = {p_value:.2g})"
        return f"too few clusters differ (p = {one.p_value:.2g})"
    if one.minimum_detectable is None:
        return "the two cells' own intervals overlap"
    return "no number of samples within reach would decide" if more is None else ""


def withheld(one: Comparison, reason: str) -> Comparison:
    """Return the comparison without a verdict where there is a `reason` for it (`Ability.reason`)."""
    return replace(one, verdict="not ranked", reason=reason, more_samples=None) if reason else one


class Ability:
    """Whether the full cache can do the task of a group; where it can not, its data set ranks no policy on its model.

    The rule is that of kvbench.stats.tests and docs/statistics.md. It is asked of the measures that score answers
    against what is right; all other measures of the same answers (distance to the full cache, perplexity, KL) stand
    or fall with them. Times and bytes are no matter of ability. Nothing is withheld where there is no full cache.
    """

    def __init__(self, group: Group) -> None:
        """Take the full cache's cell of `group`."""
        self._full = group.full

    def reason(self, name: str) -> str:
        """Return in a few words why `name` ranks nobody, "" where it does or says nothing of quality."""
        return "the full cache itself does not do this task" if is_quality(name) and self.cause(name) else ""

    @property
    def sentence(self) -> str:
        """Return why this data set can not rank policies, "" where it can in some measure."""
        wrong = self._wrong_in_all
        return f"This data set can not rank policies on this model: {wrong}. {_WITHHELD}" if wrong else ""

    @property
    def sentences(self) -> list[str]:
        """Return the sentence, or one for each turn of a conversation that ranks nobody while others do."""
        if self.sentence:
            return [self.sentence]
        return [
            f"{f'Turn {prefix[4:-1]} of the conversations' if prefix else 'What is asked once'} can not rank policies "
            f"on this model: {wrong}. {_WITHHELD}"
            for prefix, wrong in self._findings.items()
            if wrong
        ]

    def answers_exactly(self, prefix: str) -> bool:
        """Tell whether the full cache's answers are equal to short references clearly more often than by chance."""
        full = self._full
        found = None if full is None else full.estimate(f"{prefix}{_EXACT}")
        return full is not None and found is not None and found.bounds[0] > _floor(full, prefix)[1]

    def cause(self, name: str) -> str:
        """Return what is wrong with the full cache's answers that `name` is about, "" where nothing is known to be.

        Those of the same turn; of all turns where `name` is of none of them.
        """
        turn = _TURN.match(name)
        return self._findings.get(turn[0] if turn else "", self._wrong_in_all)

    @property
    def _wrong_in_all(self) -> str:
        found = list(self._findings.values())
        return found[0] if found and all(found) else ""

    @cached_property
    def _findings(self) -> dict[str, str]:
        """Return by turn ("" outside of conversations) what is wrong, "" where nothing is."""
        full = self._full
        if full is None or is_running_text(full):
            return {}
        turns = {match[0] for name in full.measurements if (match := _TURN.match(name))}
        found = {prefix: _wrong(full, prefix) for prefix in ("", *sorted(turns))}
        return {prefix: wrong for prefix, wrong in found.items() if wrong is not None}


def num_empty_answers(cell: CellResult, prefix: str = "") -> tuple[int, int]:
    """Return how many of the cell's stored answers are empty, and how many there are."""
    texts = [text for sample in cell.samples if isinstance(text := sample.get(f"{prefix}text"), str)]
    return sum(not text.strip() for text in texts), len(texts)


def _wrong(full: CellResult, prefix: str) -> str | None:
    """Return what keeps the full cache's answers from ranking anybody, "" if nothing does, None where nothing tells."""
    empty, num = num_empty_answers(full, prefix)
    if empty > MOST_EMPTY_FRACTION * num:
        return f"the full cache's answer is empty on {empty} of {num} samples"
    own: dict[str, Estimate] = {}
    for names in (FACT_MEASURES, _TEXTS):
        known = ((f"{prefix}{name}", full.estimate(f"{prefix}{name}")) for name in names)
        own = own or {name: found for name, found in known if found is not None}
    if not own:
        return None
    chance, floor = _floor(full, prefix)
    if any(found.bounds[0] > floor for found in own.values()):
        return ""
    name, found = next(iter(own.items()))
    shown = format_with_interval(name, found.value, found.low, found.high)
    return (
        f"the full cache itself reaches {measure(name).label} {shown}, which is not clear of "
        f"{format_value(name, floor)}, {HEADROOM_FRACTION:.0%} of the way from chance ({format_value(name, chance)}) "
        "to a perfect score (were answers cut by max_new_tokens?)"
    )


def _floor(full: CellResult, prefix: str) -> tuple[float, float]:
    """Return what a constant answer scores, and what the full cache must clear."""
    references = (sample.get(f"{prefix}reference") for sample in full.samples)
    chance = constant_answer_score(text for text in references if isinstance(text, str) and text)
    return chance, floor_of(chance)


def is_running_text(cell: CellResult) -> bool:
    """Tell whether the cell was measured on windows of a text, of which nothing is asked."""
    dataset = cell.settings.get("dataset")
    return isinstance(dataset, dict) and dataset.get("class") == _RUNNING_TEXT


def leading_quality(group: Group) -> str | None:
    """Return the measure that verdicts, headlines and the answer speak of, None where no quality was measured.

    The task's own leads where there is one: what the answer states of the facts asked for, or whether it is the short
    reference. Closeness to the full cache's answer, which follows the answer's length, is next, then perplexity. What
    ranks nobody leads only where nothing else does. On running text it is perplexity.
    """
    ability = Ability(group)
    prefixes = ("", *(f"turn{turn}_" for turn in range(1, MAX_TURNS + 1)))
    facts = [f"{prefix}{name}" for prefix in prefixes for name in FACT_MEASURES]
    exact = [f"{prefix}{_EXACT}" for prefix in prefixes if ability.answers_exactly(prefix)]
    for cells in (group.budgeted, group.cells):
        measured = {name for cell in cells if not cell.failed for name in cell.measurements}
        if "ppl" in measured and all(map(is_running_text, cells)):
            return "ppl"
        if names := [name for name in (*facts, *exact, *PRIMARY_QUALITIES) if name in measured]:
            return next((name for name in names if not ability.reason(name)), names[0])
    return None


def group_comparisons(
    group: Group, choices: Choices = DECLARED, only: Collection[str] | None = None, *, between: bool = True
) -> tuple[Comparison, ...]:
    """Return every budgeted cell against full, and every two policies at equal budget, in every measure or `only` some.

    Verdicts are corrected by Holm within a measure: those against full are one family, those between policies another,
    which is left out without `between`. Where the full cache can not do the task nobody is ranked. Those are marked
    primary that were declared before: the leading quality and one latency measure, at one budget, against full.
    """
    known = {name for cell in group.budgeted if not cell.failed for name in cell.measurements}
    names = [name for name in MEASURES if name in known and (only is None or name in only)]
    quality, budget = leading_quality(group), declared_budget(group)
    full, ability = group.full, Ability(group)
    against_full = [(cell, full) for cell in group.budgeted if full is not None and not cell.failed]
    found: list[Comparison] = []
    for name in names:
        for pairs in (against_full, between_policies(group) if between else ()):
            for one in corrected([one for pair in pairs if (one := compare(*pair, name, choices))]):
                primary = name in (quality, PRIMARY_LATENCY) and one.second.is_full and one.first.budget == budget
                found.append(replace(withheld(one, ability.reason(name)), primary=primary))
    return tuple(found)


def corrected(family: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with verdicts under Holm's correction over all of them; those without a p value as is."""
    tested = sorted((one for one in family if one.p_value is not None), key=lambda one: one.p_value or 0.0)
    p_values = holm([one.p_value or 0.0 for one in tested])
    found = {id(one): judged(one, p_values[k], len(tested) - k) for k, one in enumerate(tested)}
    return [found.get(id(one), one) for one in family]


def between_policies(group: Group) -> Iterator[tuple[CellResult, CellResult]]:
    """Yield every two policies at equal budget."""
    for cells in group.by_budget.values():
        yield from combinations((cell for cell in cells if not cell.failed), 2)


def declared_budget(group: Group) -> str | None:
    """Return the budget of the primary comparisons: 20 % of the tokens, else the middle one; failed cells count too.

    It is settled by what was asked for, so that a cell that fails does not move it.
    """
    budgets = list(group.by_budget)
    known = next((cell.budget for cell in group.budgeted if cell.budget_fraction == _PRIMARY_BUDGET), None)
    return known or (budgets[len(budgets) // 2] if budgets else None)


def difference_unit(name: str) -> tuple[str, float, int]:
    """Return (unit, divisor, decimals) in which differences of the measure are printed."""
    known = measure(name)
    if known.unit in ("ppl", "nats/token"):
        return "nats/token", 1.0, 3
    if known.unit == "fraction":
        return "points", 0.01, 1
    if is_latency_ratio(known):
        return "%", 0.01, 1
    return "", 1.0, 3


def difference_value(one: Comparison) -> str:
    """Return "-0.324", with the sign also where it is positive."""
    _, factor, places = difference_unit(one.measure)
    return f"{one.value / factor:+.{places}f}"


def difference_interval(one: Comparison) -> str:
    """Return "[-0.356, -0.296]"; empty without an interval."""
    if one.low is None or one.high is None:
        return ""
    _, factor, places = difference_unit(one.measure)
    return f"[{one.low / factor:+.{places}f}, {one.high / factor:+.{places}f}]"


def difference_text(one: Comparison) -> str:
    """Return "-0.324 [-0.356, -0.296] points"."""
    unit, _, _ = difference_unit(one.measure)
    return " ".join(part for part in (difference_value(one), difference_interval(one), unit) if part)


def size_text(name: str, size: float | None) -> str:
    """Return a size in the measure's difference unit, such as a margin or the smallest detectable difference."""
    if size is None:
        return ""
    _, factor, places = difference_unit(name)
    return f"{size / factor:.{places}f}"


def size_with_unit(name: str, size: float | None) -> str:
    """Return a size and its unit, "2.0 points"; "" without a size."""
    return f"{size_text(name, size)} {difference_unit(name)[0]}".strip() if size is not None else ""


def p_text(p_value: float | None) -> str:
    """Return "p < 0.001" or "p = 0.012"; "" without one."""
    return "" if p_value is None else "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def verdict_remark(one: Comparison) -> str:
    """Return what belongs below the word: the margin, how many samples are missing, or why nothing can be said."""
    if one.verdict == "equivalent" and one.margin is not None:
        return f"within {size_with_unit(one.measure, one.margin)}"
    if one.verdict == "undecided" and one.more_samples is not None:
        many, single = ("runs", "run") if is_latency_ratio(measure(one.measure)) else ("samples", "sample")
        return f"needs about {one.more_samples:,} more {single if one.more_samples == 1 else many}"
    return one.reason
