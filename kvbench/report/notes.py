"""What a reader must know before believing the tables: odd orders, failures, unequal machines, few samples.

Reasons are offered as conjectures, and each says whether the numbers of this report bear it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvbench.report.cell import CellResult
from kvbench.report.compare_latency import timing_noise
from kvbench.report.findings import QUALITIES, Contrast, below_random, budgets_of, contrast_text, not_monotone
from kvbench.report.load import Group
from kvbench.units import format_value, measure

FEW_SAMPLES = 20
_POSITION_ONLY = ("streaming", "local", "window", "recent")
_MACHINE_KEYS = ("device", "device_name", "gpu_name", "cpu_model", "num_threads", "torch", "transformers", "hostname")
_RECALL = "objects_recalled_fraction"


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """One warning: a sentence or two, and the numbers behind it."""

    text: str
    details: tuple[str, ...] = ()


def notes_of(group: Group) -> list[Note]:
    """Return every note on `group`, the gravest first."""
    return [*_failures(group), *_random_notes(group), *_monotone_notes(group), *_doubts(group)]


def _failures(group: Group) -> Iterator[Note]:
    failed = [cell for cell in group.cells if cell.failed]
    if failed:
        details = tuple(_failure_text(group, cell) for cell in failed)
        yield Note(text=f"{len(failed)} of {len(group.cells)} cells failed and have no numbers.", details=details)
    reasons = ((group.cell_label(cell), timing_noise(cell)) for cell in group.cells if not cell.failed)
    noisy = tuple(f"{label}: {reason}" for label, reason in reasons if reason)
    if noisy:
        yield Note(text="Timings of these cells were noisy; read their times as a rough guide.", details=noisy)


def _failure_text(group: Group, cell: CellResult) -> str:
    phase = f" in {cell.phase}" if cell.phase else ""
    return f"{group.cell_label(cell)}: {cell.status}{phase}{f' ({cell.error:.300})' if cell.error else ''}"


def _random_notes(group: Group) -> Iterator[Note]:
    found = below_random(group)
    measured = [cells for cells in budgets_of(group).values() if any(cell.policy == "random" for cell in cells)]
    if not measured and group.budgeted:
        yield Note(text="The policy `random` was not measured, so nothing shows what choosing is worth.")
    elif measured and not found and any(len(cells) > 1 for cells in measured):
        yield Note(text="`random` is the worst policy at every budget and in every quality measure, as it should be.")
    clear = {label: some for label, some in found.items() if any(contrast.is_clear for contrast in some)}
    for label, contrasts in clear.items():
        budgets = ", ".join(dict.fromkeys(contrast.first.budget for contrast in contrasts))
        text = f"`random` is not the worst policy: `{label}` scores below it at {budgets}. "
        yield Note(text=text + _reason(group, contrasts), details=tuple(map(_contrast_line, contrasts)))
    chance = {label: some for label, some in found.items() if label not in clear}
    if chance:
        names = ", ".join(f"`{label}`" for label in chance)
        text = f"`random` scores above {names} somewhere, but every paired interval holds zero: this may be chance."
        lines = (f"{label}, {_contrast_line(contrast)}" for label, some in chance.items() for contrast in some)
        yield Note(text=text, details=tuple(lines))


def _reason(group: Group, contrasts: list[Contrast]) -> str:
    policy = contrasts[0].first.policy
    if any(word in policy for word in _POSITION_ONLY):
        return (
            "This may be because it keeps only the first tokens (sinks) and the most recent ones, whatever they are, "
            "and so drops the picture, which stands between them, while a random draw keeps some of every part of it. "
        ) + _evidence(group, contrasts)
    return (
        "This may be because what its score ranked high so far is not what the later answer needs, or because the "
        "kept tokens crowd in a few places, while a random draw spreads evenly over the picture. The records do not "
        "say which tokens were kept, so this is a conjecture."
    )


def _evidence(group: Group, contrasts: list[Contrast]) -> str:
    """Say whether the objects recalled agree with a picture that was dropped."""
    cells = {contrast.first.key: contrast.first for contrast in contrasts}.values()
    if not any(cell.estimate(_RECALL) for cell in cells):
        return "Objects recalled were not measured, so the numbers can not tell."
    clear = [contrast for contrast in contrasts if contrast.name == _RECALL and contrast.is_clear]
    if not clear:
        return "The numbers do not bear this out: it does not recall clearly fewer objects than random."
    shares = ", ".join(
        f"{_value(contrast.first)} against {_value(contrast.second)} at {contrast.first.budget}" for contrast in clear
    )
    full = f" (full: {_value(group.full)})" if group.full else ""
    return f"The objects recalled agree with that: {shares}{full}.{_repeats(list(cells))}"


def _repeats(cells: list[CellResult]) -> str:
    """Say so when the answers hardly depend on the sample."""
    texts = [[str(sample["text"]) for sample in cell.samples if "text" in sample] for cell in cells]
    found = next(((len(set(some)), len(some)) for some in texts if some and len(set(some)) * 2 < len(some)), None)
    return f" Its {found[1]} answers are only {found[0]} different texts." if found else ""


def _value(cell: CellResult) -> str:
    found = cell.estimate(_RECALL)
    return format_value(_RECALL, found.value if found else None)


def _contrast_line(contrast: Contrast) -> str:
    return f"{contrast.first.budget}, {measure(contrast.name).label}: {contrast_text(contrast)}"


def _monotone_notes(group: Group) -> Iterator[Note]:
    found = not_monotone(group)
    for is_clear, text in (
        (True, "Quality gets clearly worse where the budget grows; something other than the budget is at work."),
        (False, "Quality does not rise with every step in budget, but these steps are within the noise."),
    ):
        lines = tuple(_step_line(group, contrast) for contrast in found if contrast.is_clear == is_clear)
        if lines:
            yield Note(text=text, details=lines)
    if not found and len(budgets_of(group)) > 1:
        yield Note(text="Quality falls with every step down in budget, for every policy, as it should.")


def _step_line(group: Group, contrast: Contrast) -> str:
    larger = "full" if contrast.first.is_full else contrast.first.budget
    step = f"{group.series_label(contrast.second)}, from {contrast.second.budget} to {larger}"
    return f"{step}, {measure(contrast.name).label}: larger budget {contrast_text(contrast)}"


def _doubts(group: Group) -> Iterator[Note]:
    if group.full is None:
        yield Note(text="There is no usable cell of the full cache, so no number can be related to it.")
    differing = tuple(
        f"{name}: {', '.join(values)}" for name in _MACHINE_KEYS if len(values := _environment_values(group, name)) > 1
    )
    if differing:
        yield Note(text="Cells ran under different conditions; compare their times with care.", details=differing)
    counts = [found.n for cell in group.cells for name in QUALITIES if (found := cell.estimate(name)) and found.n]
    if counts and min(counts) < FEW_SAMPLES:
        yield Note(text=f"Some numbers rest on only {min(counts)} samples; intervals from so few are too narrow.")


def _environment_values(group: Group, name: str) -> list[str]:
    return sorted({str(cell.environment.get(name, "not recorded")) for cell in group.cells if not cell.failed})
