"""The policy contract: a frozen dataclass, and a pure function from `View` to a decision.

A policy never touches the cache and holds no state, so one instance serves every layer, sequence and run.
`ScorePolicy` is the common case: `score` says what every entry is worth, larger = keep; budget, sinks, recent
window, ties and the victim of a decode step are done here. `Policy` is full control: `plan` and `victim`. What a
policy reads is its `View`, what it answers after a prompt its `Plan`, how much it may keep the `Budget`, which
counts entries per layer and KV head, with sinks, recent tokens and anchors included.

Tensor letters: B rows of the batch, H KV heads, T entries in the order of storage, W window queries, D head size.
After the first eviction the order of storage is not the order of tokens: read `position`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Flag, IntEnum, auto
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache.selection import keep_top, lowest, outside, protected_range
from kvbench.errors import ConfigError, NonFiniteChoiceError, NonFiniteError, PolicyError


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

    def protected_range(self, seen: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B,) int64 each: positions below the first and from the second on are never evicted."""
        window = {"num_sinks": self.num_sinks, "num_recent": self.num_recent}
        return protected_range(seen, budget, **window, recent_fraction=self.recent_fraction)

    def plan(self, view: View) -> Plan | None:
        """Keep the top entries under the budget. Raises: NonFiniteChoiceError if a score is NaN."""
        score = self._protected_score(view)
        if bool((score.isnan() & view.valid).any()):
            raise NonFiniteChoiceError(
                f"{type(self).__name__}.score returned NaN in layer {view.layer}; scores must be numbers"
            )
        return Plan(keep=keep_top(score, view.position, view.budget))

    def victim(self, view: View) -> Tensor:
        """Free the entry of lowest score, the oldest of equals; -1 where a score is NaN."""
        return lowest(self._protected_score(view), view.position)

    def _protected_score(self, view: View) -> Tensor:
        score = checked_score(self, view)
        protected = outside(view.position, *checked_range(self, view.seen, view.budget))
        finite = score.float().clamp(max=torch.finfo(torch.float32).max)  # only what is protected is infinite
        return finite.expand(view.position.shape).masked_fill(protected, torch.inf)


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


DECIMALS = 9  # 0.29 * 100 is 28.999999999999996; the user meant 29


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
        return max(1, math.floor(round(self.fraction * base, DECIMALS)))

    def describe(self) -> str:
        """Return the budget in words, as tables print it."""
        if self.tokens is not None:
            return f"{self.tokens} tokens"
        assert self.fraction is not None
        return f"{100 * self.fraction:g} % of {self.of}"


UNLIMITED = Budget(fraction=1.0)

# What the cache does with a policy's decision, a part of every cell's key. Raise it with a change of kvbench.cache or
# kvbench.kernels after which some policy, its code unchanged, keeps other entries or attends to other ones: `Policy`
# and `ScorePolicy`, `selection`, budgets, positions, statistics. Not for speed, memory, messages or rounding error.
CACHE_SEMANTICS = 1


def checked_score(policy: ScorePolicy, view: View) -> Tensor:
    """Return `policy.score(view)`. Raises: PolicyError for another shape than (B, H, T) or (B, 1, T)."""
    score = policy.score(view)
    rows, _, entries = view.position.shape
    if score.shape not in (view.position.shape, (rows, 1, entries)):
        raise PolicyError(
            f"{type(policy).__name__}.score returned shape {tuple(score.shape)}; "
            f"it must be (B, H, T) = {tuple(view.position.shape)} or (B, 1, T)"
        )
    return score


def checked_range(policy: ScorePolicy, seen: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Return `policy.protected_range`. Raises: PolicyError for anything but two int64 tensors of shape (B,)."""
    sinks, recent_from = policy.protected_range(seen, budget)
    for bound in (sinks, recent_from):
        if bound.shape != seen.shape or bound.dtype != torch.int64:
            raise PolicyError(
                f"{type(policy).__name__}.protected_range returned {bound.dtype} of shape {tuple(bound.shape)}; "
                f"both bounds must be int64 of shape (B,) = {tuple(seen.shape)}"
            )
    return sinks, recent_from


def checked_victim(policy: Policy, view: View) -> Tensor:
    """Return `policy.victim(view)`. Raises: PolicyError for a wrong shape or type."""
    victim, shape = policy.victim(view), view.position.shape[:2]
    if victim.shape != shape or victim.dtype != torch.int64:
        raise PolicyError(
            f"{type(policy).__name__}.victim returned {victim.dtype} of shape {tuple(victim.shape)}; "
            f"it must be int64 of shape (B, H) = {tuple(shape)}"
        )
    return victim


def checked_plan(policy: Policy, view: View, allowed: list[int]) -> Plan:
    """Return `policy.plan(view)`; `allowed` has one number per row.

    Raises: NonFiniteError for attention that is NaN, NonFiniteChoiceError and PolicyError for a plan that breaks
    the contract.
    """
    _check_statistics(view)
    plan, position, name = policy.plan(view), view.position, f"{type(policy).__name__}.plan in layer {view.layer}"
    if plan is None:
        raise PolicyError(f"{name} returned None although the budget {allowed} is exceeded; return a Plan")
    _check_column(plan.keep, "keep", torch.bool, position, name)
    if bool((plan.keep & (position < 0)).any()):
        raise PolicyError(f"{name} keeps slots that hold no token; combine keep with view.valid")
    kept, held = plan.keep.sum(dim=-1), (position >= 0).any(dim=-1)  # a row may have had pads only
    if bool(((kept > torch.tensor(allowed, device=kept.device)[:, None]) | (held & (kept < 1))).any()):
        raise PolicyError(
            f"{name} keeps {kept.tolist()} entries (rows x heads); allowed per row: 1 to {allowed}. "
            "keep_top keeps none where a score is NaN"
        )
    if plan.merge_into is not None:
        _check_merge(plan.merge_into, plan.keep, name)
    if plan.mass is not None and (plan.mass.shape != position.shape or view.mass_or_none is None):
        raise PolicyError(
            f"{name} returned mass of shape {tuple(plan.mass.shape)}; it must be (B, H, T) = "
            f"{tuple(position.shape)}, and the policy must declare Needs.MASS"
        )
    if plan.mass is not None and bool((plan.mass.isnan() & plan.keep).any()):
        raise NonFiniteChoiceError(f"{name} returned a mass that is NaN for entries that it keeps; it must be numbers")
    source = plan.merge_source
    if source is not None and (plan.merge_into is None or source.shape != position.shape):
        raise PolicyError(f"{name} returned merge_source without a merge_into of the same shape {tuple(source.shape)}")
    return plan


def _check_statistics(view: View) -> None:
    """Raise NonFiniteError if attention that a policy is about to decide by is NaN: the model's numbers are."""
    statistics = {"mass": view.mass_or_none, "window": view.window_or_none, "probs": view.probs_or_none}
    for name, numbers in statistics.items():
        valid = view.valid if numbers is None or numbers.ndim == 3 else view.valid[:, :, None]
        if numbers is not None and bool((numbers.isnan() & valid).any()):
            raise NonFiniteError(
                f"the attention that a prompt's tokens receive is NaN in layer {view.layer} (view.{name}): the model's "
                "keys or queries overflow; use a wider model.dtype"
            )


def _check_merge(into: Tensor, keep: Tensor, name: str) -> None:
    _check_column(into, "merge_into", torch.int64, keep, name)
    if bool(((into < 0) | (into >= keep.shape[-1])).any()):
        raise PolicyError(f"{name} merges into {into.min()} to {into.max()}; allowed: 0 to {keep.shape[-1] - 1}")
    itself = into == torch.arange(keep.shape[-1], device=into.device)
    if not bool((keep.gather(-1, into) | itself).all()):
        raise PolicyError(f"{name} merges entries into some that it does not keep; give them a survivor or themselves")


def _check_column(given: Tensor, field: str, dtype: torch.dtype, like: Tensor, name: str) -> None:
    if given.shape != like.shape or given.dtype != dtype:
        raise PolicyError(
            f"{name} returned {field} of {given.dtype} and shape {tuple(given.shape)}; "
            f"it must be {str(dtype).removeprefix('torch.')} of shape (B, H, T) = {tuple(like.shape)}"
        )
