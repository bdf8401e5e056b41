"""A slow oracle for one layer and one row, in float64 and plain lists.

`NaiveLayer` attends, counts mass and evicts one entry at a time; a `Rule` decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kvbench.cache import Budget
from kvbench.contract.equality import rotated


@dataclass(kw_only=True)
class Entry:
    """A token's rotated key and value (D,), the attention it received in all, and from each query that saw it.

    by_head: the same of each query head of its group, where a score asks for it.
    """

    position: int
    key: Tensor
    value: Tensor
    mass: float = 0.0
    rows: list[float] = field(default_factory=list)
    by_head: list[list[float]] = field(default_factory=list)


Head = list[Entry]


@dataclass(kw_only=True)
class Where:
    """Where and when a rule decides."""

    layer: int
    num_layers: int
    seen: int
    budget: int


class Rule(Protocol):
    """`plan` after a chunk, `victim` at decode; `margin` is the smallest gap that a choice hung on."""

    margin: float

    def plan(self, heads: list[Head], where: Where) -> list[Head]: ...

    def victim(self, heads: list[Head], head: int, where: Where) -> Entry: ...


@dataclass(kw_only=True)
class NaiveLayer:
    """One layer of one row; `frequencies` are given for positions in_cache only."""

    rule: Rule
    budget: Budget
    num_heads: int
    bounded: bool = True
    cuts_at_decode: bool = True
    layer: int = 0
    num_layers: int = 1
    frequencies: Tensor | None = None
    reduction: Literal["mean", "sum", "max"] = "mean"
    seen: int = 0
    prompt: int = 0
    heads: list[Head] = field(default_factory=list)
    victims: list[list[int]] = field(default_factory=list)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Take new tokens: query (Hq, Q, D), key, value (H, Q, D); return the output (Hq, Q, D)."""
        chunk = self.seen == 0 or query.shape[1] > 1
        self.heads = self.heads or [[] for _ in range(self.num_heads)]
        group, outputs = query.shape[0] // self.num_heads, torch.zeros(query.shape, dtype=torch.float64)
        for at in range(query.shape[1]):
            for index, head in enumerate(self.heads):
                head.append(Entry(position=self.seen, key=key[index, at].double(), value=value[index, at].double()))
                mine = slice(index * group, (index + 1) * group)
                outputs[mine, at] = self._attend(query[mine, at].double(), head)
            self.seen += 1
        self.prompt = self.prompt or self.seen
        self._evict(chunk)
        return outputs

    def _attend(self, queries: Tensor, head: Head) -> Tensor:
        head.sort(key=lambda e: e.position)
        keys, values = torch.stack([e.key for e in head]), torch.stack([e.value for e in head])
        if self.frequencies is not None:
            by = torch.arange(len(head)) - torch.tensor([e.position for e in head])
            keys = rotated(keys, by, self.frequencies)
            queries = rotated(queries, by[-1:].expand(len(queries)), self.frequencies)
        rows = (queries @ keys.T / queries.shape[-1] ** 0.5).softmax(-1)
        reduced: Any = {"mean": rows.mean(0), "sum": rows.sum(0), "max": rows.amax(0)}[self.reduction]
        for entry, received in zip(head, reduced.tolist(), strict=True):
            entry.mass += received
            entry.rows.append(received)
        return rows @ values

    def _evict(self, chunk: bool) -> None:
        base = self.seen if self.budget.of == "seen" else self.prompt
        entries = self.budget.tokens or max(1, math.floor(Fraction(str(self.budget.fraction)) * base))
        where = Where(layer=self.layer, num_layers=self.num_layers, seen=self.seen, budget=entries)
        if not self.bounded or len(self.heads[0]) <= entries or not (chunk or self.cuts_at_decode):
            return
        before = [[e.position for e in head] for head in self.heads]
        if chunk:
            self.heads = self.rule.plan(self.heads, where)
        else:
            gone = [self.rule.victim(self.heads, index, where) for index in range(self.num_heads)]
            self.heads = [[e for e in head if e is not out] for head, out in zip(self.heads, gone, strict=True)]
        after = [{e.position for e in head} for head in self.heads]
        self.victims.append([p for old, new in zip(before, after, strict=True) for p in old if p not in new])
