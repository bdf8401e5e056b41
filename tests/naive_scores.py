"""The score of each policy that only scores, one entry at a time and in plain Python, and the `Rule` made of it.

Written from the papers' definitions. A score gets the heads of a layer, each from its oldest entry to its newest.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from tests.naive import Entry, Head, Where

Scores = list[list[float]]
Score = Callable[[list[Head]], Scores]


def newest(heads: list[Head]) -> Scores:
    return [[float(e.position) for e in head] for head in heads]


def key_norm(heads: list[Head]) -> Scores:
    return [[-_length(e.key) for e in head] for head in heads]


def vatp(heads: list[Head]) -> Scores:
    return [[e.mass * sum(abs(x) for x in e.value.tolist()) for e in head] for head in heads]


def tova(heads: list[Head]) -> Scores:
    means = [statistics.fmean(head[index].rows[-1] for head in heads) for index in range(len(heads[0]))]
    return [means for _ in heads]


def h2o_mean(heads: list[Head]) -> Scores:
    return [[e.mass / len(e.rows) for e in head] for head in heads]


def keydiff(heads: list[Head]) -> Scores:
    found = []
    for head in heads:
        directions = [[x / _length(e.key) for x in e.key.tolist()] for e in head]
        anchor = [statistics.fmean(channel) for channel in zip(*directions, strict=True)]
        size = math.hypot(*anchor)
        found.append([-sum(a * b for a, b in zip(one, anchor, strict=True)) / size for one in directions])
    return found


def scissorhands(history: int) -> Score:
    """Count the queries of the history that gave an entry its even share or more."""

    def pivotal(entry: Entry, head: Head, back: int) -> bool:
        visible = sum(len(other.rows) >= back for other in head)
        return len(entry.rows) >= back and Fraction(entry.rows[-back]) >= Fraction(1, visible)

    def score(heads: list[Head]) -> Scores:
        return [
            [sum(pivotal(e, head, back) for back in range(1, min(history, len(head)) + 1)) for e in head]
            for head in heads
        ]

    return score


@dataclass
class LagKVRule:
    """Rank each partition against the next; what has none after it gets 1.

    margin: the closest that two entries of a partition came when last asked; below rounding neither's place is sure.
    """

    sinks: int
    lag: int
    margin: float = math.inf

    def __call__(self, heads: list[Head]) -> Scores:
        found, self.margin = [], math.inf
        for head in heads:
            parts = [head[at : at + self.lag] for at in range(self.sinks, len(head), self.lag)]
            whole = [part for part in parts if len(part) == self.lag]
            by_entry = {e.position: 1.0 for e in head}
            for part, reference in itertools.pairwise(whole):
                both = [
                    softmax([_spread(take(e), [take(r) for r in reference]) for e in part])
                    for take in (lambda e: e.key.tolist(), lambda e: e.value.tolist())
                ]
                total = [sum(pair) for pair in zip(*both, strict=True)]
                self.margin = min(self.margin, *(b - a for a, b in itertools.pairwise(sorted(total))))
                for e, mine in zip(part, total, strict=True):
                    by_entry[e.position] = sum(other < mine for other in total) / self.lag
            found.append([by_entry[e.position] for e in head])
        return found


def chunkkv(window: int, chunk: int) -> Score:
    """Sum the attention of the window over each chunk and all heads."""

    def score(heads: list[Head]) -> Scores:
        votes = [sum(sum(head[index].rows[-window:]) for head in heads) for index in range(len(heads[0]))]
        sums = [sum(votes[at : at + chunk]) for at in range(0, len(votes), chunk)]
        return [[sums[index // chunk] for index in range(len(votes))] for _ in heads]

    return score


def r_kv(recent: int, weight: float, kernel: int, similar: float) -> Score:
    """Weigh what the last queries attend to against how much others repeat a key."""

    def importance(head: Head) -> list[float]:
        older, rows = head[: len(head) - recent], []
        for back in range(1, recent + 1):
            largest = [max(row[-back] for row in e.by_head) for e in older]
            if sum(largest) > 0:
                rows.append([one / sum(largest) for one in largest])
        means = [statistics.fmean(column) for column in zip(*rows, strict=True)] or [0.0] * len(older)
        return _neighbours(means, kernel, max) + [0.0] * recent

    def redundancy(head: Head) -> list[float]:
        column = [0.0] * len(head)
        for one in head:
            cosines = {at: _cosine(one.key, e.key) for at, e in enumerate(head) if e is not one}
            near = [at for at, cosine in cosines.items() if cosine > similar]
            cosines.pop(max(near, default=-1), None)
            for at, cosine in cosines.items():
                column[at] += cosine / len(head)
        return softmax(column)

    def score(heads: list[Head]) -> Scores:
        pairs = [zip(importance(head), redundancy(head), strict=True) for head in heads]
        return [[weight * wanted - (1 - weight) * known for wanted, known in pair] for pair in pairs]

    return score


def snapkv(recent: int, kernel: int, take: Callable[[list[float]], float]) -> Score:
    """Sum the attention of the window, and take that of neighbours."""

    def score(heads: list[Head]) -> Scores:
        votes = [[sum(e.rows[-recent:]) for e in head[: len(head) - recent]] for head in heads]
        return [_neighbours(one, kernel, take) + [0.0] * recent for one in votes]

    return score


def keyformer(noise: Callable[[int, int, int, int], float], prompt: int, seen: int, step: float) -> Score:
    """Softmax of logit and noise(head, member, query, token), warmer with each generated query."""

    def score(heads: list[Head]) -> Scores:
        found = []
        for number, head in enumerate(heads):
            totals = [0.0] * len(head)
            for member, rows in enumerate(zip(*(e.by_head for e in head), strict=True)):
                for back in range(1, len(rows[0]) + 1):
                    query, weights = seen - back, [row[-back] for row in rows]
                    warmth = 1.0 + step * max(0, query - prompt + 1)
                    powers = [
                        (weight * math.exp(noise(number, member, query, e.position))) ** (1 / warmth)
                        for weight, e in zip(weights, head, strict=True)
                    ]
                    for at, power in enumerate(powers):
                        totals[at] += power / sum(powers) / len(heads[0][0].by_head) if sum(powers) else 0.0
            found.append(totals)
        return found

    return score


def nacl(noise: Callable[[int, int], float], sinks: int, recent_from: int, proxies: int, best: int) -> Score:
    """Take the `best` of what is not protected by the proxies' attention, and draw the others by noise(head, token)."""

    def score(heads: list[Head]) -> Scores:
        found = []
        for number, head in enumerate(heads):
            votes = [sum(e.rows[-proxies:]) for e in head]
            others = [at for at, e in enumerate(head) if sinks <= e.position < recent_from]
            chosen = sorted(others, key=lambda at: (-votes[at], -head[at].position))[:best]
            found.append([
                math.inf if at in chosen else votes[at] + noise(number, e.position) for at, e in enumerate(head)
            ])  # fmt: skip
        return found

    return score


def cake(recent: int, gamma: float, kernel: int) -> Score:
    """Mean and variance of a column over the window, of each query head."""

    def score(heads: list[Head]) -> Scores:
        found = []
        for head in heads:
            votes = []
            for e in head[: len(head) - recent]:
                columns = [row[-recent:] for row in e.by_head]
                votes.append(statistics.fmean(statistics.fmean(c) + gamma * statistics.variance(c) for c in columns))
            found.append(_neighbours(votes, kernel, lambda near: sum(near) / kernel) + [0.0] * recent)
        return found

    return score


def criticalkv(recent: int, kernel: int, first: int, epsilon: float, weights: Tensor) -> Score:
    """Take the `first` by SnapKV's score, and let the projected value speak in the others; weights (H, G, D, E)."""

    def score(heads: list[Head]) -> Scores:
        found = []
        for head, weight in zip(heads, weights.tolist(), strict=True):
            older = head[: len(head) - recent]
            pooled = _neighbours([sum(e.rows[-recent:]) / recent for e in older], kernel, max)
            best = sorted(range(len(older)), key=lambda at: (-pooled[at], -older[at].position))[:first]
            scores = []
            for at, e in enumerate(older):
                columns = [list(zip(*one, strict=True)) for one in weight]
                norms = [sum(abs(_product(e.value.tolist(), column)) for column in one) for one in columns]
                scores.append(math.inf if at in best else (pooled[at] + epsilon) * statistics.fmean(norms))
            found.append(scores + [0.0] * recent)
        return found

    return score


def curdkv(run: int) -> Score:
    """Multiply what a token's key and value have of the squared lengths of their run."""

    def score(heads: list[Head]) -> Scores:
        found = []
        for head in heads:
            squares = [[_length(take(e)) ** 2 for e in head] for take in (lambda e: e.key, lambda e: e.value)]
            runs = [range(at // run * run, min(len(head), at // run * run + run)) for at in range(len(head))]
            found.append([
                math.prod(one[at] / sum(one[near] for near in runs[at]) for one in squares) for at in range(len(head))
            ])  # fmt: skip
        return found

    return score


def vase(noise: Callable[[int, int], float], recent: int, large: int, kernel: int, sinks: int) -> Score:
    """Take the `large` of widest value, sinks first, and draw the others by their share with noise(head, token)."""

    def score(heads: list[Head]) -> Scores:
        found = []
        for number, head in enumerate(heads):
            older = head[: len(head) - recent]
            spread = [math.inf if e.position < sinks else float(e.value.max() - e.value.min()) for e in older]
            widest = sorted(range(len(older)), key=lambda at: (-spread[at], -older[at].position))[:large]
            shares = [0.0] * len(older)
            for member in range(len(head[0].by_head)):
                for back in range(1, recent + 1):
                    column = [e.by_head[member][-back] for e in older]
                    for at, one in enumerate(column):
                        shares[at] += one / sum(column) / recent / len(head[0].by_head) if sum(column) else 0.0
            shares = _neighbours(shares + [0.0] * recent, kernel, lambda near: sum(near) / kernel)
            found.append([
                math.inf if at in widest else math.log(max(share, 1e-30)) + noise(number, e.position)
                for at, (share, e) in enumerate(zip(shares, head, strict=True))
            ])  # fmt: skip
        return found

    return score


def capkv(head: Head, anchors: list[list[float]], tau: float, epsilon: float) -> list[float]:
    """Return the mean over anchors of w v' A^-1 v, of entries that are no sinks; A^-1 by the formula for each term."""
    total = [0.0] * len(head)
    for anchor in anchors:
        cosines = [_cosine(e.key, Tensor(anchor)) for e in head]
        weights = [math.exp(tau * (one - max(cosines))) for one in cosines]
        width = len(anchor)
        inverse = [[float(i == j) for j in range(width)] for i in range(width)]
        for weight, e in zip(weights, head, strict=True):  # Sherman and Morrison
            value = e.value.tolist()
            turned = [_product(row, value) for row in inverse]
            scale = (weight + epsilon) / (1 + (weight + epsilon) * _product(turned, value))
            inverse = [[inverse[i][j] - scale * turned[i] * turned[j] for j in range(width)] for i in range(width)]
        for at, (weight, e) in enumerate(zip(weights, head, strict=True)):
            value = e.value.tolist()
            total[at] += weight * _product([_product(row, value) for row in inverse], value) / len(anchors)
    return total


@dataclass
class NaiveScored:
    """The first `num_sinks` and the newest stay, then the best; of equal scores the older goes.

    `margin` is the smallest gap between two scores of which one stayed; exact ties do not count. A score may have a
    smaller margin of its own. exact: False where equal scores are sums that rounding may set apart, so that ties count.
    """

    score: Score
    num_sinks: int = 0
    num_recent: int = 0
    recent_fraction: float = 0.0
    exact: bool = True
    margin: float = math.inf

    def plan(self, heads: list[Head], where: Where) -> list[Head]:
        kept = []
        for head, scores in zip(heads, self.score(heads), strict=True):
            order = self._worst_first(head, scores, where)
            drop = len(head) - where.budget
            self._note(order, drop, scores)
            kept.append([head[index] for index in sorted(order[drop:])])
        return kept

    def victim(self, heads: list[Head], head: int, where: Where) -> Entry:
        scores = self.score(heads)[head]
        order = self._worst_first(heads[head], scores, where)
        self._note(order, 1, scores)
        return heads[head][order[0]]

    def _worst_first(self, head: Head, scores: list[float], where: Where) -> list[int]:
        sinks = min(self.num_sinks, where.budget - 1)
        share = math.floor(Fraction(str(self.recent_fraction)) * where.budget)
        recent = min(max(self.num_recent, share), where.budget - sinks)

        def worth(index: int) -> tuple[bool, float, int]:
            position = head[index].position
            return position < sinks or position >= where.seen - recent, scores[index], position

        self._others = [i for i in range(len(head)) if not worth(i)[0]]
        return sorted(range(len(head)), key=worth)

    def _note(self, order: list[int], drop: int, scores: list[float]) -> None:
        self.margin = min(self.margin, getattr(self.score, "margin", math.inf))
        others = set(self._others)
        if 0 < drop < len(order) and order[drop] in others and order[drop - 1] in others:
            gap = scores[order[drop]] - scores[order[drop - 1]]
            self.margin = min(self.margin, math.inf if gap == 0 and self.exact else gap)


def _length(vector: Tensor) -> float:
    return math.hypot(*vector.tolist())


def mean_rotation(places: list[int], frequencies: list[float]) -> list[list[float]]:
    """Return the mean over `places` of the matrix that turns a column of two halves to a place."""
    half = len(frequencies)
    matrix = [[0.0] * (2 * half) for _ in range(2 * half)]
    for at, frequency in enumerate(frequencies):
        cosine = statistics.fmean(math.cos(place * frequency) for place in places)
        sine = statistics.fmean(math.sin(place * frequency) for place in places)
        matrix[at][at] = matrix[half + at][half + at] = cosine
        matrix[at][half + at], matrix[half + at][at] = -sine, sine
    return matrix


def expected_logit(
    key: list[float], turned: list[list[float]], mean: list[float], spread: list[list[float]] | None
) -> float:
    """Return m' k / sqrt(d) + k' S k / 2d of a mean and covariance that are turned first."""
    width = len(key)
    back = [sum(turned[row][at] * key[row] for row in range(width)) for at in range(width)]
    logit = sum(m * b for m, b in zip(mean, back, strict=True)) / math.sqrt(width)
    if spread is None:
        return logit
    return logit + sum(back[i] * spread[i][j] * back[j] for i in range(width) for j in range(width)) / (2 * width)


def _cosine(one: Tensor, other: Tensor) -> float:
    return _product(one.tolist(), other.tolist()) / (_length(one) * _length(other))


def _product(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _neighbours(numbers: list[float], kernel: int, take: Callable[[list[float]], float]) -> list[float]:
    """Return what `take` makes of each number and its neighbours on both sides, `kernel` in all where there are."""
    half = kernel // 2
    return [take(numbers[max(0, at - half) : at + half + 1]) for at in range(len(numbers))]


def softmax(numbers: list[float]) -> list[float]:
    powers = [math.exp(number - max(numbers)) for number in numbers]
    return [power / sum(powers) for power in powers]


def _spread(vector: list[float], reference: list[list[float]]) -> float:
    """Return the deviation over channels of `vector` scaled to the least and the largest of the reference."""
    channels = list(zip(*reference, strict=True))
    scaled = [(x - min(c)) / (max(c) - min(c)) for x, c in zip(vector, channels, strict=True)]
    return statistics.stdev(scaled)
