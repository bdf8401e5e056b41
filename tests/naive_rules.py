"""A `Rule` per bundled policy, written from the papers' definitions and not from the policies."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from tests.naive import Entry, Head, Where


@dataclass
class NaiveFull:
    margin: float = math.inf

    def plan(self, heads: list[Head], where: Where) -> list[Head]:
        raise AssertionError("never over budget")

    def victim(self, heads: list[Head], head: int, where: Where) -> Entry:
        raise AssertionError("never over budget")


@dataclass
class NaiveStreaming:
    """Those of the first `num_sinks` that are still there, and the newest; at least one newest."""

    num_sinks: int = 4
    margin: float = math.inf

    def plan(self, heads: list[Head], where: Where) -> list[Head]:
        num_sinks = min(self.num_sinks, where.budget - 1)
        kept = []
        for head in heads:
            sinks = [e for e in head if e.position < num_sinks]
            others = [e for e in head if e.position >= num_sinks]
            kept.append(sinks + others[len(sinks) - where.budget :])
        return kept

    def victim(self, heads: list[Head], head: int, where: Where) -> Entry:
        sinks = min(self.num_sinks, where.budget - 1)
        return min((e for e in heads[head] if e.position >= sinks), key=lambda e: e.position)


@dataclass
class NaiveH2O:
    """The newest share of the budget, and of the others those of largest accumulated attention."""

    recent_fraction: float = 0.5
    margin: float = math.inf

    def _others(self, head: Head, where: Where) -> tuple[Head, Head]:
        recent = math.floor(Fraction(str(self.recent_fraction)) * where.budget)
        newest = [e for e in head if e.position >= where.seen - recent]
        others = sorted((e for e in head if e.position < where.seen - recent), key=lambda e: (e.mass, e.position))
        return newest, others

    def plan(self, heads: list[Head], where: Where) -> list[Head]:
        kept = []
        for head in heads:
            newest, others = self._others(head, where)
            drop = max(0, len(head) - where.budget)
            if 0 < drop < len(others):
                self.margin = min(self.margin, others[drop].mass - others[drop - 1].mass)
            kept.append(sorted(others[drop:] + newest, key=lambda e: e.position))
        return kept

    def victim(self, heads: list[Head], head: int, where: Where) -> Entry:
        _, others = self._others(heads[head], where)
        if len(others) > 1:
            self.margin = min(self.margin, others[1].mass - others[0].mass)
        return others[0]


def drawn_bits(token: int, stream: int) -> int:
    """SplitMix64's finalizer of a token in one of many streams, 24 bits."""
    mixed = (token + (stream + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) >> 40


@dataclass
class NaiveRandom:
    """A fixed priority per (seed, layer, head, position): SplitMix64 in Python integers."""

    seed: int = 0
    margin: float = math.inf

    def _priority(self, entry: Entry, head: int, heads: int, where: Where) -> tuple[int, int]:
        stream = (self.seed * where.num_layers + where.layer) * heads + head
        return drawn_bits(entry.position, stream), entry.position

    def plan(self, heads: list[Head], where: Where) -> list[Head]:
        kept = []
        for index, head in enumerate(heads):
            ranked = sorted(head, key=lambda e: self._priority(e, index, len(heads), where))
            kept.append(sorted(ranked[-where.budget :], key=lambda e: e.position))
        return kept

    def victim(self, heads: list[Head], head: int, where: Where) -> Entry:
        return min(heads[head], key=lambda e: self._priority(e, head, len(heads), where))


def buckets(anchors: list[int], length: int) -> list[range]:
    """Eq. 2 of Elastic Cache: the cells of the anchors t_1 < t_2 < .. on the line 0 .. length - 1."""
    if not anchors:
        return []
    ends = [(first + second) // 2 for first, second in itertools.pairwise(anchors)]
    starts = [0, *(end + 1 for end in ends)]
    return [range(start, end + 1) for start, end in zip(starts, [*ends, length - 1], strict=True)]


def _mean(states: list[Tensor]) -> Tensor:
    return torch.stack(states).mean(0)


@dataclass
class NaiveElastic:
    """Anchors by mean column sum over heads, the mean of each bucket (Eq. 3), then a fixed point.

    The first of all tokens and the newest stay as they are, count in the budget and are no anchors; with
    `recent_fraction` as many of the newest as are that share of the budget. merge: what of a bucket is averaged.
    """

    fixed_point: int = 25
    merge: str = "both"
    recent_fraction: float = 0.0
    margin: float = math.inf

    def plan(self, heads: list[Head], where: Where) -> list[Head]:
        length = len(heads[0])
        if length <= where.budget:
            return heads
        first = {i for i in [0] if heads[0][i].position == 0 and where.budget > 1}
        num_recent = max(1, math.floor(round(self.recent_fraction * where.budget, 9)))
        ends = {*first, *range(length - min(num_recent, where.budget - len(first)), length)}
        importance = {i: sum(head[i].mass for head in heads) / len(heads) for i in range(length) if i not in ends}
        ranked = sorted(importance, key=lambda i: (importance[i], i))
        num_anchors = where.budget - len(ends)
        if 0 < num_anchors < len(ranked):
            self.margin = min(self.margin, importance[ranked[-num_anchors]] - importance[ranked[-num_anchors - 1]])
        anchors = sorted(ranked[len(ranked) - num_anchors :])
        cells = {
            anchor: [i for i in bucket if i not in ends]
            for anchor, bucket in zip(anchors, buckets(anchors, length), strict=True)
        }
        return [
            [self._merged(head, index, cells) for index in range(length) if index in cells or index in ends]
            for head in heads
        ]

    def _merged(self, head: Head, index: int, cells: dict[int, list[int]]) -> Entry:
        parts = [head[i] for i in cells.get(index, [index])]
        return Entry(
            position=head[index].position,
            key=_mean([e.key for e in parts]) if self.merge in ("both", "keys") else head[index].key,
            value=_mean([e.value for e in parts]) if self.merge in ("both", "values") else head[index].value,
            mass=head[index].mass if self.merge == "none" else sum(e.mass for e in parts),
        )

    def victim(self, heads: list[Head], head: int, where: Where) -> Entry:
        queue = sorted(heads[head], key=lambda e: e.position)
        if len(queue) == 2:
            return queue[0]
        return queue[max(1, len(queue) - 1 - self.fixed_point)]
