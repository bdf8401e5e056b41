"""Whether the full cache can do the task of a group; where it can not, its data set ranks no policy on its model.

    ability = Ability(group)
    ability.reason("ppl")   # "" where policies may be ranked by it
    ability.sentence        # what every report says then

The rule is that of kvbench.stats.power and docs/statistics.md. It is asked of the measures that score answers
against what is right; all other measures of the same answers (distance to the full cache, perplexity, KL) stand or
fall with them. Times and bytes are no matter of ability.
"""

from __future__ import annotations

import re
from functools import cached_property

from kvbench.measures import format_value, format_with_interval, measure
from kvbench.report.load import CellResult, Estimate, Group
from kvbench.stats.power import HEADROOM_FRACTION, MOST_EMPTY_FRACTION, constant_answer_score, floor_of
from kvbench.stats.tests import is_quality

_FACTS = ("needles_recalled_fraction", "objects_recalled_fraction")  # decide alone where a data set knows facts
_TEXTS = ("exact_fraction", "rougeL_vs_reference")  # else one of these is enough: long references are never met exactly
_WITHHELD = (
    "Scores and differences are shown, but no policy is called better, worse or safe by them; times and bytes are "
    "compared as ever."
)
_TURN = re.compile(r"turn\d+_")


class Ability:
    """What the full cache's cell of a group shows; nothing is withheld where there is none."""

    def __init__(self, group: Group) -> None:
        """Take the full cache's cell of `group`."""
        self._full = group.full

    def reason(self, name: str) -> str:
        """Return in a few words why `name` ranks nobody, "" where it does or says nothing of quality."""
        return "the full cache itself does not do this task" if is_quality(name) and self.cause(name) else ""

    @cached_property
    def sentence(self) -> str:
        """Return why this data set can not rank policies, "" where it can in some measure."""
        found = list(self._findings.values())
        return (
            f"This data set can not rank policies on this model: {found[0]}. {_WITHHELD}" if all(found or [""]) else ""
        )

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

    def cause(self, name: str) -> str:
        """Return what is wrong with the full cache's answers that `name` is about, "" where nothing is known to be.

        Those of the same turn; of all turns where `name` is of none of them.
        """
        turn = _TURN.match(name)
        prefix = turn[0] if turn else ""
        if prefix in self._findings:
            return self._findings[prefix]
        found = list(self._findings.values())
        return found[0] if found and all(found) else ""

    @cached_property
    def _findings(self) -> dict[str, str]:
        """Return by turn ("" outside of conversations) what is wrong, "" where nothing is."""
        full = self._full
        if full is None:
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
    own = _estimates(full, prefix, _FACTS) or _estimates(full, prefix, _TEXTS)
    if not own:
        return None
    references = (sample.get(f"{prefix}reference") for sample in full.samples)
    chance = constant_answer_score(text for text in references if isinstance(text, str) and text)
    floor = floor_of(chance)
    if any(_lowest(found) > floor for found in own.values()):
        return ""
    name, found = next(iter(own.items()))
    return (
        f"the full cache itself reaches {measure(name).label} {_shown(name, found)}, which is not clear of "
        f"{format_value(name, floor)}, {HEADROOM_FRACTION:.0%} of the way from chance ({format_value(name, chance)}) "
        "to a perfect score (were answers cut by max_new_tokens?)"
    )


def _estimates(full: CellResult, prefix: str, names: tuple[str, ...]) -> dict[str, Estimate]:
    found = ((f"{prefix}{name}", full.estimate(f"{prefix}{name}")) for name in names)
    return {name: estimate for name, estimate in found if estimate is not None}


def _lowest(found: Estimate) -> float:
    return found.bounds[0]


def _shown(name: str, found: Estimate) -> str:
    return format_with_interval(name, found.value, found.low, found.high)
