"""What the released caches do, in lists and in our own words: the reference for the policies as released.

An entry is a token with one key and one value per head; a layer is a list of entries in the order of the
released tensors. `cut` is called after every forward, as there: `seen` counts tokens, `rows` holds the
attention (query heads, queries, entries) of each layer. `CodeStopsError` stands for the errors of that code.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


class CodeStopsError(Exception):
    """The released code would end here with an error."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """Keys and values (H, D) of one token in one layer."""

    index: int
    key: Tensor
    value: Tensor


Layer = list[Token]


def too_many(entries: int, seen: int, ratio: float) -> int:
    """Entries above the share 1 - ratio of what was seen, cut to a whole number."""
    return int(entries - seen * (1 - ratio))


def _column_sums(rows: Tensor) -> list[float]:
    sums: list[float] = rows.double().mean(dim=0).sum(dim=0).tolist()
    return sums


def _kept_by_sorted_order(scores: list[float], forget: int) -> list[int]:
    """Candidate j stays if the index of the j-th smallest score is above `forget`."""
    order = sorted(range(len(scores)), key=lambda j: scores[j])
    return [j for j in range(len(scores)) if order[j] > forget]


@dataclass(kw_only=True)
class ElasticCode:
    ratio: float
    start: int = 1
    distance: int = -25
    point: int = 0
    was_cut: bool = False
    margin: float = math.inf

    def cut(self, layers: list[Layer], seen: int, rows: list[Tensor]) -> list[Layer]:
        forget = too_many(len(layers[0]), seen, self.ratio)
        if forget <= 0:
            return layers
        if forget == 1:
            return [self._without_point(layer) for layer in layers]
        if self.was_cut:
            raise CodeStopsError
        self.was_cut, self.point = True, len(layers[0]) - forget + self.distance
        return [self._merged(layer, _column_sums(row), forget) for layer, row in zip(layers, rows, strict=True)]

    def _without_point(self, layer: Layer) -> Layer:
        left = layer[: self.point] + layer[self.point + 1 :]  # negative indices count from the end, -1 doubles
        if len(left) != len(layer) - 1:
            raise CodeStopsError
        return left

    def _merged(self, layer: Layer, scores: list[float], forget: int) -> Layer:
        middle = scores[self.start : len(layer) - 1]
        ordered = sorted(middle)
        self.margin = min(self.margin, min((b - a for a, b in itertools.pairwise(ordered)), default=1.0))
        kept = _kept_by_sorted_order(middle, forget)
        anchors = [j + self.start for j in kept]
        if not anchors:
            raise CodeStopsError
        guests: dict[int, list[Token]] = {anchor: [layer[anchor]] for anchor in anchors}
        for j in range(len(middle)):
            if j not in kept:  # an index into the middle, used as one into the layer
                guests[min(anchors, key=lambda anchor: (abs(anchor - j), anchor))].append(layer[j])
        merged = [_mean(layer[anchor], guests[anchor]) for anchor in anchors]
        return [*layer[: self.start], *merged, layer[-1]]


def _mean(anchor: Token, guests: list[Token]) -> Token:
    return replace(
        anchor,
        key=torch.stack([guest.key for guest in guests]).mean(0),
        value=torch.stack([guest.value for guest in guests]).mean(0),
    )


@dataclass(kw_only=True)
class H2OCode:
    """One score list for the model; it is shortened with the cache at decode, but not after the prompt."""

    ratio: float
    scores: list[float] = field(default_factory=lambda: [0.0] * 2049)
    was_cut: bool = False
    margin: float = math.inf

    def cut(self, layers: list[Layer], seen: int, rows: list[Tensor]) -> list[Layer]:
        length = len(layers[0])
        for index, received in enumerate(_column_sums(torch.cat(rows))):
            self.scores[index] += received
        forget = too_many(length, seen, self.ratio)
        if forget <= 0:
            return layers
        if forget == 1:
            return self._without_lowest(layers)
        if self.was_cut:
            raise CodeStopsError
        self.was_cut = True
        kept = [*_kept_by_sorted_order(self.scores[: length - 1], forget), length - 1]
        return [[layer[index] for index in kept] for layer in layers]

    def _without_lowest(self, layers: list[Layer]) -> list[Layer]:
        middle = self.scores[1 : len(layers[0]) - 1]
        if not middle:
            raise CodeStopsError
        ordered = sorted(middle)
        self.margin = min(self.margin, ordered[1] - ordered[0] if len(ordered) > 1 else 1.0)
        gone = 1 + middle.index(ordered[0])
        self.scores = [*self.scores[:gone], *self.scores[gone + 1 :], self.scores[-1]]
        return [layer[:gone] + layer[gone + 1 :] for layer in layers]


@dataclass(kw_only=True)
class LocalCode:
    ratio: float
    start: int = 1
    margin: float = math.inf

    def cut(self, layers: list[Layer], seen: int, rows: list[Tensor]) -> list[Layer]:
        forget = max(0, too_many(len(layers[0]), seen, self.ratio))
        return [layer[: self.start] + layer[self.start + forget :] for layer in layers]


@dataclass(kw_only=True)
class WindowCode:
    """StreamingLLM's cache: first tokens and a window of fixed size."""

    start: int
    recent: int
    margin: float = math.inf

    def cut(self, layers: list[Layer], seen: int, rows: list[Tensor]) -> list[Layer]:
        length = len(layers[0])
        if length <= self.start + self.recent:
            return layers
        return [layer[: self.start] + layer[length - self.recent :] for layer in layers]


Code = ElasticCode | H2OCode | LocalCode | WindowCode
