"""What a reader must know before believing the tables: odd orders, failures, unequal machines, few samples."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.measures import MAX_TURNS, measure
from kvbench.report.ability import Ability, num_empty_answers
from kvbench.report.cell import CellResult
from kvbench.report.compare_latency import timing_noise
from kvbench.report.findings import QUALITIES, Contrast, Looked, budget_steps, contrast_text, not_monotone
from kvbench.report.listing import listed
from kvbench.report.load import Group
from kvbench.report.note import Note
from kvbench.report.notes_random import random_notes

FEW_SAMPLES = 20
_MACHINE_KEYS = ("device", "device_name", "gpu_name", "cpu_model", "num_threads", "torch", "transformers", "hostname")
_TIMES = ("tpot_ms", "ttft_ms")


def notes_of(group: Group) -> list[Note]:
    """Return every note on `group`, the gravest first."""
    return [*_ability_notes(group), *_failures(group), *random_notes(group), *_monotone_notes(group), *_doubts(group)]


def _ability_notes(group: Group) -> Iterator[Note]:
    yield from (Note(text=sentence) for sentence in Ability(group).sentences)
    counts = {group.cell_label(cell): found for cell in group.cells if (found := _empty_answers(cell))}
    if counts:
        details = tuple(f"{label}: {found}" for label, found in counts.items())
        yield Note(
            text="Some answers are empty. Against another empty answer they score ROUGE 1.0, against any text 0.",
            details=details,
        )


def _empty_answers(cell: CellResult) -> str:
    """Return "2 of 32 answers", for each turn of a conversation; "" where none is empty."""
    turns = {"": "", **{f"turn{turn}_": f" of turn {turn}" for turn in range(1, MAX_TURNS + 1)}}
    found = ((words, *num_empty_answers(cell, prefix)) for prefix, words in turns.items())
    return ", ".join(f"{empty} of {num} answers{words}" for words, empty, num in found if empty)


def _failures(group: Group) -> Iterator[Note]:
    failed = [cell for cell in group.cells if cell.failed]
    if failed:
        details = tuple(_failure_text(group, cell) for cell in failed)
        yield Note(text=f"{len(failed)} of {len(group.cells)} cells failed and have no numbers.", details=details)
    reasons = ((group.cell_label(cell), _noise_text(cell)) for cell in group.cells if not cell.failed)
    noisy = tuple(f"{label}: {reason}" for label, reason in reasons if reason)
    if noisy:
        yield Note(text="Timings of these cells were noisy; read their times as a rough guide.", details=noisy)


def _noise_text(cell: CellResult) -> str:
    """Return why times are noisy, and which where it is not all of them."""
    found = {name: reason for name in _TIMES if (reason := timing_noise(cell, name))}
    if len(found) == len(_TIMES) and len(set(found.values())) == 1:
        return found[_TIMES[0]]
    return "; ".join(f"{measure(name).label}: {reason}" for name, reason in found.items())


def _failure_text(group: Group, cell: CellResult) -> str:
    phase = f" in {cell.phase}" if cell.phase else ""
    return f"{group.cell_label(cell)}: {cell.status}{phase}{f' ({cell.error:.300})' if cell.error else ''}"


def _monotone_notes(group: Group) -> Iterator[Note]:
    found, looked = not_monotone(group), budget_steps(group)
    for is_clear, text in (
        (True, "Quality gets clearly worse where the budget grows; something other than the budget is at work."),
        (False, "Quality does not rise with every step in budget, but these steps are within the noise."),
    ):
        lines = tuple(_step_line(group, contrast) for contrast in found if contrast.is_clear == is_clear)
        if lines:
            yield Note(text=text, details=lines)
    if looked.pairs and not found:
        yield Note(text=_steps_in_order(looked))


def _steps_in_order(looked: Looked) -> str:
    names = listed([measure(name).label for name in looked.names])
    num, clear = len(looked.pairs), looked.num_clear
    sure = f"{clear} of {num} steps are clear" + ("" if clear == num else ", the others may be chance")
    return f"Quality ({names}) never rises where the budget shrinks, as it should be; {sure}."


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
    too_long = tuple(_beyond_text(group, cell) for cell in group.cells if cell.estimate("num_beyond_context"))
    if too_long:
        text = "Prompts go beyond the model's context; what is said there is no policy's doing."
        yield Note(text=text, details=too_long)
    counts = [found.n for cell in group.cells for name in QUALITIES if (found := cell.estimate(name)) and found.n]
    if counts and min(counts) < FEW_SAMPLES:
        yield Note(text=f"Some numbers rest on only {min(counts)} samples; intervals from so few are too narrow.")


def _beyond_text(group: Group, cell: CellResult) -> str:
    found = cell.estimate("num_beyond_context")
    assert found is not None
    return f"{group.cell_label(cell)}: {found.value:.0f} of {found.n} prompts ({found.method})"


def _environment_values(group: Group, name: str) -> list[str]:
    return sorted({str(cell.environment.get(name, "not recorded")) for cell in group.cells if not cell.failed})
