"""The published merges in plain lists and float64: who of a head stays, and as what; a step is a cut of one entry.

Each takes a head in the order of tokens and the positions that stay, and gives new entries. `margin` of a rule counts
how near a draw or a cosine came to what it was compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor

from tests.naive import Entry, Head, Rule, Where
from tests.naive_rules import drawn_bits

Merged = tuple[Head, float]


def naive_cam(head: Head, keep: set[int], draw: Callable[[int], float], spread: int) -> Merged:
    """CaM: with a chance of its attention over the mean of those after it, what goes gives 1 / spread to the next."""
    kept, margin = {e.position: replace(e) for e in head if e.position in keep}, math.inf
    for gone in head:
        after = [e for e in head if e.position in keep and e.position > gone.position]
        if gone.position in keep or not after:
            continue
        chance = gone.rows[-1] / (sum(e.rows[-1] for e in after) / len(after))
        margin = min(margin, abs(chance - draw(gone.position)))
        if draw(gone.position) < chance:
            for taker in after[:spread]:
                kept[taker.position].value = kept[taker.position].value + gone.value / spread
    return list(kept.values()), margin


def naive_draw(
    position: int, *, seed: int, layer: int, num_layers: int, head: int, num_heads: int, row_seed: int
) -> float:
    """The number that a token draws for a merge, in Python's integers."""
    stream = (2**40 + seed * num_layers + layer) * num_heads + head
    return drawn_bits(position + row_seed * 0xBF58476D1CE4E5B9, stream) / 2**24


def naive_d2o(
    head: Head, keep: set[int], threshold: float, momentum: float, by_cosine: bool
) -> tuple[Head, float, float]:
    """D2O: what goes joins the most similar, if that reaches the threshold (NaN: none yet), which is given back."""
    stay = [e for e in head if e.position in keep]
    best = {}
    for gone in head:
        if gone.position not in keep and stay:
            cosines = [_cosine(gone.key, e.key) for e in stay]
            best[gone.position] = max(cosines), stay[cosines.index(max(cosines))].position, gone
    if not best:
        return [replace(e) for e in stay], threshold, math.inf
    mean = sum(cosine for cosine, _, _ in best.values()) / len(best)
    moved = mean if math.isnan(threshold) else momentum * threshold + (1 - momentum) * mean
    kept = []
    for e in stay:
        joins = [(cosine, gone) for cosine, to, gone in best.values() if to == e.position and cosine >= moved]
        weights = [cosine if by_cosine else math.exp(cosine - 1) for cosine, _ in joins]
        whole = 1 + (len(joins) if by_cosine else sum(weights))
        keys = e.key + sum(w * gone.key for w, (_, gone) in zip(weights, joins, strict=True))
        values = e.value + sum(w * gone.value for w, (_, gone) in zip(weights, joins, strict=True))
        kept.append(replace(e, key=keys / whole, value=values / whole))
    gaps = [abs(cosine - moved) for cosine, _, _ in best.values() if len(best) > 1 or not math.isnan(threshold)]
    return kept, moved, min(gaps, default=math.inf)


def naive_kvmerger(head: Head, keep: set[int], protected: set[int], threshold: float) -> Merged:
    """KVMerger: runs of neighbours above the threshold; what goes joins the most attended of its run that stays."""
    runs, margin = [head[:1]], math.inf
    for before, e in pairwise(head):
        cosine = _cosine(before.key, e.key)
        alike = cosine > threshold and not {before.position, e.position} & protected
        margin = min(margin, abs(cosine - threshold))
        runs = [*runs[:-1], [*runs[-1], e]] if alike else [*runs, [e]]
    kept = {e.position: replace(e) for e in head if e.position in keep}
    for run in runs:
        stay = [e for e in run if e.position in keep]
        gone = [e for e in run if e.position not in keep]
        if not stay or not gone:
            continue
        pivot = max(stay, key=lambda e: (e.mass, -e.position))
        far = [float((e.key - pivot.key).norm()) for e in gone]
        mean = sum(far) / len(far)
        weights = [math.exp(-((d / mean) ** 2)) if mean else 1.0 for d in far]
        whole = 1 + sum(weights)
        key = (pivot.key + sum(w * e.key for w, e in zip(weights, gone, strict=True))) / whole
        value = (pivot.value + sum(w * e.value for w, e in zip(weights, gone, strict=True))) / whole
        mass = pivot.mass + sum(e.mass for e in gone)
        kept[pivot.position] = replace(kept[pivot.position], key=key, value=value, mass=mass)
    return list(kept.values()), margin


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


@dataclass
class NaiveMerge:
    """A rule by which entries go, and what becomes of them. at_steps: whether those of decode steps are merged too."""

    rule: Rule
    at_steps: bool
    tolerance: float = 1e-6
    merge_margin: float = math.inf
    num_heads: int = 0

    def merged(self, head: Head, keep: set[int], index: int, where: Where) -> Merged:
        """Return the entries that stay."""
        raise NotImplementedError

    @property
    def margin(self) -> float:
        """The smallest gap of both, 0 where a merge hung on less than the `tolerance` of float32."""
        return self.rule.margin if self.merge_margin > self.tolerance else 0.0

    def plan(self, heads: list[Head], where: Where) -> list[Head]:
        self.num_heads = len(heads)
        kept = self.rule.plan([[replace(e) for e in head] for head in heads], where)
        return [
            self._noted(*self.merged(head, {e.position for e in stay}, index, where))
            for index, (head, stay) in enumerate(zip(heads, kept, strict=True))
        ]

    def victim(self, heads: list[Head], head: int, where: Where) -> Entry:
        self.num_heads, gone = len(heads), self.rule.victim(heads, head, where)
        if self.at_steps:
            stay = {e.position for e in heads[head]} - {gone.position}
            merged = {e.position: e for e in self._noted(*self.merged(heads[head], stay, head, where))}
            for e in heads[head]:
                new = merged.get(e.position, e)
                e.key, e.value = new.key, new.value
        return gone

    def _noted(self, kept: Head, margin: float) -> Head:
        self.merge_margin = min(self.merge_margin, margin)
        return kept


@dataclass
class NaiveCaM(NaiveMerge):
    """CaM with its seed. prompt_too: whether what a prompt loses is merged as well."""

    seed: int = 0
    spread: int = 32
    prompt_too: bool = False

    def plan(self, heads: list[Head], where: Where) -> list[Head]:
        return super().plan(heads, where) if self.prompt_too else self.rule.plan(heads, where)

    def merged(self, head: Head, keep: set[int], index: int, where: Where) -> Merged:
        def draw(position: int) -> float:
            return naive_draw(
                position,
                seed=self.seed,
                layer=where.layer,
                num_layers=where.num_layers,
                head=index,
                num_heads=self.num_heads,
                row_seed=0,
            )

        return naive_cam(head, keep, draw, self.spread)


@dataclass
class NaiveD2O(NaiveMerge):
    """D2O, whose threshold each head remembers."""

    momentum: float = 0.5
    by_cosine: bool = False
    thresholds: dict[int, float] = field(default_factory=dict)

    def merged(self, head: Head, keep: set[int], index: int, where: Where) -> Merged:
        before = self.thresholds.get(index, math.nan)
        kept, self.thresholds[index], margin = naive_d2o(head, keep, before, self.momentum, self.by_cosine)
        return kept, margin


@dataclass
class NaiveKVMerger(NaiveMerge):
    """KVMerger over a rule that protects the newest share of the budget."""

    threshold: float = 0.75
    recent_fraction: float = 0.5

    def merged(self, head: Head, keep: set[int], index: int, where: Where) -> Merged:
        recent = math.floor(self.recent_fraction * where.budget + 1e-9)
        return naive_kvmerger(head, keep, {*range(where.seen - recent, where.seen)}, self.threshold)
