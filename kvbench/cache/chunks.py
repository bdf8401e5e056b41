"""A chunk of several tokens as entries: who is real, where it stands, what columns it has."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.cache.policy import Policy
from kvbench.cache.slots import EMPTY, Entries, Slots
from kvbench.cache.view import Needs, Plan, View
from kvbench.errors import ModelSupportError, NonFiniteChoiceError, NonFiniteError, PolicyError


def real_tokens(query: Tensor, padding: Tensor | None, *, seen: list[int]) -> Tensor:
    """Return (B, Q) bool, False at pads.

    `padding` (B, N) covers everything that came, pads included; `seen` are the real tokens of each row before
    these, empty if there are none. Raises: ModelSupportError unless pads stand left of a row's first real token
    only, and some row has one.
    """
    batch, _, new, _ = query.shape
    if padding is None:
        return torch.ones((batch, new), dtype=torch.bool, device=query.device)
    real = padding[:, -new:].bool()
    counts = real.sum(dim=-1).tolist()
    left_padded = bool((real.long().diff(dim=-1) >= 0).all())  # within these; across pieces by what was seen
    begun = any(had and count < new for had, count in zip(seen or [0] * batch, counts, strict=True))
    if not left_padded or begun or not any(counts):
        raise ModelSupportError(
            f"the attention mask has pads that do not stand left of the first prompt (real tokens per row of this "
            f"chunk: {counts} of {new}); set padding_side='left'"
        )
    return real


def new_positions(real: Tensor, seen: list[int]) -> Tensor:
    """Return (B, Q) int64: each new token's index among its row's real tokens, -1 at pads."""
    before = torch.tensor(seen or [0] * real.shape[0], dtype=torch.int64, device=real.device)
    return torch.where(real, real.long().cumsum(-1) - 1 + before[:, None], EMPTY)


def columns_of(
    keys: Tensor, values: Tensor, position: Tensor, slots: Slots | None, policy: Policy, prompt_kind: Tensor | None
) -> Entries:
    """Return stored and new tokens together as entries; keys, values (B, H, T, D) hold both already."""
    batch, heads, _, _ = keys.shape
    wide = position[:, None].expand(batch, heads, position.shape[1])
    kind = torch.zeros(wide.shape, dtype=torch.int8, device=keys.device)
    if slots is None and prompt_kind is not None:
        kind = _checked_kind(prompt_kind, position).to(keys.device, torch.int8)[:, None].expand(wide.shape)
    mass = None
    if Needs.MASS in policy.needs:
        dtype = keys.dtype if policy.mass_in_model_dtype else torch.float32
        mass = torch.zeros(wide.shape, dtype=dtype, device=keys.device)
    if slots is not None:
        stored = slots.entries
        wide = torch.cat((stored.position, wide), dim=-1)
        kind = torch.cat((stored.kind, kind), dim=-1)
        mass = None if mass is None or stored.mass is None else torch.cat((stored.mass, mass), dim=-1)
    return Entries(keys=keys, values=values, position=wide, kind=kind, mass=mass)


def _checked_kind(kind: Tensor, position: Tensor) -> Tensor:
    if kind.shape != position.shape:
        raise ModelSupportError(
            f"prompt_kind has shape {tuple(kind.shape)}, the first prompt {tuple(position.shape)}; "
            "give one kind per prompt token, pads included, and prefill in one piece"
        )
    return kind


def check_statistics(view: View) -> None:
    """Raise NonFiniteError if attention that a policy is about to decide by is NaN: the model's numbers are."""
    valid = view.valid
    statistics = {"mass": view.mass_or_none, "window": view.window_or_none, "probs": view.probs_or_none}
    for name, numbers in statistics.items():
        if numbers is not None and bool((numbers.isnan() & (valid if numbers.ndim == 3 else valid[:, :, None])).any()):
            raise NonFiniteError(
                f"the attention that a prompt's tokens receive is NaN in layer {view.layer} (view.{name}): the model's "
                "keys or queries overflow; use a wider model.dtype"
            )


def check_plan(plan: Plan | None, entries: Entries, allowed: list[int], policy: Policy, layer: int) -> None:
    """Raise PolicyError if a plan breaks the contract; `allowed` has one number per row."""
    name = f"{type(policy).__name__}.plan in layer {layer}"
    if plan is None:
        raise PolicyError(f"{name} returned None although the budget {allowed} is exceeded; return a Plan")
    if plan.keep.shape != entries.position.shape or plan.keep.dtype != torch.bool:
        raise PolicyError(
            f"{name} returned keep of {plan.keep.dtype} and shape {tuple(plan.keep.shape)}; "
            f"it must be bool of shape (B, H, T) = {tuple(entries.position.shape)}"
        )
    if bool((plan.keep & (entries.position < 0)).any()):
        raise PolicyError(f"{name} keeps slots that hold no token; combine keep with view.valid")
    kept, held = plan.keep.sum(dim=-1), (entries.position >= 0).any(dim=-1)  # a row may have had pads only
    if bool(((kept > torch.tensor(allowed, device=kept.device)[:, None]) | (held & (kept < 1))).any()):
        raise PolicyError(
            f"{name} keeps {kept.tolist()} entries (rows x heads); allowed per row: 1 to {allowed}. "
            "keep_top keeps none where a score is NaN"
        )
    if plan.merge_into is not None:
        _check_merge(plan.merge_into, plan.keep, name)
    if plan.mass is not None and (plan.mass.shape != plan.keep.shape or entries.mass is None):
        raise PolicyError(
            f"{name} returned mass of shape {tuple(plan.mass.shape)}; it must be (B, H, T) = "
            f"{tuple(plan.keep.shape)}, and the policy must declare Needs.MASS"
        )
    if plan.mass is not None and bool((plan.mass.isnan() & plan.keep).any()):
        raise NonFiniteChoiceError(f"{name} returned a mass that is NaN for entries that it keeps; it must be numbers")
    source = plan.merge_source
    if source is not None and (plan.merge_into is None or source.shape != plan.keep.shape):
        raise PolicyError(f"{name} returned merge_source without a merge_into of the same shape {tuple(source.shape)}")


def _check_merge(into: Tensor, keep: Tensor, name: str) -> None:
    if into.shape != keep.shape or into.dtype != torch.int64:
        raise PolicyError(
            f"{name} returned merge_into of {into.dtype} and shape {tuple(into.shape)}; "
            f"it must be int64 of shape (B, H, T) = {tuple(keep.shape)}"
        )
    if bool(((into < 0) | (into >= keep.shape[-1])).any()):
        raise PolicyError(f"{name} merges into {into.min()} to {into.max()}; allowed: 0 to {keep.shape[-1] - 1}")
    itself = into == torch.arange(keep.shape[-1], device=into.device)
    if not bool((keep.gather(-1, into) | itself).all()):
        raise PolicyError(f"{name} merges entries into some that it does not keep; give them a survivor or themselves")
