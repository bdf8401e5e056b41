"""The policy contract: a frozen dataclass, and a pure function from `View` to a decision.

A policy never touches the cache and holds no state, so one instance serves every layer, sequence
and run. `ScorePolicy` is the common case: give every entry a score, larger = keep; budget, sinks,
recent window, ties and the decode victim are done here. `Policy` is full control.

What a policy reads (`View`) and what it answers (`Plan`).

Tensor letters: B rows of the batch, H KV heads, T entries in the order of storage, W window
queries, D head size. After the first eviction the order of storage is not the order of tokens:
read `position`.

How many entries a layer may hold now: one definition for every policy.

A budget counts entries per layer and KV head, with sinks, recent tokens and anchors included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Flag, IntEnum, auto
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache.selection import keep_top, lowest, outside, protected_range
from kvbench.errors import ConfigError, NonFiniteChoiceError, PolicyError


class Needs(Flag):
    """Attention statistics that a policy declares; what is not declared is not computed."""

    NOTHING = 0
    MASS = auto()  # attention received so far, summed over all queries
    WINDOW = auto()  # attention rows of the last queries of the prompt
    PROBS = auto()  # attention row of the newest query


class When(Flag):
    """When a policy cuts: after a prompt, at every decode step, or both."""

    PREFILL = auto()
    DECODE = auto()
    BOTH = PREFILL | DECODE


class Kind(IntEnum):
    """What a token is."""

    TEXT = 0
    IMAGE = 1
    SPECIAL = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One layer's cache, read-only, with the newest tokens included.

    keys, values (B, H, T, D), keys rotated where their tokens stood when they came; position (B, H, T) int64,
    the token's index in its own row (pads not counted), -1 where the slot holds nothing; kind
    (B, H, T) int8, a `Kind`; prompt, seen, budget (B,) int64: tokens of the prompt, tokens seen so
    far, entries allowed now; prompt_budget (B,) int64, entries allowed after the first prompt; row_seed
    (B,) int64, a number of the sequence for policies that draw, the same alone and in a batch.
    `new_tokens` is how many tokens came with this step (1 = decode). memory_or_none (B, H, M): what the
    policy's last plan left beside the slots.
    """

    layer: int
    num_layers: int
    new_tokens: int
    prefill: bool
    prompt: Tensor
    seen: Tensor
    budget: Tensor
    prompt_budget: Tensor
    row_seed: Tensor
    keys: Tensor
    values: Tensor
    position: Tensor
    kind: Tensor
    mass_or_none: Tensor | None = None
    window_or_none: Tensor | None = None
    probs_or_none: Tensor | None = None
    memory_or_none: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """(B, H, T) bool: the slot holds a token."""
        return self.position >= 0

    @property
    def mass(self) -> Tensor:
        """(B, H, T) float32: attention received from every query so far, reduced to KV heads."""
        return _declared(self.mass_or_none, "MASS")

    @property
    def window(self) -> Tensor:
        """(B, H, W, T) float32: attention rows of the prompt's last W queries; prefill only."""
        return _declared(self.window_or_none, "WINDOW")

    @property
    def probs(self) -> Tensor:
        """(B, H, T) float32: attention row of the newest query."""
        return _declared(self.probs_or_none, "PROBS")


def _declared(statistic: Tensor | None, name: str) -> Tensor:
    if statistic is None:
        raise PolicyError(
            f"the policy reads Needs.{name}, which it did not declare or which this phase does not have. "
            f"Add `needs: ClassVar[Needs] = Needs.{name}` to the class"
        )
    return statistic


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which entries stay after a prompt, and where the others go.

    keep (B, H, T) bool; merge_into (B, H, T) int64, the index of the survivor whose mean each entry
    joins (its own index: none), or None when dropped entries are simply freed. Three more are for code
    whose books do not follow its tokens: merge_source (B, H, T) int64, whose key and value each entry
    brings into its bucket (None: its own); mass (B, H, T), the mass that entries go on with; memory
    (B, H, M), kept beside the slots as it is until a later plan gives another one.
    """

    keep: Tensor
    merge_into: Tensor | None = None
    merge_source: Tensor | None = None
    mass: Tensor | None = None
    memory: Tensor | None = None


# What the cache does with a policy's decision, a part of every cell's key. Raise it with a change of kvbench.cache or
# kvbench.kernels after which some policy, its code unchanged, keeps other entries or attends to other ones: `Policy`
# and `ScorePolicy`, `selection`, budgets, positions, statistics. Not for speed, memory, messages or rounding error.
CACHE_SEMANTICS = 1


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
            raise ConfigError(f"policy.recent_fraction is {self.recent_fraction:g}; it must lie in [0, 1]")

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


_DECIMALS = 9  # 0.29 * 100 is 28.999999999999996; the user meant 29


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Entries allowed: a `fraction` of the tokens seen so far or of the prompt, or absolute `tokens`.

    `of="seen"` grows while tokens are generated, as in Elastic Cache (arXiv 2407.18121, Sec. 3.3);
    `of="prompt"` is fixed after prefill. Raises: ConfigError for values out of range.
    """

    fraction: float | None = None
    tokens: int | None = None
    of: Literal["seen", "prompt"] = "seen"

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.tokens is None):
            raise ConfigError(
                f"budget.fraction is {self.fraction} and budget.tokens is {self.tokens}; exactly one must be given. "
                "Use budget=tokens budget.tokens=128 for an absolute size, budget.fraction=0.2 for a share"
            )
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise ConfigError(
                f"budget.fraction is {self.fraction:g}; it must lie in (0, 1]. "
                "Use budget=tokens budget.tokens=128 to give an absolute size"
            )
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"budget.tokens is {self.tokens}; it must be at least 1")
        if self.of not in ("seen", "prompt"):
            raise ConfigError(f"budget.of is {self.of!r}; it must be 'seen' or 'prompt'")

    def entries(self, *, seen_tokens: int, prompt_tokens: int) -> int:
        """Return the entries allowed after `seen_tokens`, at least 1; fractions round down."""
        if self.tokens is not None:
            return self.tokens
        assert self.fraction is not None
        base = seen_tokens if self.of == "seen" else prompt_tokens
        return max(1, math.floor(round(self.fraction * base, _DECIMALS)))

    def entries_as_released(self, *, seen_tokens: int, prompt_tokens: int) -> int:
        """Return the entries allowed as Elastic Cache's code counts them: rounded up, in its own arithmetic.

        It takes the pruned share r, keeps 1 - r in floating point, and cuts the tokens to forget down to
        a whole number; 1 - 0.7 is a little more than 0.3, which shows at multiples of ten.
        """
        if self.fraction is None:
            return self.entries(seen_tokens=seen_tokens, prompt_tokens=prompt_tokens)
        kept = 1 - round(1 - self.fraction, _DECIMALS)
        if seen_tokens == prompt_tokens:
            return max(1, seen_tokens - int(seen_tokens - seen_tokens * kept))
        return max(1, math.ceil((seen_tokens if self.of == "seen" else prompt_tokens) * kept))

    def describe(self) -> str:
        """Return the budget in words, as tables print it."""
        if self.tokens is not None:
            return f"{self.tokens} tokens"
        assert self.fraction is not None
        return f"{100 * self.fraction:g} % of {self.of}"


UNLIMITED = Budget(fraction=1.0)
