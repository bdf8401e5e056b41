"""The policy contract: a frozen dataclass, and a pure function from `View` to a decision.

A policy never touches the cache and holds no state, so one instance serves every layer, sequence
and run. `ScorePolicy` is the common case: give every entry a score, larger = keep; budget, sinks,
recent window, ties and the decode victim are done here. `Policy` is full control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache.selection import keep_top, lowest, outside, protected_range
from kvbench.cache.view import Needs, Plan, View, When
from kvbench.errors import ConfigError, NonFiniteChoiceError, PolicyError


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Decide which entries stay. Override `plan` (after a prompt) and `victim` (at decode).

    Class flags: `needs` (statistics computed for it), `when` (phases in which it cuts), `granularity`
    (do the heads of a layer share their entries), `reduction` (query heads to KV heads), `bounded`
    (False: it ignores the budget, as the full cache does), `window_tokens` (queries of WINDOW) and
    `native_positions` (the position mode its authors describe, used unless another is asked for).
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    when: ClassVar[When] = When.BOTH
    granularity: ClassVar[Literal["layer", "kv_head"]] = "kv_head"
    reduction: ClassVar[Literal["mean", "sum", "max"]] = "mean"
    bounded: ClassVar[bool] = True
    window_tokens: ClassVar[int] = 32
    native_positions: ClassVar[Literal["original", "in_cache", "released"]] = "original"

    @property
    def counts_as_released(self) -> bool:
        """Whether a share of the tokens is rounded as Elastic Cache's code does; up, and not down."""
        return False

    @property
    def pools_layers(self) -> bool:
        """Whether the mass is averaged over all heads and layers, and all layers are cut together."""
        return False

    @property
    def mass_in_model_dtype(self) -> bool:
        """Whether mass is summed in the dtype of the keys; float32 otherwise."""
        return False

    @property
    def smallest_budget_tokens(self) -> int:
        """Entries below which the policy cannot do what it promises."""
        return 1

    def plan(self, view: View) -> Plan | None:
        """Return what stays after a prompt. Called when the budget is exceeded, so None is refused."""
        raise NotImplementedError(f"{type(self).__name__} must define plan(view)")

    def victim(self, view: View) -> Tensor:
        """Return (B, H) int64, the slot to free in this decode step. Called when over budget.

        -1 says that there is no choice, because a number that decides is NaN: the cell ends as `nonfinite`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define victim(view)")


@dataclass(frozen=True, kw_only=True)
class ScorePolicy(Policy):
    """Keep the entries of highest `score`, with sinks and recent tokens protected.

    num_sinks: first tokens always kept. num_recent: newest tokens always kept. recent_fraction: the
    same as a share of the budget; the larger of both counts.
    """

    num_sinks: int = 0
    num_recent: int = 0
    recent_fraction: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_sinks", "num_recent"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy.{name} is {getattr(self, name)}; it must be 0 or more tokens")
        if not 0.0 <= self.recent_fraction <= 1.0:
            raise ConfigError(f"policy.recent_fraction is {self.recent_fraction}; it must lie in [0, 1]")

    @property
    def smallest_budget_tokens(self) -> int:
        """Sinks and recent window must fit."""
        return max(1, self.num_sinks + self.num_recent)

    def score(self, view: View) -> Tensor:
        """Return (B, H, T), or (B, 1, T) for one score per layer; larger = keep.

        An infinite score is a large or a small one; what is protected counts for more. NaN is no score and
        ends the cell, unless the entry is protected.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    def plan(self, view: View) -> Plan | None:
        """Keep the top entries under the budget. Raises: NonFiniteChoiceError if a score is NaN."""
        score = self._protected_score(view)
        if bool(torch.isnan(score[view.valid]).any()):
            raise NonFiniteChoiceError(
                f"{type(self).__name__}.score returned NaN in layer {view.layer}; scores must be numbers"
            )
        return Plan(keep=keep_top(score, view.position, view.budget))

    def victim(self, view: View) -> Tensor:
        """Free the entry of lowest score, the oldest of equals; -1 where a score is NaN."""
        return lowest(self._protected_score(view), view.position)

    def checked_score(self, view: View) -> Tensor:
        """Return `score(view)`. Raises: PolicyError for another shape than (B, H, T) or (B, 1, T)."""
        score = self.score(view)
        rows, _, entries = view.position.shape
        if score.shape not in (view.position.shape, (rows, 1, entries)):
            raise PolicyError(
                f"{type(self).__name__}.score returned shape {tuple(score.shape)}; "
                f"it must be (B, H, T) = {tuple(view.position.shape)} or (B, 1, T)"
            )
        return score

    def protected_range(self, seen: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B,) int64 each: positions below the first and from the second on are never evicted."""
        return protected_range(
            seen,
            budget,
            num_sinks=self.num_sinks,
            num_recent=self.num_recent,
            recent_fraction=self.recent_fraction,
        )

    def checked_range(self, seen: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Return `protected_range`. Raises: PolicyError for anything but two int64 tensors of shape (B,)."""
        sinks, recent_from = self.protected_range(seen, budget)
        for bound in (sinks, recent_from):
            if bound.shape != seen.shape or bound.dtype != torch.int64:
                raise PolicyError(
                    f"{type(self).__name__}.protected_range returned {bound.dtype} of shape {tuple(bound.shape)}; "
                    f"both bounds must be int64 of shape (B,) = {tuple(seen.shape)}"
                )
        return sinks, recent_from

    def _protected_score(self, view: View) -> Tensor:
        score = self.checked_score(view)
        protected = outside(view.position, *self.checked_range(view.seen, view.budget))
        finite = score.float().clamp(max=torch.finfo(torch.float32).max)  # only what is protected is infinite
        return finite.expand(view.position.shape).masked_fill(protected, torch.inf)
