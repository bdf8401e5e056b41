"""The storage of a layer whose heads hold different numbers: one flat buffer, without slots for what a head lacks.

Each row and head has a start, a length and a number of slots of its own, so bytes follow the sum of the lengths: a
head that keeps little is little. In everything else it is a layer's slots as `kvbench.cache.slots` has them, which is
the case where all heads are alike. Policies read padded copies, made where one is asked and let go after.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from kvbench.cache.selection import oldest_first
from kvbench.cache.slots import EMPTY, Books, Entries, moved, renewed
from kvbench.cache.view import Plan
from kvbench.kernels.dispatch import SlotColumns


@dataclass(kw_only=True, slots=True)
class RaggedSlots(Books):
    """A layer's N slots in one buffer; those of a row and head begin at `start` (B, H).

    flat: keys, values (N, D) and columns (N,). spread (B, H): how many entries more or less than its row's mean a head
    was given. row_slots: slots of a head of each row, beside its spread.
    """

    flat: Entries
    start: Tensor
    spread: Tensor
    row_slots: list[int]
    capacity: int

    @property
    def buffers(self) -> Entries:
        """Keys, values (N, D) and columns (N,)."""
        return self.flat

    def fixed(self) -> list[Tensor]:
        """Return where the heads begin, and their spread."""
        return [self.start, self.spread]

    def _places(self) -> tuple[Tensor, Tensor]:
        """Return (B, H, C) each: where in the buffer a head's slots lie, and whether it has so many."""
        number = torch.arange(self.capacity, device=self.start.device)
        inside = number < self._num_slots()[..., None]
        return (self.start[..., None] + number).clamp(max=self.flat.position.shape[0] - 1), inside

    def _num_slots(self) -> Tensor:
        """(B, H) int64: slots of each head."""
        ends = torch.cat((self.start.flatten()[1:], self.start.new_full((1,), self.flat.position.shape[0])))
        return ends.view_as(self.start) - self.start

    def places(self, slot: Tensor) -> Tensor:
        """(B, H, M): where the slots (B, H, M) of heads lie in the buffer."""
        return self.start[..., None] + slot

    @property
    def position(self) -> Tensor:
        """(B, H, C) int64: what each slot holds, -1 for nothing."""
        places, inside = self._places()
        return torch.where(inside, self.flat.position[places], EMPTY)

    @property
    def entries(self) -> Entries:
        """A padded copy (B, H, C, ...), for reading: what lies in a slot that a head does not have is not defined.

        Of keys and values it is made when they are read, so in time before anything changes.
        """
        places, inside = self._places()
        flat = self.flat
        return Entries(
            keys=cast(Tensor, lambda: flat.keys[places]),
            values=cast(Tensor, lambda: flat.values[places]),
            position=torch.where(inside, flat.position[places], EMPTY),
            kind=flat.kind[places],
            mass=None if flat.mass is None else flat.mass[places] * inside,
            noted=None if flat.noted is None else flat.noted[places] * inside,
        )

    def columns(self) -> SlotColumns:
        """Return the tensors as the kernels take them."""
        flat = self.flat
        return SlotColumns(
            keys=flat.keys,
            values=flat.values,
            position=flat.position,
            kind=flat.kind,
            mass=flat.mass,
            rank=self.rank,
            in_place=self.in_place,
            length=self.length,
            free=self.free,
            faults=self.faults,
            capacity=self.capacity,
            start=self.start,
            spread=self.spread,
        )

    def write(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        """Put one token, (B, H, 1, D), at `position` (B,) into the free slots; its kind is text."""
        at = (self.start + self.free).flatten()
        self.flat.keys.index_copy_(0, at, keys[:, :, 0].flatten(0, 1))
        self.flat.values.index_copy_(0, at, values[:, :, 0].flatten(0, 1))
        self.flat.position.index_copy_(0, at, position[:, None].expand_as(self.free).flatten())
        self.flat.kind.index_fill_(0, at, 0)
        if self.flat.mass is not None:
            self.flat.mass.index_fill_(0, at, 0.0)
        self.length += 1

    def note(self, noted: Tensor) -> None:
        """Put what was noted, (B, H, 1), of a token that is about to come beside its slot."""
        assert self.flat.noted is not None
        self.flat.noted.index_copy_(0, (self.start + self.free).flatten(), noted.flatten())

    def append(
        self, keys: Tensor, values: Tensor, position: Tensor, mass: Tensor | None, noted: Tensor | None = None
    ) -> None:
        """Put N tokens, (B, H, N, D), at `position` (B, N) into fresh slots, as `Slots.append` does."""
        within = self.length[..., None] + torch.arange(position.shape[1], device=position.device)
        at = (self.start[..., None] + within).flatten()
        self.flat.keys.index_copy_(0, at, keys.flatten(0, 2))
        self.flat.values.index_copy_(0, at, values.flatten(0, 2))
        self.flat.position.index_copy_(0, at, position[:, None].expand_as(within).flatten())
        self.flat.kind.index_fill_(0, at, 0)
        if self.flat.mass is not None and mass is not None:
            self.flat.mass.index_copy_(0, at, mass.flatten().to(self.flat.mass.dtype))
        if self.flat.noted is not None and noted is not None:
            self.flat.noted.index_copy_(0, at, noted.flatten())
        if self.rank is not None:
            self.rank.index_copy_(0, at, within.flatten().int())
        self.length += position.shape[1]
        self.advance()

    def release(self, victim: Tensor, over: Tensor) -> None:
        """Free `victim` (B, H), the slot of a head, where `over` (B, H) holds, as `Slots.release` does."""
        victim = self.chosen(victim, over)
        at = (self.start + victim).flatten()
        kept = self.flat.position[at]
        self.flat.position.index_copy_(0, at, torch.where(over.flatten(), EMPTY, kept))
        self.length -= over.long()
        self.free.copy_(torch.where(over, victim, self.length))

    def over(self, budget: Tensor) -> Tensor:
        """(B, H) bool: heads that hold more than their share of `budget` (B,), the mean of a row."""
        return self.length > budget[:, None] + self.spread

    def add_mass(self, received: Tensor) -> None:
        """Add attention (B, H, C) that the slots received."""
        assert self.flat.mass is not None
        places, inside = self._places()
        received = torch.where(inside, received, 0.0).to(self.flat.mass.dtype)
        self.flat.mass.index_add_(0, places.flatten(), received.flatten())

    def has_room(self, held: list[int]) -> bool:
        """Whether the slots suffice where the heads of each row hold `held` entries on average."""
        return all(mean <= slots for mean, slots in zip(held, self.row_slots, strict=True))

    def cut(self, plan: Plan) -> None:
        """Free what `plan` does not keep, in place; every head keeps its slots."""
        cut = settle_ragged(self.entries, plan, self.spread, self.row_slots, self.memory, self.faults)
        self.take(cut)
        if self.rank is not None and cut.rank is not None:
            self.keep_ranks(cut.rank)

    def grow(self, more: int) -> None:
        """Copy into a buffer of so many slots more in each head; only where the final length was not announced."""
        entries, rank = self.entries, self._padded_rank()
        wider = _laid_out(entries, self.spread, [slots + more for slots in self.row_slots], order=None)
        self.flat, self.start, self.capacity = wider.flat, wider.start, wider.capacity
        self.row_slots = wider.row_slots
        if self.rank is not None and rank is not None:
            self.rank = rank.flatten(0, 1)[wider.pair, wider.slot.clamp(max=rank.shape[-1] - 1)]

    def _padded_rank(self) -> Tensor | None:
        return None if self.rank is None else self.rank[self._places()[0]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Entries in one buffer; pair and slot (N,): to which row and head a slot belongs, and the how-manieth it is."""

    flat: Entries
    start: Tensor
    row_slots: list[int]
    capacity: int
    pair: Tensor
    slot: Tensor


def _laid_out(entries: Entries, spread: Tensor, row_slots: list[int], order: Tensor | None) -> _Layout:
    """Return padded `entries` (B, H, T, ...) in one buffer, by `order` (B, H, T') or as they lie."""
    device = spread.device
    slots = torch.tensor(row_slots, dtype=torch.int64, device=device)[:, None] + spread
    ends = slots.flatten().cumsum(dim=0)
    total, capacity = int(ends[-1]), int(slots.max())
    start = ends - slots.flatten()
    pair = torch.repeat_interleave(torch.arange(slots.numel(), device=device), slots.flatten(), output_size=total)
    slot = torch.arange(total, device=device) - start[pair]
    length = (entries.position.shape if order is None else order.shape)[-1]
    source, has = slot.clamp(max=length - 1), slot < length
    if order is not None:
        source = order.flatten(0, 1)[pair, source]
    row, head = pair // spread.shape[1], pair % spread.shape[1]

    def flat(column: Tensor, empty: float) -> Tensor:
        return column[row, head, source].masked_fill_(~has, empty)

    laid = Entries(
        keys=entries.keys[row, head, source],
        values=entries.values[row, head, source],
        position=flat(entries.position, EMPTY),
        kind=flat(entries.kind, 0),
        mass=None if entries.mass is None else flat(entries.mass, 0.0),
        noted=None if entries.noted is None else flat(entries.noted, 0.0),
    )
    start = start.view_as(spread)
    return _Layout(flat=laid, start=start, row_slots=list(row_slots), capacity=capacity, pair=pair, slot=slot)


def spread_of(entries: Entries, plan: Plan | None) -> tuple[Tensor, list[int]]:
    """Return what heads hold beside the mean of their row (B, H), and that mean, rounded up, of each row."""
    kept = ((entries.position >= 0) if plan is None else plan.keep).sum(dim=-1)
    mean = -(-kept.sum(dim=-1) // kept.shape[1])
    return kept - mean[:, None], mean.tolist()


def settle_ragged(
    entries: Entries,
    plan: Plan | None,
    spread: Tensor,
    row_slots: list[int],
    memory: Tensor | None = None,
    faults: Tensor | None = None,
) -> RaggedSlots:
    """Move what `plan` keeps into one fresh buffer in token order, as `settle` does; the old storage is let go.

    spread (B, H) and row_slots say how many slots each head has.
    """
    if plan is not None:
        memory = memory if plan.memory is None else plan.memory
        entries = renewed(entries, plan)
    position = entries.position if plan is None else entries.position.masked_fill(~plan.keep, EMPTY)
    length = (position >= 0).sum(dim=-1)
    order = oldest_first(position)[..., : int(length.max())]
    if plan is not None and plan.merge_into is not None:
        keys, values, mass = moved(entries, plan, order, length)
        kind, noted = entries.kind.gather(2, order), None if entries.noted is None else entries.noted.gather(2, order)
        entries = Entries(
            keys=keys, values=values, position=position.gather(2, order), kind=kind, mass=mass, noted=noted
        )
        laid = _laid_out(entries, spread, row_slots, None)
    else:
        laid = _laid_out(replace(entries, position=position), spread, row_slots, order)
    faults = torch.zeros_like(length, dtype=torch.int32) if faults is None else faults
    return RaggedSlots(
        flat=laid.flat,
        start=laid.start,
        spread=spread,
        row_slots=laid.row_slots,
        capacity=laid.capacity,
        length=length,
        free=length.clone(),
        faults=faults,
        memory=memory,
        rank=laid.slot.int(),
        in_place=torch.full_like(faults, -1),
    )
