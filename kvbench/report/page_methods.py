"""How each number on the page is measured, and what the words of a verdict mean."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.measures import measure
from kvbench.report.collapses import rule_text
from kvbench.report.comparison import DECLARED, Choices
from kvbench.report.difference_text import difference_unit, size_text
from kvbench.report.judged import Judged
from kvbench.report.listing import listed
from kvbench.report.load import Group, Results
from kvbench.report.page_markup import prose
from kvbench.report.page_tables import measures_html, methods_text
from kvbench.report.table_rows import results_table
from kvbench.stats.tests import smallest_margin

_WORDS = (
    (
        "better, worse",
        "the 95 % interval of the difference leaves zero out, and p is at most 5 % after Holm's correction",
    ),
    ("equivalent", "the whole interval lies inside the margin, which {margins}"),
    ("undecided", "neither is shown; about how many more samples would decide it is said where that can be estimated"),
    ("noisy", "the machine was not quiet; times of this cell are grey and in no ranking, its quality counts"),
    ("not comparable", "the two cells were not scored on the same samples"),
    ("not ranked", "the full cache itself does not do the task, so no policy can be shown to lose or keep it"),
    ("detectable", "the smallest true difference that this many samples find in 80 % of repetitions"),
)
_PASSES = (
    "Quality, speed and memory are three passes. Quality: the same samples under every policy, greedy, differences "
    "paired by sample and clustered by picture or document. Speed: launches in the order policy, full, full, policy in "
    "one process, medians per launch. Memory: counted from the storages of tensors, once. The full cache answers twice "
    "in every run and must give the same tokens. The comparisons of one measure within one model and data set are one "
    "family for Holm's correction: against the full cache one, between policies at the same budget another."
)


def methods_html(results: Results, judged: Sequence[Judged], choices: Choices = DECLARED) -> str:
    """Return passes, words, intervals and the definitions of every number shown."""
    margins = _margins_text(choices)
    words = "".join(
        f"<li><b>{prose(word)}</b>: {prose(meaning.format(margins=margins))}.</li>" for word, meaning in _WORDS
    )
    rules = "".join(dict.fromkeys(f"<p>{prose(rule_text(one.primary))}</p>" for one in judged if one.primary))
    shown = {name for group in results.groups for name in _columns(group)}
    intervals = prose(f"Intervals of single cells: {methods_text(results)}.")
    return f"<p>{prose(_PASSES)}</p><ul>{words}</ul>{rules}<p>{intervals}</p>{measures_html(shown)}"


def _margins_text(choices: Choices) -> str:
    """Say where margins come from; one that the reader of the numbers chose was not declared before them."""
    chosen = [
        f"{measure(name).label} ({_size(name, value)} instead of {_size(name, smallest_margin(name))})"
        for name, value in sorted(choices.margins.items())
        if value != smallest_margin(name)
    ]
    if not chosen:
        return "was declared before measuring"
    return f"was chosen for this page in {listed(chosen)} and declared before measuring elsewhere"


def _size(name: str, margin: float | None) -> str:
    return f"{size_text(name, margin)} {difference_unit(name)[0]}".strip()


def _columns(group: Group) -> tuple[str, ...]:
    return (*results_table(group).columns, *results_table(group, every_measure=True).columns)
