"""The policy contract: a frozen dataclass, and a pure function from `View` to a decision.

A policy never touches the cache and holds no state, so one instance serves every layer, sequence and run.
`ScorePolicy` is the common case: `score` says what every entry is worth, larger = keep; budget, sinks, recent
window, ties and the victim of a decode step are done here. `Policy` is full control: `plan` and `victim`. What a
policy reads is its `View`, what it answers after a prompt its `Plan`, how much it may keep the `Budget`, which
counts entries per layer and KV head, with sinks, recent tokens and anchors included.

A score policy may be put together with parts, each a frozen dataclass of its own: an `Allocation` (how entries are
divided among layers and heads), a `Merge` (what becomes of entries that go) and a rhythm (`every_tokens`). Without
them it holds the same everywhere, drops what goes, and frees one entry a step.

Tensor letters: B rows of the batch, H KV heads, T entries in the order of storage, W window queries, D head size.
After the first eviction the order of storage is not the order of tokens: read `position`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from enum import Flag, auto
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from kvbench.cache.parts import Allocation, Merge, Total, checked_into, divided_heads, shown
from kvbench.cache.selection import has_nan, keep_top, looked_at, lowest, protected_range, ranked_above, shielded
from kvbench.cache.view import Doubts, Joining, Needs, Plan, View
from kvbench.errors import ConfigError, NonFiniteChoiceError, NonFiniteError, PolicyError, close_matches


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
    (False: it ignores the budget, as the full cache does), `window_tokens` (queries of WINDOW and HEAD_ROWS),
    `moments_from` (so many first tokens are not in MOMENTS), `repeat_tokens` (of a chunk of REPEATED), `repeated_as`
    (what REPEATED counts: shares of attention, or these as they move the output: times |W v| over |h|) and
    `native_positions` (the position mode its authors describe, used unless another is asked for).
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    when: ClassVar[When] = When.BOTH
    granularity: ClassVar[Literal["layer", "kv_head"]] = "kv_head"
    reduction: ClassVar[Literal["mean", "sum", "max"]] = "mean"
    bounded: ClassVar[bool] = True
    window_tokens: ClassVar[int] = 32
    moments_from: ClassVar[int] = 0
    repeat_tokens: ClassVar[int] = 2048
    repeated_as: ClassVar[Literal["attention", "output"]] = "attention"
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

    def note(self, view: View) -> Tensor | None:
        """Return (B, H, T) or (B, 1, T), a number of each token that arrives, or None.

        `view` shows these tokens alone, those of a prompt or the one of a step, pads at position -1. It is asked once
        about each, in every layer; the number stays beside the entry and is `view.noted` from then on.
        """
        return None

    def hand_over(self, view: View) -> Tensor | None:
        """Return (B, ...), what later layers read of this one as `view.handed`; None leaves there what it is.

        Called in every layer of a prompt, before the layer is cut. What it is about is best told by position: layers
        may hold different entries.
        """
        return None


PART = {"is_part": True}
"""Of a field's metadata: while it has its default, it is in no cell's key, so that records outlive new parts."""


def is_unset_part(setting: Field[Any], value: object) -> bool:
    """Return whether a field of a policy is a part that is not set."""
    return PART.keys() <= setting.metadata.keys() and value == setting.default


Span = Literal["text", "picture", "question"]
"""A part of a prompt: its text, the question included; its pictures; its question, with what a template adds to it."""


@dataclass(frozen=True, kw_only=True)
class ScorePolicy(Policy):
    """Keep the entries of highest `score`, with sinks and recent tokens protected.

    num_sinks: first tokens always kept. num_recent: newest tokens always kept. recent_fraction: the
    same as a share of the budget; the larger of both counts.

    Parts: allocation (None: every layer and head holds the same), merge (None: what goes is dropped), every_tokens
    (1: an entry goes at each step; n: n tokens more are held, then the cache is planned as after a prompt),
    skip_layers (their prompt stays whole, and the other layers pay for it; from 0, or from -1 for the last), protect
    (None; a `Span`: its entries are kept before all others, the best of them where the budget does not hold all).
    """

    num_sinks: int = 0
    num_recent: int = 0
    recent_fraction: float = 0.0
    allocation: Allocation | None = field(default=None, metadata=PART)
    merge: Merge | None = field(default=None, metadata=PART)
    every_tokens: int = field(default=1, metadata=PART)
    skip_layers: tuple[int, ...] = field(default=(), metadata=PART)
    protect: Span | None = field(default=None, metadata=PART)

    def __post_init__(self) -> None:
        for name in ("num_sinks", "num_recent"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy.{name} is {getattr(self, name)}; it must be 0 or more tokens")
        if not 0.0 <= self.recent_fraction <= 1.0:
            raise ConfigError(f"policy.recent_fraction is {self.recent_fraction:g}; it must lie in [0, 1]")
        if self.protect not in (None, *get_args(Span)):
            raise ConfigError(
                f"policy.protect is {self.protect!r:.60}; {close_matches(str(self.protect), get_args(Span))}"
            )
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))  # a list in a yaml, and policies are hashed

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
        score, entries = ranking(self, view), view.budget
        if view.spread_or_none is not None:
            entries = view.budget[:, None] + view.spread_or_none
        elif self.allocation is not None and self.allocation.ragged:
            entries = divided_heads(self.allocation, view, score)
        keep = keep_top(self._favoured(view, score), view.position, entries)
        plan = (
            Plan(keep=keep) if self.merge is None else checked_into(self.merge, view, keep, keep & (score == torch.inf))
        )
        memory = self.remembered(view)
        return plan if memory is None else replace(plan, memory=memory)

    def remembered(self, view: View) -> Tensor | None:
        """Return (B, H, M), what later plans find as `view.memory_or_none`; None for nothing new."""
        return None

    def victim(self, view: View) -> Tensor:
        """Free the entry of lowest score, the oldest of equals; -1 where a score is NaN."""
        return lowest(self._favoured(view, self._protected_score(view)), view.position)

    def _favoured(self, view: View, ranked: Tensor) -> Tensor:
        """Return (B, H, T), by what entries stay in the end; `chosen_by` puts a function in this place."""
        return ranked

    def _protected_score(self, view: View) -> Tensor:
        """Return (B, H, T): scores, of which only what is protected is infinite."""
        return shielded(checked_score(self, view), view.position, *checked_range(self, view.seen, view.budget))


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


def ranking(policy: ScorePolicy, view: View) -> Tensor:
    """Return (B, H, T), by what a plan ranks: scores, infinite where protected and at most finite elsewhere.

    Raises: NonFiniteChoiceError if the score of an entry that is not protected is NaN (`View.refuse_if`).
    """
    score, layer = policy._protected_score(view), view.layer
    view.refuse_if(
        has_nan(score, view.position),
        lambda: NonFiniteChoiceError(
            f"{type(policy).__name__}.score returned NaN in layer {layer}; scores must be numbers"
        ),
    )
    return score


def needs_of(policy: Policy) -> Needs:
    """Return the statistics of a policy and of its parts."""
    needs = policy.needs
    if isinstance(policy, ScorePolicy) and policy.protect is not None:
        needs |= Needs.QUESTION if policy.protect == "question" else Needs.PICTURE
    for one in (getattr(policy, "allocation", None), getattr(policy, "merge", None)):
        if isinstance(one, Allocation | Merge):
            needs |= one.needs
    return needs


def is_ragged(policy: Policy) -> bool:
    """Return whether the heads of a layer may hold different numbers of entries."""
    return isinstance(policy, ScorePolicy) and policy.allocation is not None and policy.allocation.ragged


def is_divided(policy: Policy) -> bool:
    """Return whether layers or heads are given different numbers, whose sum is what counts."""
    return isinstance(policy, ScorePolicy) and (policy.allocation is not None or bool(policy.skip_layers))


def keeps_the_most(policy: Policy) -> bool:
    """Return whether each head keeps as many entries as its row may: how many need not be asked of the device."""
    return isinstance(policy, ScorePolicy) and type(policy).plan is ScorePolicy.plan and not is_ragged(policy)


def plans_safely(policy: Policy) -> bool:
    """Return whether a plan is carried out before it was looked at, so that a layer of a prompt waits for no plan.

    Not where heads share what a row may hold, or layers are given shares by numbers that were not looked at: how large
    buffers are follows from those.
    """
    divided = isinstance(policy, ScorePolicy) and policy.allocation is not None and policy.allocation.waits
    return not (is_ragged(policy) or divided)


def steps_between_cuts(policy: Policy) -> int | None:
    """Return how many tokens come before entries are freed at decode, 1 or more; None if none ever are."""
    if not policy.bounded or When.DECODE not in policy.when:
        return None
    return policy.every_tokens if isinstance(policy, ScorePolicy) else 1


def total_of(policy: Policy) -> str:
    """Return what a policy's allocation says of its total: `exact`, `bounded` or `data_dependent`."""
    if isinstance(policy, ScorePolicy):
        return "exact" if policy.allocation is None else policy.allocation.total
    return "bounded"


def merge_at_decode(policy: Policy) -> Merge | None:
    """Return the merge that entries freed at a decode step take part in, None where they are dropped."""
    merge = policy.merge if isinstance(policy, ScorePolicy) else None
    return merge if merge is not None and merge.at_decode and steps_between_cuts(policy) == 1 else None


def keeps_ring(policy: Policy) -> bool:
    """Return whether the last queries are kept while tokens are generated: rows are read where a block is cut."""
    return (steps_between_cuts(policy) or 1) > 1 and bool(needs_of(policy) & (Needs.WINDOW | Needs.HEAD_ROWS))


def check_parts(policy: Policy, positions: str = "original") -> None:
    """Raise ConfigError for parts that the policy, or one of them, cannot do its own share with."""
    if not isinstance(policy, ScorePolicy):
        return
    kind = type(policy)
    for name, own in (("allocation", Allocation), ("merge", Merge)):
        given = getattr(policy, name)
        if given is not None and not isinstance(given, own):
            raise ConfigError(
                f"policy.{name} is {given!r:.60}; it must be an {own.__name__}: in a yaml a mapping with a _target_, "
                f"on the command line +policy/{name}=NAME"
            )
    if policy.allocation is not None and policy.allocation.total not in (totals := get_args(Total)):
        total = policy.allocation.total
        raise ConfigError(
            f"{type(policy.allocation).__name__}.total is {total!r:.60}; {close_matches(str(total), totals)}"
        )
    divided = [name for name in ("allocation", "merge", "skip_layers") if getattr(policy, name)]
    if divided and (When.PREFILL not in policy.when or not policy.bounded):
        raise ConfigError(
            f"policy.{divided[0]} works where a prompt is cut, and {kind.__name__} cuts none; leave it out"
        )
    planned = "merge" if policy.merge is not None else "allocation" if is_ragged(policy) else None
    if planned is not None and kind.plan is not ScorePolicy.plan:
        raise ConfigError(
            f"policy.{planned} is carried out by ScorePolicy.plan, but {kind.__name__} has a plan of its own; leave it "
            "out, or let the plan do it"
        )
    if policy.protect is not None and (kind.plan, kind.victim) != (ScorePolicy.plan, ScorePolicy.victim):
        raise ConfigError(
            f"policy.protect is carried out by ScorePolicy.plan and victim, but {kind.__name__} has one of its own; "
            "leave it out"
        )
    if policy.merge is not None and policy.merge.remembers and kind.remembered is not ScorePolicy.remembered:
        raise ConfigError(
            f"policy.merge {type(policy.merge).__name__} remembers numbers from one cut to the next, and "
            f"{kind.__name__} does so itself, in the same place; use another merge"
        )
    if policy.every_tokens < 1:
        raise ConfigError(f"policy.every_tokens is {policy.every_tokens}; it must be at least 1")
    if policy.every_tokens == 1:
        return
    if steps_between_cuts(policy) is None:
        raise ConfigError(f"policy.every_tokens is {policy.every_tokens}, but {kind.__name__} cuts the prompt only")
    if keeps_ring(policy) and positions != "original":
        raise ConfigError(
            f"policy.every_tokens is {policy.every_tokens} and {kind.__name__} reads rows of the last queries, which "
            f"are kept as they were rotated, but positions is {positions!r}; use positions=original"
        )
    if missing := [need.name for need in (Needs.PROBS, Needs.MOMENTS) if need in needs_of(policy)]:
        raise ConfigError(
            f"policy.every_tokens is {policy.every_tokens}, but {kind.__name__} reads {missing[0]}, which is not there "
            "when a block of generated tokens is cut; use every_tokens=1"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """The entry of the token at `position`, in one layer and KV head, or in all of them where that is None."""

    position: int
    layer: int | None = None
    head: int | None = None


def pinned(policy: Policy, pins: Sequence[Pin]) -> ScorePolicy:
    """Return `policy` with entries that stay within its budget: in their place goes the lowest of the others.

    Sinks and recent tokens come before them, so where these take the whole budget a pin holds nothing. How the budget
    is divided among layers and heads is decided without them. Raises: ConfigError, as `chosen_by`.
    """

    def favour(view: View, ranked: Tensor) -> Tensor:
        stays, heads = torch.zeros_like(view.valid), torch.arange(view.position.shape[1], device=view.position.device)
        for pin in pins:
            if pin.layer in (None, view.layer):
                here = view.position == pin.position
                stays |= here if pin.head is None else here & (heads == pin.head)[:, None]
        most = torch.full_like(ranked, torch.finfo(ranked.dtype).max)
        return torch.where(stays & (ranked < torch.inf), most, ranked)

    return chosen_by(policy, favour)


def chosen_by(policy: Policy, favour: Callable[[View, Tensor], Tensor]) -> ScorePolicy:
    """Return `policy` with what entries stay by, (B, H, T) and infinite where protected, handed to `favour` first.

    It is an instance of the policy's own class, so that all that is known by the class stays so. Raises: ConfigError
    for a policy that does not choose by its score alone.
    """
    kind = type(policy)
    if not isinstance(policy, ScorePolicy) or (kind.plan, kind.victim) != (ScorePolicy.plan, ScorePolicy.victim):
        raise ConfigError(
            f"{kind.__name__} does not choose by a score alone, so no entry of it can be kept in the place of its "
            "lowest one; choose a policy of scores, such as h2o or snapkv"
        )
    favours = {"_favoured": lambda _, view, ranked: favour(view, ranked), "__module__": kind.__module__}
    chosen: ScorePolicy = type(kind.__name__, (kind,), favours)(
        **{one.name: getattr(policy, one.name) for one in fields(policy) if one.init}
    )
    return chosen


def chooses_plainly(policy: ScorePolicy) -> bool:
    """Return whether a decode step frees the entry of lowest score that is not protected, and nothing else counts."""
    kind = type(policy)
    return kind.victim is ScorePolicy.victim and kind._favoured is ScorePolicy._favoured


def checked_score(policy: ScorePolicy, view: View) -> Tensor:
    """Return `policy.score(view)`. Raises: PolicyError for another shape than (B, H, T) or (B, 1, T)."""
    score = policy.score(view)
    rows, _, entries = view.position.shape
    if not isinstance(score, Tensor):
        raise PolicyError(f"{type(policy).__name__}.score returned {score!r:.60}; it must be a tensor (B, H, T)")
    if score.shape not in (view.position.shape, (rows, 1, entries)):
        raise PolicyError(
            f"{type(policy).__name__}.score returned shape {tuple(score.shape)}; "
            f"it must be (B, H, T) = {tuple(view.position.shape)} or (B, 1, T)"
        )
    return score if policy.protect is None else ranked_above(score, getattr(view, policy.protect))


def takes_notes(policy: Policy) -> bool:
    """Return whether the policy notes a number of each token when it comes."""
    return type(policy).note is not Policy.note


def checked_note(policy: Policy, view: View) -> Tensor | None:
    """Return `policy.note(view)` as (B, H, T) float32, 0 at pads. Raises: PolicyError for another shape."""
    noted = policy.note(view)
    if noted is None:
        return None
    rows, _, entries = view.position.shape
    if noted.shape not in (view.position.shape, (rows, 1, entries)):
        raise PolicyError(
            f"{type(policy).__name__}.note returned shape {tuple(noted.shape)}; "
            f"it must be (B, H, T) = {tuple(view.position.shape)} or (B, 1, T)"
        )
    return noted.float().expand(view.position.shape).masked_fill(view.position < 0, 0.0)


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


def checked_joining(merge: Merge, view: View, victim: Tensor) -> Joining:
    """Return `merge.joining(view, victim)`, looked at where that does not wait. Raises: PolicyError if it is amiss."""
    joining, name, (rows, heads, entries) = merge.joining(view, victim), type(merge).__name__, view.position.shape
    if not isinstance(joining, Joining):
        raise PolicyError(f"{name}.joining returned {shown(joining)}; it must be a Joining")
    into = joining.into
    if into.shape[:2] != (rows, heads) or not into.shape == joining.weight.shape == joining.own.shape:
        raise PolicyError(
            f"{name}.joining returned into, weight and own of {tuple(into.shape)}, {tuple(joining.weight.shape)} "
            f"and {tuple(joining.own.shape)}; each must be (B, H, M) = ({rows}, {heads}, M)"
        )
    takes = (joining.weight != 0) | (joining.own != 1)
    if into.device.type == "cpu" and bool(takes.any()):
        inside = (into >= 0) & (into < entries) & (into != victim[..., None])
        holds = view.valid.gather(-1, into.clamp(0, entries - 1))
        times = torch.zeros(rows, heads, entries).scatter_add_(-1, into.clamp(0, entries - 1), takes.float())
        if bool((takes & ~(inside & holds)).any()) or bool((times > 1).any()):
            raise PolicyError(
                f"{name}.joining merges into {into[takes].tolist()[:8]} in layer {view.layer}; each must be a slot "
                "that holds a token and stays, and at most once in a head"
            )
    return joining


def checked_plan(policy: Policy, view: View, allowed: list[int]) -> Plan:
    """Return `policy.plan(view)`; `allowed` has one number per row.

    Raises: NonFiniteChoiceError and PolicyError for a plan that breaks the contract: at the end of the pass where the
    view has `doubts`, else now, in one wait. Until then a plan names no entries that do not exist.
    """
    doubts = Doubts() if view.doubts is None else view.doubts
    plan, position, name = policy.plan(view), view.position, f"{type(policy).__name__}.plan in layer {view.layer}"
    if plan is None:
        raise PolicyError(f"{name} returned None although the budget {allowed} is exceeded; return a Plan")
    if not isinstance(plan, Plan):
        raise PolicyError(f"{name} returned {shown(plan)}; it must be a Plan")
    _check_column(plan.keep, "keep", torch.bool, position, name)
    if plan.merge_weight is not None and (plan.merge_into is None or plan.merge_weight.shape != position.shape):
        raise PolicyError(f"{name} returned merge_weight without a merge_into of the same shape (B, H, T)")
    if plan.merge_into is not None:
        _check_column(plan.merge_into, "merge_into", torch.int64, position, name)
    counts, amiss = looked_at(plan.keep, plan.merge_into, position, view.budget, exact=keeps_the_most(policy))
    keeps_empty, miscounted, nowhere, lost = amiss.unbind()
    kept, shared, entries = counts[..., 0], is_ragged(policy), position.shape[-1]
    if shared:
        counted, held = kept.sum(dim=-1, keepdim=True), counts[..., 1]
        miscounted = ((counted > view.budget[:, None] * kept.shape[1]) | ((held > 0) & (kept < 1))).any()
    doubts.note(
        keeps_empty, lambda: PolicyError(f"{name} keeps slots that hold no token; combine keep with view.valid")
    )
    doubts.note(
        miscounted,
        lambda: PolicyError(
            f"{name} keeps {kept.tolist()} entries (rows x heads); allowed per row: 1 to {allowed}"
            f"{' on average over the heads' if shared else ''}. keep_top keeps none where a score is NaN"
        ),
    )
    if plan.merge_into is not None:
        doubts.note(nowhere, lambda: _out_of_range(name, "merge_into", counts[..., 2], counts[..., 3], entries))
        doubts.note(
            lost,
            lambda: PolicyError(
                f"{name} merges entries into some that it does not keep; give them a survivor or themselves"
            ),
        )
    if plan.merge_source is not None:
        if plan.merge_into is None:
            raise PolicyError(f"{name} returned merge_source without a merge_into")
        _check_index(plan.merge_source, "merge_source", plan.keep, doubts, name)
    if plan.mass is not None and (plan.mass.shape != position.shape or view.mass_or_none is None):
        raise PolicyError(
            f"{name} returned mass of shape {tuple(plan.mass.shape)}; it must be (B, H, T) = "
            f"{tuple(position.shape)}, and the policy must declare Needs.MASS"
        )
    if plan.mass is not None:
        doubts.note(
            (plan.mass.isnan() & plan.keep).any(),
            lambda: NonFiniteChoiceError(
                f"{name} returned a mass that is NaN for entries that it keeps; it must be numbers"
            ),
        )
    if plan.values is not None and plan.values.shape != view.values.shape:
        raise PolicyError(
            f"{name} returned values of shape {tuple(plan.values.shape)}; it must be (B, H, T, D) = "
            f"{tuple(view.values.shape)}"
        )
    if view.doubts is None:
        doubts.look()
        return plan
    last, into, source = entries - 1, plan.merge_into, plan.merge_source
    return replace(
        plan,
        merge_into=None if into is None else into.clamp(0, last),
        merge_source=None if source is None else source.clamp(0, last),
    )


def _attention_of(view: View) -> dict[str, Tensor]:
    """Return the attention that a view shows, (B, H, ..., T), by name."""
    given = {name: getattr(view, f"{name}_or_none") for name in ("mass", "window", "probs", "head_rows")}
    return {name: numbers for name, numbers in given.items() if numbers is not None}


def check_statistics(view: View) -> None:
    """Raise NonFiniteError if attention that a policy is about to decide by is NaN: the model's numbers are."""
    doubts = Doubts() if view.doubts is None else view.doubts
    for name, numbers in _attention_of(view).items():
        doubts.note(has_nan(numbers, view.position), partial(_not_finite, name, view.layer))
    if view.doubts is None:
        doubts.look()


def with_numbers(view: View) -> View:
    """Return `view` with 0 for what is NaN, which was noted: an index made from it may be none, and end the process."""
    cleaned: dict[str, Any] = {
        f"{name}_or_none": numbers.nan_to_num(0.0, torch.inf, -torch.inf)
        for name, numbers in _attention_of(view).items()
    }
    return replace(view, **cleaned)


def _not_finite(name: str, layer: int) -> NonFiniteError:
    return NonFiniteError(
        f"the attention that a prompt's tokens receive is NaN in layer {layer} (view.{name}): the model's keys or "
        "queries overflow; use a wider model.dtype"
    )


def _check_index(index: Tensor, field: str, keep: Tensor, doubts: Doubts, name: str) -> None:
    _check_column(index, field, torch.int64, keep, name)
    entries = keep.shape[-1]
    least, most = index.aminmax()
    doubts.note((least < 0) | (most >= entries), lambda: _out_of_range(name, field, least, most, entries))


def _out_of_range(name: str, field: str, least: Tensor, most: Tensor, entries: int) -> PolicyError:
    return PolicyError(
        f"{name} returned {field} from {int(least.min())} to {int(most.max())}; allowed: 0 to {entries - 1}"
    )


def _check_column(given: Tensor, field: str, dtype: torch.dtype, like: Tensor, name: str) -> None:
    if given.shape != like.shape or given.dtype != dtype:
        raise PolicyError(
            f"{name} returned {field} of {given.dtype} and shape {tuple(given.shape)}; "
            f"it must be {str(dtype).removeprefix('torch.')} of shape (B, H, T) = {tuple(like.shape)}"
        )
