"""One decode step over a layer's slots: write the token, attend, free a victim.

On a GPU each part is one or two kernels that wait for nothing; elsewhere, and as the reference, plain
torch does the same. Which one runs is decided in one place, `use_triton`.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from kvbench.cache.attend import decode_step, reduce_group
from kvbench.cache.layer_setup import LayerSetup
from kvbench.cache.ledger import Ledger
from kvbench.cache.policy import Policy, ScorePolicy
from kvbench.cache.positions import shifted_step
from kvbench.cache.slots import NAN_SCORE, Slots
from kvbench.cache.step_counts import StepCounts
from kvbench.cache.view import Needs, When
from kvbench.errors import NonFiniteChoiceError, PolicyError
from kvbench.kernels.dispatch import use_triton


def evicts_at_decode(policy: Policy) -> bool:
    """Return whether `policy` can free entries while tokens are generated."""
    return policy.bounded and When.DECODE in policy.when


def write_token(slots: Slots, keys: Tensor, values: Tensor, setup: LayerSetup, counts: StepCounts) -> None:
    """Put the new token (B, H, 1, D), the newest of `counts.seen`, into the free slots."""
    if use_triton(keys):
        from kvbench.kernels.slots import write_slot

        write_slot(slots.columns(), keys, values, counts.seen, advance=not evicts_at_decode(setup.policy))
    else:
        slots.write(keys, values, counts.seen - 1)


def attend_slots(
    slots: Slots, query: Tensor, scaling: float, setup: LayerSetup, counts: StepCounts
) -> tuple[Tensor, Tensor | None]:
    """Return output (B, Hq, 1, D) and the probabilities (B, H, C) a policy asks for; mass grows in place."""
    if use_triton(query):
        return _attend_by_kernel(slots, query, scaling, setup, counts)
    policy, entries = setup.policy, slots.entries
    query, keys = shifted_step(query, entries.keys, entries.position, setup.rotation)
    output, rows = decode_step(query, keys, entries.values, entries.position >= 0, scaling)
    probs = reduce_group(rows, policy.reduction) if policy.needs & (Needs.MASS | Needs.PROBS) else None
    if entries.mass is not None and probs is not None:
        entries.mass += probs
    return output, probs


def _attend_by_kernel(
    slots: Slots, query: Tensor, scaling: float, setup: LayerSetup, counts: StepCounts
) -> tuple[Tensor, Tensor | None]:
    from kvbench.kernels.decode import Turn, decode_attention

    turn = None
    if setup.rotation is not None and slots.rank is not None:
        cosines, sines = counts.turn_tables(setup.rotation)
        turn = Turn(position=slots.entries.position, rank=slots.rank, seen=counts.seen, cosines=cosines, sines=sines)
    mass = slots.entries.mass
    coarse = mass is not None and setup.policy.mass_in_model_dtype  # the kernel sums float32 only
    output, probs = decode_attention(
        query,
        slots.entries.keys,
        slots.entries.values,
        slots.length,
        scaling,
        reduction=setup.policy.reduction,
        mass=None if coarse else mass,
        want_probs=coarse or Needs.PROBS in setup.policy.needs,
        turn=turn,
    )
    if coarse and mass is not None and probs is not None:
        mass += probs
    return output, probs


def end_step(slots: Slots, probs: Tensor | None, setup: LayerSetup, counts: StepCounts, ledger: Ledger) -> None:
    """Free what is over the budget, or take a fresh slot next; `ledger` counts it on the host."""
    by_kernels = use_triton(slots.entries.keys)
    may_ask_host = slots.length.device.type == "cpu" and not by_kernels
    if not evicts_at_decode(setup.policy):
        if not by_kernels:  # the kernel of `write_token` did it already
            slots.advance()
    elif may_ask_host and not ledger.over():
        slots.advance()
    else:
        evict(slots, probs, setup, counts)
    ledger.evicted()


def evict(slots: Slots, probs: Tensor | None, setup: LayerSetup, counts: StepCounts) -> None:
    """Free one victim of every row and head that is over its budget."""
    policy = setup.policy
    view = counts.view(setup, slots, probs)
    if not use_triton(slots.entries.keys):
        victim, over = checked_victim(policy, policy.victim(view), slots), slots.length > view.budget[:, None]
        slots.release(victim, over)
        if victim.device.type == "cpu":  # elsewhere looking would wait for the device at every step
            check_faults(slots.faults, policy, setup.layer)
        return
    from kvbench.kernels.slots import free_given, free_lowest

    if _is_plain_score(policy):
        free_lowest(slots.columns(), policy.checked_score(view), view.budget, counts.sinks, counts.recent_from)
    else:
        free_given(slots.columns(), checked_victim(policy, policy.victim(view), slots), view.budget)


def decide(slots: Slots, setup: LayerSetup, counts: StepCounts) -> Tensor:
    """Return the victim (B, H) that `evict` would free now, found the way it does; nothing is freed."""
    policy = setup.policy
    view = counts.view(setup, slots, torch.zeros_like(slots.entries.position, dtype=torch.float32))
    if not (use_triton(slots.entries.keys) and _is_plain_score(policy)):
        return policy.victim(view)
    from kvbench.kernels.slots import lowest_slot

    return lowest_slot(slots.columns(), policy.checked_score(view), view.budget, counts.sinks, counts.recent_from)


def _is_plain_score(policy: Policy) -> TypeGuard[ScorePolicy]:
    return isinstance(policy, ScorePolicy) and type(policy).victim is ScorePolicy.victim


def checked_victim(policy: Policy, victim: Tensor, slots: Slots) -> Tensor:
    """Return `victim` as it is. Raises: PolicyError for a wrong shape or type."""
    shape, name = slots.length.shape, type(policy).__name__
    if victim.shape != shape or victim.dtype != slots.length.dtype:
        raise PolicyError(
            f"{name}.victim returned {victim.dtype} of shape {tuple(victim.shape)}; "
            f"it must be int64 of shape (B, H) = {tuple(shape)}"
        )
    return victim


def check_faults(faults: Tensor, policy: Policy, layer: int) -> None:
    """Look at a layer's `Slots.faults` (B, H), which waits for the device.

    Raises: NonFiniteChoiceError if a victim was chosen by NaN, PolicyError if it was no slot with a token.
    """
    if not bool(faults.any()):
        return
    where = f"in layer {layer}, row and KV head {faults.nonzero()[0].tolist()}"
    if bool((faults & NAN_SCORE).any()):
        raise NonFiniteChoiceError(
            f"{type(policy).__name__} chose a victim by NaN at decode {where}; scores must be numbers (an infinite one "
            "is larger or smaller than all others)"
        )
    raise PolicyError(
        f"{type(policy).__name__}.victim chose a slot that holds no token {where}; choose among those of view.valid"
    )
