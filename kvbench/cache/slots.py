"""The storage of one layer: fixed slots, and the victim's slot takes the next token.

Attention does not care about the order of entries once keys are rotated, so nothing is ever moved
at decode: the new token is written into the free slot, and the slot of the evicted one becomes
free. Columns (position, kind, mass) lie beside the slots, so statistics follow their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.cache.policy import Policy
from kvbench.cache.selection import age_rank, oldest_first
from kvbench.cache.view import Joining, Plan, View, made_on_read
from kvbench.errors import NonFiniteChoiceError, PolicyError
from kvbench.kernels.dispatch import SlotColumns, use_triton

EMPTY = -1
NO_CHOICE = -1  # a victim that is no slot: what it should be chosen by is NaN
NAN_SCORE, NO_TOKEN = 1, 2  # bits of `Slots.faults`


@made_on_read("keys", "values")
@dataclass(kw_only=True, slots=True)
class Entries:
    """Keys and values with their columns: keys, values (B, H, T, D); the rest (B, H, T)."""

    keys: Tensor
    values: Tensor
    position: Tensor
    kind: Tensor
    mass: Tensor | None
    noted: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return keys, values and the columns that exist."""
        return [self.keys, self.values, *self.columns()]

    def columns(self) -> list[Tensor]:
        """Return the bookkeeping columns that exist."""
        return [column for column in (self.position, self.kind, self.mass, self.noted) if column is not None]


@dataclass(kw_only=True, slots=True)
class Books:
    """What is kept of a layer's slots beside them: `length` (B, H) counts tokens held, `free` (B, H) is the next slot.

    rank int32, of the shape of positions, or None: how many entries are older, kept up to date by the kernels where
    positions count inside the cache. in_place (B, H) int32, with it: so many first slots hold entries whose rank is
    their position, and all others lie before theirs by as much as the next query; -1 where not, or not known.
    memory (B, H, M) or None: what the policy's last plan left, which does not follow the tokens. faults (B, H) int32:
    what went wrong in any step so far, NAN_SCORE and NO_TOKEN, to be looked at when the host waits anyway. Everything
    changes in place, so that a step can be captured.
    ended (B, H) int32 or None: the faults of rows whose answer has ended, as they were then, -1 where it goes on.
    """

    length: Tensor
    free: Tensor
    faults: Tensor
    rank: Tensor | None = None
    in_place: Tensor | None = None
    memory: Tensor | None = None
    ended: Tensor | None = None

    @property
    def buffers(self) -> Entries:
        """Keys, values and columns as they are stored."""
        raise NotImplementedError

    def end_rows(self, ended: Tensor) -> None:
        """Note that the answers of rows have ended, (B,) bool: what is chosen in them from now on is no fault."""
        before = torch.full_like(self.faults, -1) if self.ended is None else self.ended
        self.ended = torch.where(ended[:, None] & (before < 0), self.faults, before)

    @property
    def counted_faults(self) -> Tensor:
        """(B, H) int32: `faults` of rows that go on, and of the others those from before their end."""
        return self.faults if self.ended is None else torch.where(self.ended < 0, self.faults, self.ended)

    def advance(self) -> None:
        """Take a fresh slot next; every slot below `length` holds a token."""
        self.free.copy_(self.length)

    def keep_ranks(self, rank: Tensor) -> None:
        """Go on with these ranks, int32 of the shape of positions; who is in place a kernel will tell."""
        if self.rank is None or self.in_place is None:
            self.rank, self.in_place = rank, torch.full_like(self.faults, -1)
        else:
            self.rank.copy_(rank)
            self.in_place.fill_(-1)

    def chosen(self, victim: Tensor, over: Tensor) -> Tensor:
        """Return `victim` (B, H), slot 0 in place of one that is no slot with a token, which is noted in `faults`."""
        wrong = (victim < 0) | (victim >= self.length)  # slots have no hole when a step ends
        self.faults |= torch.where(victim == NO_CHOICE, NAN_SCORE, NO_TOKEN).int() * (wrong & over)
        return victim.masked_fill(wrong, 0)

    def places(self, slot: Tensor) -> Tensor:
        """(B, H, M): where in `rows_of` the slots (B, H, M) of heads lie."""
        raise NotImplementedError

    def join(self, joining: Joining, victim: Tensor, over: Tensor) -> None:
        """Let slot `victim` (B, H) join others, in place, where `over` (B, H) holds; it is still to be freed."""
        takes = over[..., None] & ((joining.weight != 0) | (joining.own != 1))
        into = self.places(torch.where(takes, joining.into, victim[..., None]))  # the others write the victim onto it
        at, gone_at = into.flatten(), self.places(victim[..., None]).flatten()
        for states in [self.buffers.values, *([self.buffers.keys] if joining.keys else [])]:
            flat = states.view(-1, states.shape[-1])
            number = torch.promote_types(flat.dtype, torch.float32)
            gone = flat[gone_at].view(*victim.shape, 1, -1).to(number)
            joined = joining.own[..., None].to(number) * flat[at].view(*into.shape, -1)
            joined = torch.where(takes[..., None], joined + joining.weight[..., None].to(number) * gone, gone)
            flat.index_copy_(0, at, joined.flatten(0, 2).to(flat.dtype))
        if joining.memory is not None and self.memory is not None:
            self.memory.copy_(torch.where(over[..., None], joining.memory, self.memory))

    def take(self, cut: Books) -> None:
        """Copy what a cut left of these slots into them, in place: what was captured over them stays valid."""
        for buffer, kept in zip(self.buffers.tensors(), cut.buffers.tensors(), strict=True):
            buffer.copy_(kept)
        self.length.copy_(cut.length)
        self.free.copy_(cut.length)
        if self.memory is None or cut.memory is None or self.memory.shape != cut.memory.shape:
            self.memory = cut.memory
        else:
            self.memory.copy_(cut.memory)

    def state(self) -> list[Tensor]:
        """Return what a step changes in place, keys and values excepted: they change in free slots only."""
        ranks = [column for column in (self.rank, self.in_place) if column is not None]
        return [*self.buffers.columns(), self.length, self.free, self.faults, *ranks]

    def fixed(self) -> list[Tensor]:
        """Return the counts that stay as a cut made them."""
        return []

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry's key and value."""
        return 2 * self.buffers.keys.shape[-1] * self.buffers.keys.element_size()

    def stored_bytes(self) -> int:
        """Return the bytes of keys and values, counted from their storages."""
        return sum(t.untyped_storage().nbytes() for t in (self.buffers.keys, self.buffers.values))

    def statistics_bytes(self) -> int:
        """Return the bytes of what statistics leave beside the tokens: mass, notes, and the memory of a plan."""
        kept = (self.buffers.mass, self.buffers.noted, self.memory)
        return sum(t.untyped_storage().nbytes() for t in kept if t is not None)

    def bookkeeping_bytes(self) -> int:
        """Return the bytes of positions, kinds, ranks and counts, counted from their storages."""
        own = [t for t in self.state() if t is not self.buffers.mass and t is not self.buffers.noted]
        return sum(t.untyped_storage().nbytes() for t in (*own, *self.fixed()))


@dataclass(kw_only=True, slots=True)
class Slots(Books):
    """A layer's buffer of C slots for every row and head."""

    entries: Entries

    @property
    def buffers(self) -> Entries:
        """Keys, values (B, H, C, D) and columns (B, H, C)."""
        return self.entries

    @property
    def position(self) -> Tensor:
        """(B, H, C) int64: what each slot holds, -1 for nothing."""
        return self.entries.position

    @property
    def capacity(self) -> int:
        """Slots per row and head."""
        return self.entries.position.shape[-1]

    def places(self, slot: Tensor) -> Tensor:
        """(B, H, M): where the slots (B, H, M) lie in the buffer seen as (B H C, D)."""
        pairs = torch.arange(self.length.numel(), device=slot.device).view(*self.length.shape, 1)
        return pairs * self.capacity + slot

    def columns(self) -> SlotColumns:
        """Return the tensors as the kernels take them."""
        entries = self.entries
        return SlotColumns(
            keys=entries.keys,
            values=entries.values,
            position=entries.position,
            kind=entries.kind,
            mass=entries.mass,
            rank=self.rank,
            in_place=self.in_place,
            length=self.length,
            free=self.free,
            faults=self.faults,
            capacity=self.capacity,
        )

    def write(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        """Put one token, (B, H, 1, D), at `position` (B,) into the free slots; its kind is text."""
        at = self.free[..., None]
        wide = at[..., None].expand_as(keys)
        self.entries.keys.scatter_(2, wide, keys)
        self.entries.values.scatter_(2, wide, values)
        self.entries.position.scatter_(2, at, position[:, None, None].expand_as(at))
        self.entries.kind.scatter_(2, at, 0)
        if self.entries.mass is not None:
            self.entries.mass.scatter_(2, at, 0.0)
        self.length += 1

    def note(self, noted: Tensor) -> None:
        """Put what was noted, (B, H, 1), of a token that is about to come beside its slot."""
        assert self.entries.noted is not None
        self.entries.noted.scatter_(2, self.free[..., None], noted)

    def append(
        self, keys: Tensor, values: Tensor, position: Tensor, mass: Tensor | None, noted: Tensor | None = None
    ) -> None:
        """Put N tokens, (B, H, N, D), at `position` (B, N) into fresh slots; mass, noted (B, H, N) are beside them.

        No slot was ever freed, so all below `length` hold tokens, in their order; there is room for N more.
        """
        new = torch.arange(position.shape[1], device=position.device)
        at = self.length[..., None] + new
        wide = at[..., None].expand_as(keys)
        self.entries.keys.scatter_(2, wide, keys)
        self.entries.values.scatter_(2, wide, values)
        self.entries.position.scatter_(2, at, position[:, None].expand_as(at))
        self.entries.kind.scatter_(2, at, 0)
        if self.entries.mass is not None and mass is not None:
            self.entries.mass.scatter_(2, at, mass.to(self.entries.mass.dtype))
        if self.entries.noted is not None and noted is not None:
            self.entries.noted.scatter_(2, at, noted)
        if self.rank is not None:
            self.rank.scatter_(2, at, at.int())
        self.length += position.shape[1]
        self.advance()

    def release(self, victim: Tensor, over: Tensor) -> None:
        """Free `victim` (B, H) where `over` (B, H) holds; the others take a fresh slot next.

        One that is no slot with a token is noted in `faults`, and slot 0 goes, so that nothing is written elsewhere.
        """
        victim = self.chosen(victim, over)
        at = victim[..., None]
        kept = self.entries.position.gather(2, at)
        self.entries.position.scatter_(2, at, torch.where(over[..., None], EMPTY, kept))
        self.length -= over.long()
        self.free.copy_(torch.where(over, victim, self.length))

    def over(self, budget: Tensor) -> Tensor:
        """(B, H) bool: heads that hold more than `budget` (B,)."""
        return self.length > budget[:, None]

    def add_mass(self, received: Tensor) -> None:
        """Add attention (B, H, C') that the first slots received."""
        assert self.entries.mass is not None
        self.entries.mass[..., : received.shape[-1]] += received.to(self.entries.mass.dtype)

    def has_room(self, held: list[int]) -> bool:
        """Whether each row's slots suffice for `held` entries."""
        return max(held) <= self.capacity

    def cut(self, plan: Plan) -> None:
        """Free what `plan` does not keep, in place."""
        self.take(settle(self.entries, plan, self.capacity, self.memory, self.faults))
        if self.rank is not None:
            self.keep_ranks(age_rank(self.entries.position).int())

    def grow(self, more: int) -> None:
        """Copy into buffers of so many slots more; only where the final length was not announced."""
        capacity = self.capacity + more
        self.entries = _with_capacity(self.entries, capacity)
        if self.rank is not None:
            self.rank = nn.functional.pad(self.rank, (0, capacity - self.rank.shape[-1]))

    def shrink(self, capacity: int) -> None:
        """Copy into buffers of `capacity` slots, where that is fewer and all tokens lie in the first of them."""
        if capacity < self.capacity:
            first = {name: getattr(self.entries, name) for name in Entries.__dataclass_fields__}
            # A clone: of one row and head the first slots are contiguous already, and would keep the whole storage.
            dense = torch.contiguous_format
            first |= {name: c[:, :, :capacity].clone(memory_format=dense) for name, c in first.items() if c is not None}
            self.entries = Entries(**first)
            self.rank = None if self.rank is None else self.rank[..., :capacity].clone(memory_format=dense)


def settle(
    entries: Entries,
    plan: Plan | None,
    capacity: int,
    memory: Tensor | None = None,
    faults: Tensor | None = None,
    *,
    in_order: bool = False,
) -> Slots:
    """Move what `plan` keeps into fresh slots in token order; the old storage is let go.

    Merging averages keys and values of a bucket in float32, or adds them up by weight, and adds up its mass; the entry
    keeps its anchor's position and kind. What lies in a slot that holds no token is not defined. `memory` is what an
    earlier plan left, `faults` what went wrong in earlier steps. in_order: every entry holds a token and stays, in
    token order already, and `capacity` suffices.
    """
    if plan is not None:
        memory = memory if plan.memory is None else plan.memory
        entries = renewed(entries, plan)
    if in_order:
        kept = _with_capacity(entries, capacity)
        length = torch.full_like(kept.position[..., 0], entries.position.shape[-1])
    else:
        kept, length = _gathered(entries, plan, capacity)
    faults = torch.zeros_like(length, dtype=torch.int32) if faults is None else faults
    return Slots(entries=kept, length=length, free=length.clone(), faults=faults, memory=memory)


def _gathered(entries: Entries, plan: Plan | None, capacity: int) -> tuple[Entries, Tensor]:
    """Return what `plan` keeps, merged and in token order, in `capacity` slots, and how many hold a token, (B, H)."""
    order, length, columns = _compacted(entries, None if plan is None else plan.keep, capacity)
    keys, values, mass = moved(entries, plan, order, length)
    columns["mass"] = columns["mass"] if mass is None else mass
    return Entries(keys=keys, values=values, **columns), length


def _compacted(entries: Entries, keep: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return who comes into each slot (B, H, C) by age, how many come (B, H), and their columns, by name."""
    if use_triton(entries.keys):
        from kvbench.kernels.settling import compacted

        return compacted(entries.position, entries.kind, entries.mass, entries.noted, keep, capacity)
    position = entries.position if keep is None else entries.position.masked_fill(~keep, EMPTY)
    length = (position >= 0).sum(dim=-1)
    order = oldest_first(position)[..., :capacity]
    order = nn.functional.pad(order, (0, capacity - order.shape[-1]))
    filled = _filled(order, length)
    columns = {
        "position": position.gather(2, order).masked_fill_(~filled, EMPTY),
        "kind": entries.kind.gather(2, order).masked_fill_(~filled, 0),
        "mass": None if entries.mass is None else entries.mass.gather(2, order).masked_fill_(~filled, 0.0),
        "noted": None if entries.noted is None else entries.noted.gather(2, order).masked_fill_(~filled, 0.0),
    }
    return order, length, columns


def _filled(order: Tensor, length: Tensor) -> Tensor:
    return torch.arange(order.shape[-1], device=order.device) < length[..., None]


def renewed(entries: Entries, plan: Plan) -> Entries:
    """Return `entries` with the mass and the values that `plan` says they go on with."""
    values = entries.values if plan.values is None else plan.values.to(entries.values.dtype)
    return replace(entries, values=values, mass=entries.mass if plan.mass is None else plan.mass)


def moved(entries: Entries, plan: Plan | None, order: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values (B, H, C, D) of the entries `order` (B, H, C), merged where the plan says so.

    And the mass (B, H, C) of those that others join, 0 in slots not filled; None where nothing merges or has any.
    """
    mass = None
    wide = order[..., None].expand(*order.shape, entries.keys.shape[-1])
    if plan is not None and plan.merge_into is not None:
        if use_triton(entries.keys):
            from kvbench.kernels.settling import buckets_of, segment_mean

            buckets = buckets_of(plan.merge_into, entries.position, order, length)
            mass = None if entries.mass is None else segment_mean(entries.mass[..., None], buckets, add_up=True)[..., 0]
            weight = plan.merge_weight

            def joined(states: Tensor, is_merged: bool) -> Tensor:
                if not is_merged:
                    return states.gather(2, wide)
                brought = _brought(states, plan.merge_source)
                if weight is None:
                    return segment_mean(brought, buckets)
                return segment_mean(brought.float() * weight[..., None], buckets, add_up=True).to(states.dtype)

            return joined(entries.keys, plan.merge_keys), joined(entries.values, plan.merge_values), mass
        entries = _merged(entries, plan)
        if entries.mass is not None:
            mass = entries.mass.gather(2, order).masked_fill_(~_filled(order, length), 0.0)
    return entries.keys.gather(2, wide), entries.values.gather(2, wide), mass


def _with_capacity(entries: Entries, capacity: int) -> Entries:
    def widen(tensor: Tensor, fill: float) -> Tensor:
        shape = (*tensor.shape[:2], capacity, *tensor.shape[3:])
        wide = tensor.new_empty(shape)
        wide[:, :, : tensor.shape[2]] = tensor
        wide[:, :, tensor.shape[2] :] = fill
        return wide

    return Entries(
        keys=widen(entries.keys, 0),
        values=widen(entries.values, 0),
        position=widen(entries.position, EMPTY),
        kind=widen(entries.kind, 0),
        mass=None if entries.mass is None else widen(entries.mass, 0),
        noted=None if entries.noted is None else widen(entries.noted, 0),
    )


def _brought(states: Tensor, source: Tensor | None) -> Tensor:
    """(B, H, T, D): the states that entries bring into their buckets, their own where `source` is None."""
    return states if source is None else states.gather(2, source[..., None].expand_as(states))


def _merged(entries: Entries, plan: Plan) -> Entries:
    held, into, weight = entries.position >= 0, plan.merge_into, plan.merge_weight
    assert into is not None
    count = torch.zeros_like(into, dtype=torch.float32).scatter_add_(2, into, held.float())
    joined = (count > 1)[..., None]
    wide = into[..., None].expand_as(entries.keys)

    def mean(states: Tensor) -> Tensor:
        total = torch.zeros_like(states, dtype=torch.float32)
        own = _brought(states, plan.merge_source).float()
        brought = own * held[..., None]
        if weight is not None:
            return total.scatter_add_(2, wide, brought * weight[..., None]).to(states.dtype)
        total.scatter_add_(2, wide, brought)
        return torch.where(joined, total / count.clamp(min=1)[..., None], own).to(states.dtype)

    mass = entries.mass
    if mass is not None:
        mass = torch.zeros_like(mass).scatter_add_(2, into, mass * held)
    keys = mean(entries.keys) if plan.merge_keys else entries.keys
    values = mean(entries.values) if plan.merge_values else entries.values
    return replace(entries, keys=keys, values=values, mass=mass)


def only_rows(plan: Plan, rows: Tensor, view: View) -> Plan:
    """Return `plan`, made for `view`, for the rows (B,) bool; in the others every entry stays as it is."""
    if bool(rows.all()):
        return plan
    others, valid = ~rows[:, None, None], view.valid
    own = torch.arange(valid.shape[-1], device=valid.device).expand(valid.shape)

    def chosen(column: Tensor | None, otherwise: Tensor | float) -> Tensor | None:
        return None if column is None else torch.where(others, otherwise, column)

    mass, memory = view.mass_or_none, view.memory_or_none
    return replace(
        plan,
        keep=torch.where(others, valid, plan.keep),
        merge_into=chosen(plan.merge_into, own),
        merge_source=chosen(plan.merge_source, own),
        merge_weight=chosen(plan.merge_weight, 1.0),
        mass=plan.mass if mass is None else chosen(plan.mass, mass),
        memory=plan.memory if memory is None else chosen(plan.memory, memory),
        values=None if plan.values is None else torch.where(others[..., None], view.values, plan.values),
    )


def check_faults(faults: Tensor, policy: Policy, layer: int) -> None:
    """Look at a layer's `Slots.counted_faults` (B, H), which waits for the device.

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
