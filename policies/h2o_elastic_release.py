"""The H2O that Elastic Cache's code compares itself with, every departure from H2O an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import Needs, Plan, Policy, View
from kvbench.cache.released_choice import slots_by_age, sorted_order_as_rank
from kvbench.cache.selection import age_rank, keep_top, lowest, protected_entries


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
        victim = self._lowest(view, view.mass.float())[..., None]
        one_less = view.valid.scatter(-1, victim, False)
        keep = self._chosen(view)
        if self.order_taken_for_rank or self.one_too_few:
            keep = torch.where(over == 1, one_less, keep)
        keep = torch.where(over <= 0, view.valid, keep)
        if not self.scores_left_behind:
            return Plan(keep=keep)
        mass, memory = _left_behind(view, keep)
        aligned = over <= 1
        return Plan(keep=keep, mass=torch.where(aligned, view.mass, mass), memory=torch.where(aligned, 0.0, memory))

    def _chosen(self, view: View) -> Tensor:
        target = (view.budget - int(self.one_too_few)).clamp(min=1)
        protected = self._protected(view, target)
        if self.order_taken_for_rank and self.no_recent_window:
            count = (target - 1)[:, None].expand(view.position.shape[:2])
            return protected | sorted_order_as_rank(view.mass.float(), view.position, first=0, count=count)
        return keep_top(view.mass.float().masked_fill(protected, torch.inf), view.position, target)

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
        score = view.mass.float()
        if self.scores_left_behind and view.memory_or_none is not None:
            came = (view.position - view.prompt[:, None, None]).clamp(max=view.memory_or_none.shape[-1] - 1)
            inherited = view.memory_or_none.gather(-1, came.clamp(min=0))
            score = score + inherited.masked_fill(came < 0, 0.0)
        return self._lowest(view, score)


def _left_behind(view: View, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mass that stays in its old place, for entries, and (B, H, T + 1) for tokens to come."""
    by_age = view.mass.masked_fill(~view.valid, 0.0).gather(-1, slots_by_age(view.position))
    left = torch.where(keep, view.position, -1)
    place = age_rank(left)
    rest = torch.arange(by_age.shape[-1] + 1, device=keep.device) + keep.sum(dim=-1, keepdim=True)
    padded = torch.nn.functional.pad(by_age, (0, 1))
    return by_age.gather(-1, place), padded.gather(-1, rest.clamp(max=by_age.shape[-1]))
