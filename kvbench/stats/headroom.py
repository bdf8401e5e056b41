"""Whether the full cache does a task well enough that policies can be told apart by what they lose of it.

A policy can only be shown to lose what the full cache has. Where the full cache's own score is not clear of what
chance gives, differences between policies are differences between failures: the rule below then ranks nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# Five margins of 0.02: of less than that, "equivalent" would allow a policy to lose more than a fifth.
HEADROOM_FRACTION = 0.1
MOST_EMPTY_FRACTION = 0.5  # of the full cache's answers; with more, most scores compare with nothing


def floor_of(chance: float) -> float:
    """Return what the lower end of the full cache's interval must exceed: a tenth of the way from chance to 1."""
    return chance + HEADROOM_FRACTION * (1.0 - chance)


def constant_answer_score(references: Iterable[str]) -> float:
    """Return what one and the same answer to every question would score: the share of the most common reference.

    0 where no reference is there twice, since then a constant answer is right by knowing one sample.
    """
    counts = Counter(" ".join(text.casefold().split()) for text in references)
    most = max(counts.values(), default=0)
    return most / counts.total() if most > 1 else 0.0
