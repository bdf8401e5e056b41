"""The H2O that Elastic Cache's code compares itself with, every departure from H2O an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import Needs, Plan, Policy, View
from kvbench.cache.selection import age_rank, keep_top, lowest, protected_entries

from .choice import slots_by_age, sorted_order_as_rank


@dataclass(frozen=True, kw_only=True)
class H2OElasticRelease(Policy):
    """H2OCache of Elastic Cache's code (github.com/liuzuyan/ElasticCache, kv_cache.py at 3138e03).

    With every option False this is the policy `h2o` (arXiv 2306.14048).

    one_set_for_the_model: scores are averaged over all heads and layers, and every layer evicts the same
        tokens.
    no_recent_window: nothing but the newest token is protected, at decode also the first; H2O gives half
        of the budget to the newest tokens.
    order_taken_for_rank: what the prompt keeps comes from an argsort read as ranks.
    one_too_few: the prompt leaves one entry fewer than the target.
    target_rounded_up: the target is rounded up, in that code's floating point.
    scores_left_behind: after the prompt the scores stay in their old order while the cache closes ranks.
        The k-th entry left goes on with the score of prompt token k, and every later token starts
        with the score of the next prompt token, until these are used up.

    A prompt one entry over its target is cut by the rule of the decode, whose books are right. Where the
    code stops with an error (a second prompt), the same rules go on. That code averages over the rows of
    a batch too; here each row is on its own.
    """

    needs: ClassVar[Needs] = Needs.MASS
    native_positions: ClassVar[Literal["original", "in_cache", "released"]] = "released"

    one_set_for_the_model: bool = True
    no_recent_window: bool = True
    order_taken_for_rank: bool = True
    one_too_few: bool = True
    target_rounded_up: bool = True
    scores_left_behind: bool = True

    @property
    def counts_as_released(self) -> bool:
        """Whether the target is rounded up."""
        return self.target_rounded_up

    @property
    def pools_layers(self) -> bool:
        """Whether one set is chosen for all layers."""
        return self.one_set_for_the_model

    def plan(self, view: View) -> Plan:
        """Choose what the prompt leaves; a row one entry over loses the decode's victim."""
        over = (view.valid.sum(dim=-1) - view.budget[:, None])[..., None]
        score = self._score(view)
        victim = self._lowest(view, score)[..., None]
        one_less = view.valid.scatter(-1, victim, False)
        keep = self._chosen(view, score)
        if self.order_taken_for_rank or self.one_too_few:
            keep = torch.where(over == 1, one_less, keep)
        keep = torch.where(over <= 0, view.valid, keep)
        if not self.scores_left_behind:
            return Plan(keep=keep)
        aligned = over <= 1
        mass, memory = _left_behind(view, score, keep)
        before = 0.0 if view.memory_or_none is None else _as_long(view.memory_or_none, memory.shape[-1])
        return Plan(keep=keep, mass=torch.where(aligned, view.mass, mass), memory=torch.where(aligned, before, memory))

    def _chosen(self, view: View, score: Tensor) -> Tensor:
        target = (view.budget - int(self.one_too_few)).clamp(min=1)
        protected = self._protected(view, target)
        if self.order_taken_for_rank and self.no_recent_window:
            count = (target - 1)[:, None].expand(view.position.shape[:2])
            return protected | sorted_order_as_rank(score, view.position, first=0, count=count)
        return keep_top(score.masked_fill(protected, torch.inf), view.position, target)

    def _protected(self, view: View, target: Tensor) -> Tensor:
        return protected_entries(
            view.position,
            view.seen,
            target,
            num_sinks=0,
            num_recent=int(self.no_recent_window),
            recent_fraction=0.0 if self.no_recent_window else 0.5,
        )

    def _lowest(self, view: View, score: Tensor) -> Tensor:
        protected = self._protected(view, view.budget)
        if self.no_recent_window:
            held = view.position.masked_fill(~view.valid, torch.iinfo(torch.int64).max)
            protected = protected | (held == held.amin(dim=-1, keepdim=True))
        return lowest(score.masked_fill(protected, torch.inf), view.position)

    def victim(self, view: View) -> Tensor:
        """Free the entry of lowest score."""
        return self._lowest(view, self._score(view))

    def _score(self, view: View) -> Tensor:
        """(B, H, T) float32: the mass, and for tokens after the first prompt what they began with."""
        score = view.mass.float()
        if not self.scores_left_behind or view.memory_or_none is None:
            return score
        came = (view.position - view.prompt[:, None, None]).clamp(max=view.memory_or_none.shape[-1] - 1)
        inherited = view.memory_or_none.gather(-1, came.clamp(min=0))
        return score + inherited.masked_fill(came < 0, 0.0)


def _left_behind(view: View, score: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores that stay in their old place, for entries, and (B, H, M) what later tokens begin with.

    Number m of the latter is for the token m places after the first prompt; the last one, 0, is for all further.
    """
    by_age = score.masked_fill(~view.valid, 0.0).gather(-1, slots_by_age(view.position))
    place = age_rank(torch.where(keep, view.position, -1))
    came = (view.seen - view.prompt)[:, None, None]  # tokens of later prompts: what they began with is in their score
    earlier = 0 if view.memory_or_none is None else view.memory_or_none.shape[-1]
    length = max(by_age.shape[-1] + 1 + int(came.max()), earlier)
    to_come = torch.arange(length, device=keep.device) - came
    rest = (to_come + keep.sum(dim=-1, keepdim=True)).clamp(min=0, max=by_age.shape[-1])
    padded = torch.nn.functional.pad(by_age, (0, 1))
    return by_age.gather(-1, place), padded.gather(-1, rest).masked_fill(to_come < 0, 0.0)


def _as_long(memory: Tensor, length: int) -> Tensor:
    """Return `memory` (B, H, M), whose last number is 0, with zeros up to `length`."""
    return torch.nn.functional.pad(memory, (0, length - memory.shape[-1]))
