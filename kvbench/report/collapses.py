"""Which samples a policy loses: their scores beside the full cache's, and where they collapse.

A sample collapses where its score is under half of the full cache's; in perplexity, where its tokens are on average
more than one nat less likely. Samples on which the full cache itself scores nothing can not collapse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvbench.measures import measure
from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.natural import natural_key
from kvbench.report.paired import sample_score

KEPT_SHARE = 0.5
LOST_NATS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One sample under one policy; `loss` is positive where the policy is worse, in the measure's difference unit."""

    sample: str
    full: float
    score: float
    loss: float
    collapsed: bool


def rule_text(name: str) -> str:
    """Return the rule in words."""
    label = measure(name).label
    if measure(name).better == "higher":
        return f"A sample collapses where its {label} is under half of the full cache's."
    return "A sample collapses where its tokens are on average more than one nat less likely than with the full cache."


def losses_of(group: Group, cell: CellResult, name: str) -> tuple[Loss, ...]:
    """Return what the cell loses on every sample that both have, the largest loss first."""
    if group.full is None or cell.failed:
        return ()
    others = scores_of(group.full, name)
    found = [
        _loss(identity, others[identity], score, name)
        for identity, score in scores_of(cell, name).items()
        if identity in others
    ]
    return tuple(sorted(found, key=lambda one: (-one.loss, natural_key(one.sample))))


def scores_of(cell: CellResult, name: str) -> Mapping[str, float]:
    """Return each sample's score by its id; a perplexity's is nats per token."""
    scored = ((str(sample.get("id")), sample_score(sample, name)) for sample in cell.samples)
    return {identity: score[0] / score[1] for identity, score in scored if score is not None}


def is_collapsed(name: str, score: float, full: float) -> bool:
    """Tell whether a sample's score lost most of what the full cache's is worth; scores of ppl are nats per token."""
    if measure(name).better == "higher":
        return full > 0 and score < KEPT_SHARE * full
    return score - full > LOST_NATS


def _loss(sample: str, full: float, score: float, name: str) -> Loss:
    loss = full - score if measure(name).better == "higher" else score - full
    return Loss(sample=sample, full=full, score=score, loss=loss, collapsed=is_collapsed(name, score, full))
