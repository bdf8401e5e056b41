"""How many known facts an answer still states; for scenes, how many objects it recalls."""

from __future__ import annotations

from collections.abc import Hashable


def fact_scores(*, stated: frozenset[Hashable], true: frozenset[Hashable], noun: str = "objects") -> dict[str, float]:
    """Return the share of true facts that are stated, and the F1 of stated against true.

    An answer that states nothing scores 0; `true` must not be empty. `noun` begins the names.
    """
    right = len(stated & true)
    return {
        f"{noun}_recalled_fraction": right / len(true),
        f"{noun}_f1": 2 * right / (len(stated) + len(true)),
    }
