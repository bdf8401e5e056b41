"""Notes on `random`: which policies it beats, why that may be, and what it was compared in.

Reasons are offered as conjectures, and each says whether the numbers of this report bear it out.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.measures import format_value, measure
from kvbench.report.cell import CellResult
from kvbench.report.findings import QUALITIES, Contrast, Looked, above_random, below_random, contrast_text
from kvbench.report.listing import listed
from kvbench.report.load import Group
from kvbench.report.note import Note
from kvbench.results.record import AUTOPSY_FILE

_POSITION_ONLY = ("streaming", "local", "window", "recent")
_RECALL = "objects_recalled_fraction"


def random_notes(group: Group) -> Iterator[Note]:
    """Yield what stands below `random`, clearly or perhaps, or that nothing does."""
    found, looked = below_random(group), above_random(group)
    measured = any(cell.policy == "random" and not cell.failed for cell in group.budgeted)
    if not measured and any(cell.estimate(name) for cell in group.budgeted for name in QUALITIES):
        yield Note(text="The policy `random` was not measured, so nothing shows what choosing is worth.")
    elif looked.pairs and not found:
        yield Note(text=_in_order(looked))
    clear = {label: some for label, some in found.items() if any(contrast.is_clear for contrast in some)}
    for label, contrasts in clear.items():
        budgets = listed(list(dict.fromkeys(one.first.budget for one in contrasts if one.is_clear)))
        text = f"`random` is not the worst policy: `{label}` scores below it at {budgets}. "
        yield Note(text=text + _reason(group, contrasts), details=tuple(map(_contrast_line, contrasts)))
    chance = {label: some for label, some in found.items() if label not in clear}
    if chance:
        names = ", ".join(f"`{label}`" for label in chance)
        text = f"`random` scores above {names} somewhere, but every paired interval holds zero: this may be chance."
        lines = (f"{label}, {_contrast_line(contrast)}" for label, some in chance.items() for contrast in some)
        yield Note(text=text, details=tuple(lines))


def _in_order(looked: Looked) -> str:
    names = listed([measure(name).label for name in looked.names])
    budgets = listed(list(dict.fromkeys(worse.budget for worse, _, _ in looked.pairs)))
    num, clear = len(looked.pairs), looked.num_clear
    sure = f"{clear} of {num} differences are clear" + ("" if clear == num else ", the others may be chance")
    return f"No policy scores below `random` in {names} at {budgets}, as it should be; {sure}."


def _reason(group: Group, contrasts: list[Contrast]) -> str:
    policy = contrasts[0].first.policy
    if any(word in policy for word in _POSITION_ONLY):
        return (
            "This may be because it keeps only the first tokens (sinks) and the most recent ones, whatever they are, "
            "and so drops the picture, which stands between them, while a random draw keeps some of every part of it. "
        ) + _evidence(group, contrasts)
    return (
        "This may be because what its score ranked high so far is not what the later answer needs, or because the "
        "kept tokens crowd in a few places, while a random draw spreads evenly over the picture. This is a "
        f"conjecture; {_where_to_look(contrasts)}"
    )


def _where_to_look(contrasts: list[Contrast]) -> str:
    folders = {contrast.first.cell_folder for contrast in contrasts}
    if any(folder is not None and (folder / AUTOPSY_FILE).exists() for folder in folders):
        return '"What the cache kept" shows for a few samples which tokens it held.'
    return "which tokens were kept was not recorded."


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
