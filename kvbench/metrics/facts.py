"""How many known facts an answer still states; for scenes, how many objects it recalls."""

from __future__ import annotations

from collections.abc import Hashable


def fact_scores(*, stated: frozenset[Hashable], true: frozenset[Hashable]) -> dict[str, float]:
    """Return the share of true objects that are stated, and the F1 of stated against true.

    An answer that states nothing scores 0; `true` must not be empty.
    """
    right = len(stated & true)
    return {
        "objects_recalled_fraction": right / len(true),
        "objects_f1": 2 * right / (len(stated) + len(true)),
    }
