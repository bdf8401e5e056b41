"""What a reader must know before believing the tables: odd orders, failures, unequal machines, few samples.

    for note in notes_of(group):
        print(note.text, *note.details)

Odd is a policy that scores below `random`, and quality that falls where the budget grows. Each finding also knows what
it was looked for in (`Looked`), so that nothing is said about what was never compared. Every difference is paired by
sample and carries its interval; one is called clear after Holm's correction over all that were looked at together.
`random` is looked for in every measure of quality with a declared margin, and the words say which. Reasons are offered
as conjectures, and each says whether the numbers of this report bear it out.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from kvbench.measures import MAX_TURNS, MEASURES, format_value, format_with_interval, measure
from kvbench.report.compare import (
    PRIMARY_QUALITIES,
    TIMES,
    Ability,
    Comparison,
    compare,
    corrected,
    difference_text,
    noisy_text,
    num_empty_answers,
    timing_noise,
)
from kvbench.report.load import BANDWIDTH, CellResult, Group, is_better
from kvbench.report.markup import listed
from kvbench.report.standing import length_cautions, other_lengths
from kvbench.results.record import AUTOPSY_FILE, MACHINE, is_uncommitted
from kvbench.stats.paired import is_far_off
from kvbench.stats.tests import is_quality

_REFERENCE = "rougeL_vs_reference"  # answers may be nearer to it at a smaller budget, so no step of one is odd in it
_RECALL = "objects_recalled_fraction"
_STEP_QUALITIES = (
    _RECALL,
    "needles_recalled_fraction",
    "answers_right_fraction",
    *(name for name in PRIMARY_QUALITIES if name != _REFERENCE),
)
QUALITIES = (*_STEP_QUALITIES, _REFERENCE)
DECLARED_QUALITIES = tuple(name for name in MEASURES if is_quality(name))
_POSITION_ONLY = ("streaming", "local", "window", "recent")
_FEW_SAMPLES = 20
_MACHINE_KEYS = (*MACHINE, "device", "torch", "transformers", "hostname")
_ONE_PART = ("prompt", "decode")  # of what a policy may cut, as records name it
_OVER_BUDGET = 1.1  # of a budget, where a record does not name it; rounding up of small ones is less


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """One thing that a reader must know: a sentence or two, and the numbers behind it."""

    text: str
    details: tuple[str, ...] = ()


def notes_of(group: Group) -> list[Note]:
    """Return every note on `group`, the gravest first."""
    return [
        *(*_ability_notes(group), *_length_notes(group), *_failures(group)),
        *(*_random_notes(group), *_monotone_notes(group), *_doubts(group), *_audited(group)),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """Two cells in one measure, `first` being the one that the sentence is about."""

    first: CellResult
    second: CellResult
    name: str
    difference: Comparison

    @property
    def is_clear(self) -> bool:
        """True when one of the two is shown to be better, after the correction for all that was looked at."""
        return self.difference.is_clear

    @property
    def text(self) -> str:
        """Return "12.1 % against 30.2 %, paired difference -18.1 [-22.0, -14.0] points over 32 samples"."""
        values = f"{_value(self.first, self.name)} against {_value(self.second, self.name)}"
        found = self.difference
        if found.low is None or found.high is None or not found.num_samples:
            return f"{values} (no paired samples; " + ("intervals apart)" if self.is_clear else "undecided)")
        noise = "" if self.is_clear else f", {found.verdict}{f': {found.reason}' if found.reason else ''}"
        return f"{values}, paired difference {difference_text(found).replace('/', ' per ')}{noise}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """Where an odd order was looked for: contrasts whose `first` should be the better one, all of one correction."""

    contrasts: tuple[Contrast, ...]

    @property
    def labels(self) -> str:
        """Return the names of the measures compared."""
        seen = {one.name for one in self.contrasts}
        return listed([measure(name).label for name in DECLARED_QUALITIES if name in seen])

    @property
    def sentence(self) -> str:
        """Return what was looked at, and how many differences share the correction."""
        num = len(self.contrasts)
        return f"Looked at: {self.labels}; {num} difference{'' if num == 1 else 's'} with one correction (Holm)."

    @property
    def out_of_order(self) -> list[Contrast]:
        """Return the contrasts whose values stand the wrong way round."""
        values = ((one, one.first.measurements[one.name], one.second.measurements[one.name]) for one in self.contrasts)
        return [one for one, first, second in values if is_better(one.name, second.value, first.value)]

    def sure(self, what: str) -> str:
        """Return how many pairs are shown to be in order, such as "3 of 8 steps are clear"."""
        clear, num = sum(one.difference.verdict == "better" for one in self.contrasts), len(self.contrasts)
        rest = "" if clear == num else ", the others may be chance"
        return f"{clear} of {num} {what} are clear{_CORRECTED if num > 1 else ''}{rest}"


_CORRECTED = " after Holm's correction for all of them"


def _looked(group: Group, pairs: Iterable[tuple[CellResult, CellResult]], names: Collection[str]) -> Looked:
    """Return the pairs (worse, better) in every measure of `names` that both have and that ranks anybody."""
    ability = Ability(group)
    ranking = [name for name in names if not ability.reason(name)]
    found = (compare(better, worse, name) for worse, better in pairs for name in ranking if worse.estimate(name))
    family = corrected([one for one in found if one is not None])
    contrasts = (Contrast(first=one.first, second=one.second, name=one.measure, difference=one) for one in family)
    return Looked(contrasts=tuple(contrasts))


def budgets_of(group: Group) -> dict[str, list[CellResult]]:
    """Return the usable budgeted cells by budget, whatever position mode each policy is run in."""
    found = {budget: [cell for cell in cells if not cell.failed] for budget, cells in group.by_budget.items()}
    return {budget: cells for budget, cells in found.items() if cells}


def below_random(group: Group, looked: Looked | None = None) -> dict[str, list[Contrast]]:
    """Return, by series label, every budget and measure in which a policy scores worse than `random`."""
    found: dict[str, list[Contrast]] = {}
    for contrast in (looked or above_random(group)).out_of_order:
        found.setdefault(group.series_label(contrast.first), []).append(contrast)
    return found


def above_random(group: Group) -> Looked:
    """Return every pair of `random` and another policy at one budget, in every declared quality that both have.

    Nothing is looked for in a measure that ranks nobody.
    """
    return _looked(
        group,
        (
            (baseline, cell)
            for cells in budgets_of(group).values()
            for baseline in cells if baseline.policy == "random"
            for cell in cells if cell.policy != "random"
        ),
        DECLARED_QUALITIES,
    )  # fmt: skip


def not_monotone(group: Group) -> list[Contrast]:
    """Return every step to a larger budget (full last) at which a measure gets worse instead of better."""
    return budget_steps(group).out_of_order


def budget_steps(group: Group) -> Looked:
    """Return every step of a policy to the next larger budget, full last, in every measure that both cells have.

    A share and an absolute size are not ordered, full is above both.
    """
    by_series: dict[tuple[str, str, str], list[CellResult]] = {}
    for cell in group.budgeted:
        by_series.setdefault(cell.series, []).append(cell)
    last = [group.full] if group.full else []
    ladders = ([*(cell for cell in cells if not cell.failed), *last] for cells in by_series.values())
    steps = (step for ladder in ladders for step in itertools.pairwise(ladder))
    return _looked(
        group,
        (
            (small, large)
            for small, large in steps
            if large.is_full or (small.budget_fraction is None) == (large.budget_fraction is None)
        ),
        _STEP_QUALITIES,
    )


def _random_notes(group: Group) -> Iterator[Note]:
    """Yield what stands below `random`, clearly or perhaps, or that nothing does."""
    looked = above_random(group)
    found = below_random(group, looked)
    measured = any(cell.policy == "random" and not cell.failed for cell in group.budgeted)
    if not measured and any(cell.estimate(name) for cell in group.budgeted for name in QUALITIES):
        yield Note(text="The policy `random` was not measured, so nothing shows what choosing is worth.")
    elif looked.contrasts and not found:
        budgets = listed(list(dict.fromkeys(one.second.budget for one in looked.contrasts)))
        text = f"No policy scores below `random` in {looked.labels} at {budgets}, as it should be"
        yield Note(text=f"{text}; {looked.sure('differences')}.")
    clear = {label: some for label, some in found.items() if any(contrast.is_clear for contrast in some)}
    by_reason: dict[str, list[str]] = {}
    for label, contrasts in clear.items():
        by_reason.setdefault(_reason(group, contrasts), []).append(label)
    for reason, labels in by_reason.items():
        who = listed([f"`{label}`" for label in labels])
        below = f"scores below it at {_where(clear[labels[0]])}" if len(labels) == 1 else "score below it"
        told = [
            f"{f'{label}, ' if len(labels) > 1 else ''}{_contrast_line(contrast)}"
            for label in labels
            for contrast in sorted(clear[label], key=lambda one: not one.is_clear)
        ]
        text = f"`random` is not the worst policy: {who} {below}. {reason}"
        yield Note(text=text, details=(*told, looked.sentence))
    chance = {label: some for label, some in found.items() if label not in clear}
    if chance:
        names = ", ".join(f"`{label}`" for label in chance)
        text = f"`random` scores above {names} somewhere, but no such difference is clear: this may be chance. "
        lines = (f"{label}, {_contrast_line(contrast)}" for label, some in chance.items() for contrast in some)
        yield Note(text=text + looked.sentence, details=tuple(lines))


def _where(contrasts: Iterable[Contrast]) -> str:
    """Return the budgets of the clear ones, each with its measures: "10 % tokens kept (PPL)"."""
    found: dict[str, list[str]] = {}
    for one in contrasts:
        if one.is_clear:
            found.setdefault(one.first.budget, []).append(measure(one.name).label)
    return listed([f"{budget} ({listed(labels)})" for budget, labels in found.items()])


def _contrast_line(contrast: Contrast) -> str:
    return f"{contrast.first.budget}, {measure(contrast.name).label}: {contrast.text}"


def _reason(group: Group, contrasts: list[Contrast]) -> str:
    """Offer why, in words that fit what the prompts are known to hold: pictures, where objects are counted."""
    policy = contrasts[0].first.policy
    has_pictures = any(cell.estimate(_RECALL) for cell in group.cells)
    if any(word in policy for word in _POSITION_ONLY):
        what = "the picture, which stands" if has_pictures else "what stands"
        return (
            "This may be because it keeps only the first tokens (sinks) and the most recent ones, whatever they are, "
            f"and so drops {what} between them, while a random draw keeps some of every part. "
        ) + _evidence(group, contrasts)
    folders = (contrast.first.cell_folder for contrast in contrasts)
    seen = any(folder is not None and (folder / AUTOPSY_FILE).exists() for folder in folders)
    where = '"What the cache kept" shows for a few samples which tokens it held.'
    return (
        "This may be because what its score ranked high so far is not what the later answer needs, or because the "
        f"kept tokens crowd in a few places, while a random draw spreads evenly over the "
        f"{'picture' if has_pictures else 'prompt'}. This is a conjecture; "
        f"{where if seen else 'which tokens were kept was not recorded.'}"
    )


def _evidence(group: Group, contrasts: list[Contrast]) -> str:
    """Say whether the objects recalled agree with a picture that was dropped, and whether the answers repeat."""
    cells = {contrast.first.key: contrast.first for contrast in contrasts}.values()
    if not any(cell.estimate(_RECALL) for cell in cells):
        return "This is a conjecture; the numbers can not tell."
    clear = [contrast for contrast in contrasts if contrast.name == _RECALL and contrast.is_clear]
    if not clear:
        return "The numbers do not bear this out: it does not recall clearly fewer objects than random."
    shares = ", ".join(
        f"{_value(contrast.first, _RECALL)} against {_value(contrast.second, _RECALL)} at {contrast.first.budget}"
        for contrast in clear
    )
    full = f" (full: {_value(group.full, _RECALL)})" if group.full else ""
    texts = [[str(sample["text"]) for sample in cell.samples if "text" in sample] for cell in cells]
    counts = ((len(set(some)), len(some)) for some in texts)
    repeats = next((f" Its {num} answers are only {few} different texts." for few, num in counts if few * 2 < num), "")
    return f"The objects recalled agree with that: {shares}{full}.{repeats}"


def _value(cell: CellResult, name: str) -> str:
    found = cell.estimate(name)
    return format_value(name, found.value if found else None)


def _ability_notes(group: Group) -> Iterator[Note]:
    yield from (Note(text=sentence) for sentence in Ability(group).sentences)
    counts = {group.cell_label(cell): found for cell in group.cells if (found := _empty_answers(cell))}
    if counts:
        details = tuple(f"{label}: {found}" for label, found in counts.items())
        yield Note(
            text="Some answers are empty. Against another empty answer they score ROUGE 1.0, against any text 0.",
            details=details,
        )


def _length_notes(group: Group) -> Iterator[Note]:
    details = tuple(
        f"{group.cell_label(cell)}: {measure(name).label} {_value(cell, name)}"
        for name, cells in other_lengths(group).items()
        for cell in cells
    )
    yield from (Note(text=text, details=details) for text in length_cautions(group))


def _empty_answers(cell: CellResult) -> str:
    """Return "2 of 32 answers", for each turn of a conversation; "" where none is empty."""
    turns = {"": "", **{f"turn{turn}_": f" of turn {turn}" for turn in range(1, MAX_TURNS + 1)}}
    found = ((words, *num_empty_answers(cell, prefix)) for prefix, words in turns.items())
    return ", ".join(f"{empty} of {num} answers{words}" for words, empty, num in found if empty)


def _failures(group: Group) -> Iterator[Note]:
    failed = [cell for cell in group.cells if cell.failed]
    if failed:
        details = tuple(
            f"{group.cell_label(cell)}: {cell.status}{f' in {cell.phase}' if cell.phase else ''}"
            f"{f' ({cell.error:.300})' if cell.error else ''}"
            for cell in failed
        )
        yield Note(text=f"{len(failed)} of {len(group.cells)} cells failed and have no numbers.", details=details)
    reasons = ((group.cell_label(cell), _noise_text(cell)) for cell in group.cells if not cell.failed)
    noisy = tuple(f"{label}: {reason}" for label, reason in reasons if reason)
    if noisy:
        said = f"{noisy_text(group.cells)} of {len(group.cells)} cells"
        yield Note(text=f"{said}: read these times as a rough guide.", details=noisy)


def _noise_text(cell: CellResult) -> str:
    """Return why times are noisy, and which where it is not all of them."""
    found = {name: reason for name in TIMES if (reason := timing_noise(cell, name))}
    if len(found) == len(TIMES) and len(set(found.values())) == 1:
        return found[TIMES[0]]
    return "; ".join(f"{measure(name).label}: {reason}" for name, reason in found.items())


def _monotone_notes(group: Group) -> Iterator[Note]:
    looked = budget_steps(group)
    found = looked.out_of_order
    for is_clear, text in (
        (True, "Quality gets clearly worse where the budget grows; something other than the budget is at work."),
        (False, "Quality does not rise with every step in budget, but these steps are within the noise."),
    ):
        lines = tuple(_step_line(group, contrast) for contrast in found if contrast.is_clear == is_clear)
        if lines:
            yield Note(text=text, details=lines)
    if looked.contrasts and not found:
        text = f"Quality ({looked.labels}) never rises where the budget shrinks, as it should be"
        yield Note(text=f"{text}; {looked.sure('steps')}.")


def _step_line(group: Group, contrast: Contrast) -> str:
    larger = "full" if contrast.first.is_full else contrast.first.budget
    step = f"{group.series_label(contrast.second)}, from {contrast.second.budget} to {larger}"
    return f"{step}, {measure(contrast.name).label}: larger budget {contrast.text}"


def _doubts(group: Group) -> Iterator[Note]:
    if group.full is None:
        yield Note(text="There is no usable cell of the full cache, so no number can be related to it.")
    usable = [cell for cell in group.cells if not cell.failed]
    kinds = {name: {str(cell.environment.get(name, "not recorded")) for cell in usable} for name in _MACHINE_KEYS}
    differing = tuple(f"{name}: {', '.join(sorted(values))}" for name, values in kinds.items() if len(values) > 1)
    if differing:
        yield Note(text="Cells ran under different conditions; compare their times with care.", details=differing)
    yield from _odd_copies(group)
    too_long = tuple(_beyond_text(group, cell) for cell in group.cells if cell.estimate("num_beyond_context"))
    if too_long:
        text = "Prompts go beyond the model's context; what is said there is no policy's doing."
        yield Note(text=text, details=too_long)
    counts = [found.n for cell in group.cells for name in QUALITIES if (found := cell.estimate(name)) and found.n]
    if counts and min(counts) < _FEW_SAMPLES:
        yield Note(text=f"Some numbers rest on only {min(counts)} samples; intervals from so few are too narrow.")


def _audited(group: Group) -> Iterator[Note]:
    """Yield what `kvbench audit` too finds worth knowing, and no fault (with lengths and machines, said above)."""
    usable = [cell for cell in group.cells if not cell.failed]
    held = ((cell, _overhang(cell)) for cell in usable)
    left_out = [(cell, found.value) for cell in usable if (found := cell.estimate("num_skipped_items"))]
    for text, lines in (
        ("Some cells were measured by code with changes that no commit holds.",
         [group.cell_label(cell) for cell in usable if is_uncommitted(cell.environment)]),
        ("Some cells hold more of the tokens than their budget says: their policy does not cut prompt and answer both.",
         [f"{group.cell_label(cell)}: {text}" for cell, text in held if text]),
        ("Items of the data set were left out as bad (on_bad_item: skip).",
         [f"{group.cell_label(cell)}: {num:.0f}" for cell, num in left_out if num]),
        ("Some cells were measured more than once; one of the attempts counts.",
         [f"{group.cell_label(cell)}: {cell.num_measured} times" for cell in usable if cell.num_measured > 1]),
    ):  # fmt: skip
        if lines == [group.cell_label(cell) for cell in usable]:
            yield Note(text=text.replace("Some cells were", "Every cell was"))
        elif lines:
            yield Note(text=text, details=tuple(lines))
    asked = [num for cell in usable if isinstance(num := (cell.settings.get("dataset") or {}).get("num_samples"), int)]
    most = max((len(cell.samples) for cell in usable), default=0)
    if most and asked and most + max((int(num) for _, num in left_out), default=0) < min(asked):
        yield Note(text=f"{most} samples of {min(asked)} asked for, in every cell: is the data set smaller?")


def _overhang(cell: CellResult) -> str:
    """Return which share of the tokens a cell holds that keeps what it generates, or the whole prompt; else ""."""
    found, asked = cell.estimate("realised_budget_fraction"), cell.budget_fraction
    if found is None or cell.is_full:
        return ""
    is_more = asked is not None and cell.budget.endswith("% tokens kept") and found.value > asked * _OVER_BUDGET
    return f"{found.value:.0%} of the tokens seen".replace("%", " %") if is_more or cell.evicts_at in _ONE_PART else ""


def _odd_copies(group: Group) -> Iterator[Note]:
    """Yield the cells whose copy was far off that of their machine and sweep, which their roofs rest on."""
    found: dict[str, list[str]] = {}
    for cell in group.cells:
        common, own = cell.estimate(BANDWIDTH), cell.own_bandwidth
        if common is not None and own is not None and is_far_off(own, common.value):
            used = f"{format_with_interval(BANDWIDTH, common.value, common.low, common.high)}, n = {common.n}"
            kind = "median" if common.low is not None else "fastest"
            line = f"{group.cell_label(cell)}: {format_value(BANDWIDTH, own)}"
            found.setdefault(f"{used}; the roofs use that {kind}", []).append(line)
    for used, lines in found.items():
        yield Note(text=f"A copy was far off the bandwidth of its machine and sweep, {used}.", details=tuple(lines))


def _beyond_text(group: Group, cell: CellResult) -> str:
    found = cell.estimate("num_beyond_context")
    assert found is not None
    return f"{group.cell_label(cell)}: {found.value:.0f} of {found.n} prompts ({found.method})"
