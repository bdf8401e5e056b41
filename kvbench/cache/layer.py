"""One layer of the cache: takes tokens, attends, and settles at once.

A prompt (or any chunk of several tokens) attends in full, statistics are reduced, the policy plans, and what stays
moves into slots before the next layer runs: only one layer's prompt is ever uncompressed, unless an allocation must
see all layers first. A decode step writes one token into the free slot, attends with it, and frees one victim, or plans
anew once a block of such tokens is full. Where none is ever freed, an answer may come as one chunk too, which leaves
what its tokens would have left one by one. On a GPU each part of a step is one or two kernels that wait for nothing;
elsewhere, and as the reference, plain torch does the same. Which one runs is decided in one place, `use_triton`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvbench.cache.attention import (
    LAYER_TAG,
    ChunkStatistics,
    QueryRing,
    Statistics,
    chunk_attention,
    column_peak,
    decode_step,
    reduce_group,
    ring_after,
)
from kvbench.cache.counts import GROW_TOKENS, CountsShelf, LayerSetup, Ledger, Relay, RowCounts, StepCounts
from kvbench.cache.decisions import decide
from kvbench.cache.parts import Room, checked_told, layer_entries
from kvbench.cache.policy import (
    Policy,
    ScorePolicy,
    When,
    check_statistics,
    checked_joining,
    checked_note,
    checked_plan,
    checked_score,
    checked_victim,
    chooses_plainly,
    is_divided,
    is_ragged,
    keeps_ring,
    keeps_the_most,
    merge_at_decode,
    needs_of,
    plans_safely,
    ranking,
    steps_between_cuts,
    takes_notes,
    with_numbers,
)
from kvbench.cache.positions import shifted_chunk, shifted_step
from kvbench.cache.ragged import RaggedSlots, settle_ragged, spread_of
from kvbench.cache.second_pass import projected_lengths
from kvbench.cache.selection import age_rank
from kvbench.cache.slots import EMPTY, Entries, Slots, check_faults, only_rows, settle
from kvbench.cache.view import Joining, Needs, Plan, ReadOnly, View
from kvbench.errors import ModelSupportError, PolicyError
from kvbench.kernels.dispatch import Chunk, Unturned, interpreted, take_unturned, use_triton

AnySlots = Slots | RaggedSlots
_watched: set[tuple[object, ...]] = set()  # what was asked once in this process, and changed nothing it was shown


@contextmanager
def _watching(view: View, asked: str, key: tuple[object, ...]) -> Iterator[None]:
    """Watch once; what raises is watched again, or the next cell of the process would pass."""
    with ReadOnly(view, asked):
        yield
    _watched.add(key)


class PolicyLayer(CacheLayerMixin):
    """Slots of one layer under one policy; made by `PolicyCache`, whose layers share a shelf of counts.

    cuts_blocks: whether a full block of generated tokens is cut within its step; otherwise by `cut_block`, afterwards.
    """

    slots: AnySlots | None
    counts: StepCounts | None
    cuts_blocks = True

    def __init__(self, setup: LayerSetup, shelf: CountsShelf | None = None) -> None:
        self.setup = setup
        self._needs, self._cuts_every = needs_of(setup.policy), steps_between_cuts(setup.policy)
        self._is_ragged, self._merge = is_ragged(setup.policy), merge_at_decode(setup.policy)
        self._notes, self._plans_safely = takes_notes(setup.policy), plans_safely(setup.policy)
        self._shelf = shelf or CountsShelf()
        self.reset()

    def reset(self) -> None:
        """Forget everything; buffers are let go, and a pass that did not end."""
        self._shelf.clear()
        self.slots = self.counts = None
        self._ring: QueryRing | None = None
        self.arriving: Tensor | None = None
        self._leads = self._decodes = self._appends = False
        self._num_heads = 0
        self._unread: tuple[Entries, Statistics] | None = None
        self._repeated: Tensor | None = None
        self._was_read = False
        self.count_on(
            Ledger(
                policy=self.setup.policy,
                budget=self.setup.budget,
                prompt_tokens=self.setup.prompt_tokens,
                prompt_until_tokens=self.setup.prompt_tokens,
                most_tokens=self.setup.most_tokens,
                counts_as_released=self.setup.departures.counts_as_released,
                block_tokens=self._cuts_every or 1,
                question_tokens=self.setup.question_tokens or (),
            )
        )
        self.is_initialized = False
        if self.setup.pool is not None:
            self.setup.pool.waiting.clear()
        if self.setup.waiting is not None:
            self.setup.waiting.clear()
        if self.setup.relay is not None:
            self.setup.relay.handed = None

    def count_on(self, ledger: Ledger) -> None:
        """Go on with the counts of `ledger`, which the other layers find too."""
        self.ledger = self._shelf.ledgers[self.setup.layer] = ledger

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take new tokens (B, H, Q, D) and hand out what they attend to, tagged with this layer.

        The model passes the very same tensor object on to the attention function, which finds the
        layer by the tag; so no hook, no patch and no global state is needed.
        """
        self.is_initialized = True
        if self.slots is not None and len(self.slots.length) != len(key_states):
            raise ModelSupportError(
                f"the cache holds {len(self.slots.length)} rows, and {len(key_states)} are to follow; make a new "
                "PolicyCache for other rows, or reset() this one"
            )
        unturned = take_unturned(key_states)
        if unturned is not None and not self._turns_by_writing():
            from kvbench.kernels.decode_step import rotate_now

            key_states, unturned = rotate_now(key_states, unturned), None
        if self._unread is not None:
            return self._update_repeated(self._unread[0], key_states, value_states)
        self._decodes = self.slots is not None and self.ledger.is_decode_step(key_states.shape[2])
        self._appends = self.slots is not None and self.ledger.is_answer(key_states.shape[2])
        self.ledger.padded_tokens += key_states.shape[2]
        if self.setup.places is not None and self.slots is not None and self.counts is not None:
            key_states = self.setup.places.arrive(key_states, self.setup.layer, self.slots.length, self.counts.seen)
        if self.slots is None:
            keys, values = key_states, value_states
        elif self._decodes:
            keys, values = self._write(self.slots, key_states, value_states, unturned)
        else:
            stored, in_order = self.slots.entries, self._appends and not self._is_ragged
            held = max(self.ledger.held) if in_order else self.slots.capacity  # the slots behind hold nothing
            keys = torch.cat((stored.keys[:, :, :held], key_states), dim=2)
            values = torch.cat((stored.values[:, :, :held], value_states), dim=2)
        setattr(keys, LAYER_TAG, weakref.ref(self))
        return keys, values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, padding: Tensor | None) -> Tensor:
        """Return the output (B, Hq, Q, D) and settle. `padding` (B, seen) bool is False at pads."""
        asked = query
        if self._unread is not None:
            return self._attend_repeated(self._unread[0], query, keys, values, scaling)
        if self.slots is not None and self.setup.places is not None:
            query = self.setup.places.turned(query)
        if self.slots is not None and self._decodes:
            output, hand_out = self._attend_slots(self.slots, query, scaling)
            if self._ring is not None and self.counts is not None:
                self._ring.put(query, self.counts.seen - 1)
            decide(partial(self._decide, self.slots, hand_out))
            return output
        if self.slots is not None and self._appends:
            return self._attend_answer(self.slots, query, keys, values, scaling)
        arrival = self._shelf.arrival(self.setup, self.ledger, query, padding)
        entries = self.entries_of(keys, values, arrival.position, arrival.kind)
        self.ledger.begin_chunk(list(arrival.counts))
        self.take_notes(entries, self._arrived(), query.shape[2])
        chunk = Chunk(
            query=query,
            keys=keys,
            values=values,
            query_position=arrival.position,
            key_position=entries.position,
            scaling=scaling,
            plain=self.slots is None and min(self.ledger.seen) == query.shape[2],
            left_pads=tuple(query.shape[2] - count for count in arrival.counts),
        )
        chunk = shifted_chunk(chunk, self.setup.rotation)
        output, lse = chunk_attention(chunk, wants_lse=entries.mass is not None)
        self.settle_chunk(entries, ChunkStatistics(chunk, lse, asked))
        return output

    def entries_of(self, keys: Tensor, values: Tensor, position: Tensor, kind: Tensor) -> Entries:
        """Return stored and new tokens together; keys, values (B, H, T, D) hold both, position, kind (B, Q) the new."""
        batch, heads, _, _ = keys.shape
        wide = position[:, None].expand(batch, heads, position.shape[1])
        kind = kind[:, None].expand(wide.shape)
        mass = None
        if Needs.MASS in self._needs:
            dtype = keys.dtype if self.setup.departures.mass_in_model_dtype else torch.float32
            mass = torch.zeros(wide.shape, dtype=dtype, device=keys.device)
        if self.slots is not None:
            stored = self.slots.entries
            wide = torch.cat((stored.position, wide), dim=-1)
            kind = torch.cat((stored.kind, kind), dim=-1)
            mass = None if mass is None or stored.mass is None else torch.cat((stored.mass, mass), dim=-1)
        return Entries(keys=keys, values=values, position=wide, kind=kind, mass=mass)

    def _arrived(self) -> Tensor | None:
        """Return what the attention was given of the tokens that come now, (B, Q, E), where the policy reads it."""
        hidden, self.arriving = self.arriving, None
        if hidden is None and Needs.HIDDEN in self._needs:
            raise ModelSupportError(
                f"{type(self.setup.policy).__name__} reads hidden states, and the model gave layer {self.setup.layer} "
                "none with the cache; use another policy or model"
            )
        return hidden

    def take_notes(self, entries: Entries, hidden: Tensor | None, num_new: int) -> None:
        """Let the policy note a number of each of the last `num_new` entries; hidden (B, Q, E) is of these."""
        if not self._notes:
            return
        new = Entries(
            keys=entries.keys[:, :, -num_new:],
            values=entries.values[:, :, -num_new:],
            position=entries.position[..., -num_new:],
            kind=entries.kind[..., -num_new:],
            mass=None,
        )
        counts = self._shelf.rows(self.setup, self.ledger, entries.keys.device)
        noted = self._note(counts, new, hidden, prefill=True)
        if noted is not None and self.slots is not None and self.slots.entries.noted is not None:
            noted = torch.cat((self.slots.entries.noted, noted), dim=-1)
        entries.noted = noted

    def _note_generated(self, counts: RowCounts, keys: Tensor, values: Tensor) -> Tensor | None:
        """Return (B, H, N), what the policy notes of the last N generated tokens; None for nothing."""
        hidden = self._arrived()
        if not self._notes:
            return None
        position = counts.seen[:, None] - torch.arange(keys.shape[2], 0, -1, device=keys.device)
        wide = position[:, None].expand(keys.shape[:3])
        kind = torch.zeros_like(wide, dtype=torch.int8)
        new = Entries(keys=keys, values=values, position=wide, kind=kind, mass=None)
        return self._note(counts, new, hidden, prefill=False)

    def _note(self, counts: RowCounts, new: Entries, hidden: Tensor | None, *, prefill: bool) -> Tensor | None:
        num_new = new.position.shape[-1]
        view = counts.view(self.setup, new, new_tokens=num_new, prefill=prefill, hidden_or_none=hidden)
        return checked_note(self.setup.policy, view)

    def settle_chunk(self, entries: Entries, statistics: Statistics) -> None:
        """Let the policy plan on a chunk that has attended, and move what stays into slots."""
        if entries.mass is not None:
            entries.mass = (entries.mass + statistics.mass(self.setup.policy.reduction)).to(entries.mass.dtype)
        if keeps_ring(self.setup.policy):
            size = self.setup.policy.window_tokens
            query, position, scaling = statistics.last_queries(size)
            self._ring = ring_after(self._ring, query, position, size, scaling)
        if self.setup.pool is None:
            self._cut(entries, statistics)
            if self.setup.relay is not None and self.setup.layer == self.setup.num_layers - 1:
                self.setup.relay.handed = None
        else:  # when the last layer of the pass has come
            self.setup.pool.arrive(entries, self.setup.num_layers, partial(self._cut, entries, statistics))
        if self.setup.layer == self.setup.num_layers - 1:
            self._shelf.look()

    def _cut(self, entries: Entries, statistics: Statistics) -> None:
        policy, self._num_heads = self.setup.policy, entries.position.shape[1]
        cuts = policy.bounded and When.PREFILL in policy.when
        if cuts and Needs.REPEATED in self._needs and not self._was_read and self.ledger.over():
            self._unread, self._was_read = (entries, statistics), True
            self._repeated = torch.zeros(entries.position.shape, dtype=torch.float32, device=entries.keys.device)
            return
        with self.setup.on_settle(entries.keys.device):
            if cuts and self.setup.relay is not None:
                self._hand_over(self.setup.relay, entries, statistics)
            if cuts and self._is_divided():
                if self.setup.waiting is not None:
                    self._wait(entries, self._view(entries, statistics))
                    return
                rows = range(len(self.ledger.seen))
                self.ledger.divide([self._layer_entries(row)[self.setup.layer] for row in rows])
            plan = self._plan(entries, self._view(entries, statistics)) if cuts and self.ledger.over() else None
            self._settle(entries, plan)

    def _hand_over(self, relay: Relay, entries: Entries, statistics: Statistics) -> None:
        """Let later layers know what the policy tells them, whether this one is cut or not."""
        told = self.setup.policy.hand_over(self._view(entries, statistics))
        relay.handed = relay.handed if told is None else told

    @property
    def awaits_second_pass(self) -> bool:
        """Whether the prompt lies here until it was repeated."""
        return self._unread is not None

    def _update_repeated(self, held: Entries, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Hand out the prompt and the tokens that repeat it, which are not taken in."""
        if self.setup.second_pass is None or self.setup.second_pass.chunk is None:
            raise PolicyError(
                f"{type(self.setup.policy).__name__} has the prompt repeated before it is cut, and other tokens came; "
                "call kvbench.cache.second_pass.read_again(model, cache, tokens) right after the prompt"
            )
        keys = torch.cat((held.keys, key_states), dim=2)
        setattr(keys, LAYER_TAG, weakref.ref(self))
        return keys, torch.cat((held.values, value_states), dim=2)

    def _attend_repeated(self, held: Entries, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Return the output (B, Hq, Q, D) of tokens that repeat a chunk, and note what they looked at of it.

        Shares are of the sinks, the chunk itself and the repeating tokens, as if the prompt were no longer than that.
        """
        policy, second = self.setup.policy, self.setup.second_pass
        assert second is not None
        assert second.chunk is not None
        assert self._repeated is not None
        real = second.chunk.real.to(query.device)
        seen = torch.tensor(self.ledger.seen, dtype=torch.int64, device=query.device)[:, None]
        position = torch.where(real, real.long().cumsum(dim=-1) - 1 + seen, EMPTY)
        new = position[:, None].expand(*held.position.shape[:2], position.shape[1])
        chunk = Chunk(
            query=query,
            keys=keys,
            values=values,
            query_position=position,
            key_position=torch.cat((held.position, new), dim=-1),
            scaling=scaling,
            plain=False,
        )
        output, _ = chunk_attention(chunk, wants_lse=False)
        repeats = (held.position >= second.chunk.start) & (held.position < second.chunk.end)
        sinks = (held.position >= 0) & (held.position < getattr(policy, "num_sinks", 0))
        told = held.position.masked_fill(~(repeats | sinks), EMPTY)
        chunk, by, hidden = replace(chunk, key_position=torch.cat((told, new), dim=-1)), None, self._arrived()
        if hidden is not None and self.setup.output_weight is not None and policy.repeated_as == "output":
            by = 1.0 / hidden.float().norm(dim=-1), projected_lengths(values, self.setup.output_weight)
        peak = column_peak(chunk, *(by or ()))[..., : chunk.stored]
        torch.where(repeats, peak, self._repeated, out=self._repeated)
        return output

    def cut_repeated(self) -> None:
        """Cut the prompt that was repeated."""
        if self._unread is not None:
            (entries, statistics), self._unread = self._unread, None
            self._cut(entries, statistics)
            self._shelf.look()
            self._repeated = None

    def _is_divided(self) -> bool:
        """Whether some row exceeds its budget, and layers are not all given the same."""
        exceeds = (seen > most for seen, most in zip(self.ledger.seen, self.ledger.uniform(), strict=True))
        return is_divided(self.setup.policy) and any(exceeds)

    def _layer_entries(self, row: int, told: Sequence[Tensor] = ()) -> Sequence[int]:
        """Return the entries of all layers in a row, per KV head."""
        policy, uniform, seen = self.setup.policy, self.ledger.uniform()[row], self.ledger.seen[row]
        assert isinstance(policy, ScorePolicy)
        if seen <= uniform:
            return [uniform] * self.setup.num_layers
        protected = min(policy.smallest_budget_tokens, uniform)
        room = Room(
            num_layers=self.setup.num_layers,
            num_heads=self._num_heads,
            budget=uniform,
            tokens=seen,
            protected=protected,
            artefact=None if self.setup.artefact is None else self.setup.artefact.layers,
        )
        held = [self.ledger.before_cut(row, self._shelf.ledgers[layer]) for layer in range(self.setup.num_layers)]
        return layer_entries(policy.allocation, policy.skip_layers, room, told, held)

    def _wait(self, entries: Entries, view: View) -> None:
        """Hand in what the allocation asks of this layer; it is cut when the last layer has come."""
        policy, waiting = self.setup.policy, self.setup.waiting
        assert isinstance(policy, ScorePolicy)
        assert policy.allocation is not None
        assert waiting is not None
        check_statistics(view)
        with self._reading(view, "tell"):
            told = checked_told(policy.allocation, view, ranking(policy, view))

        def cut(given: list[int]) -> None:
            self.ledger.divide(given)
            budget = torch.tensor(self.ledger.allowed(), dtype=torch.int64, device=view.budget.device)
            with self.setup.on_settle(entries.keys.device):  # the last layer's may be another one
                self._settle(entries, self._plan(entries, replace(view, budget=budget)) if self.ledger.over() else None)

        waiting.arrive(told, self.setup.num_layers, cut, self._layer_entries)

    def _reading(self, view: View, asked: str) -> AbstractContextManager[object]:
        """Watch what a policy and its parts write, the first time that they are `asked` for something."""
        policy = self.setup.policy
        key = (asked, type(policy), *(type(getattr(policy, part, None)) for part in ("allocation", "merge")))
        if key in _watched or (interpreted() and use_triton(view.keys)):  # the interpreter copies to and fro
            return nullcontext()
        return _watching(view, f"{type(policy).__name__}.{asked}", key)

    def _plan(self, entries: Entries, view: View) -> Plan:
        check_statistics(view)
        if view.doubts is not None and not keeps_the_most(self.setup.policy):
            view = with_numbers(view)
        try:
            with self._reading(view, "plan"):
                plan = checked_plan(self.setup.policy, view, self.ledger.allowed())
        except PolicyError:
            self._shelf.doubts.look()  # what went wrong in an earlier layer is told first
            raise
        if self.setup.on_plan is not None:
            self.setup.on_plan(self.setup.layer, entries, plan)
        return plan

    def _view(self, entries: Entries, statistics: Statistics) -> View:
        policy, needs = self.setup.policy, self._needs
        given: dict[str, Any] = {}
        if Needs.WINDOW in needs:
            given["window_or_none"] = statistics.last_rows(policy.window_tokens, policy.reduction)
        if Needs.PROBS in needs:
            given["probs_or_none"] = statistics.last_rows(1, policy.reduction)[:, :, 0]
        if Needs.HEAD_ROWS in needs:
            given["head_rows_or_none"] = statistics.head_rows(policy.window_tokens)
        if self.setup.future is not None:
            known = entries.position.clamp(min=0, max=self.setup.future.shape[-1] - 1)
            given["future_or_none"] = self.setup.future.gather(-1, known).masked_fill(entries.position < 0, 0.0)
        if self.setup.unrotation is not None:
            mean, covariance = statistics.moments(self.setup.unrotation, policy.moments_from)
            given |= {"query_mean_or_none": mean, "query_covariance_or_none": covariance}
            given["rotation_or_none"] = self.setup.unrotation
        if self.setup.relay is not None and self.setup.relay.handed is not None:
            given["handed"] = self.setup.relay.handed.to(entries.keys.device)
        given["repeated_or_none"] = self._repeated
        stored, memory = (0, None) if self.slots is None else (self.slots.capacity, self.slots.memory)
        return self._shelf.rows(self.setup, self.ledger, entries.keys.device).view(
            self.setup,
            entries,
            new_tokens=entries.position.shape[-1] - stored,
            prefill=True,
            memory_or_none=memory,
            doubts=self._shelf.doubts if self._plans_safely else None,
            **given,
        )

    def _settle(self, entries: Entries, plan: Plan | None) -> None:
        memory, faults = (None, None) if self.slots is None else (self.slots.memory, self.slots.faults)
        memory = self._blank_memory(entries) if memory is None else memory
        self.slots = None
        if self._is_ragged:
            spread, means = spread_of(entries, plan)
            self.ledger.settle(means)
            final = self.ledger.allowed(ahead_tokens=self.setup.reserve_tokens)
            row_slots = [max(pair) + self.ledger.block_tokens for pair in zip(means, final, strict=True)]
            self.slots = settle_ragged(entries, plan, spread, row_slots, memory, faults)
            if self.setup.rotation is None:
                self.slots.rank = self.slots.in_place = None
            self.counts, self._leads = self._shelf.take(self.setup, self.ledger, self.slots.length.device)
            return
        held = self.ledger.held
        if plan is not None:
            held = [min(pair) for pair in zip(held, self.ledger.allowed(), strict=True)]
        if not keeps_the_most(self.setup.policy):
            kept = None if plan is None else plan.keep.sum(dim=-1).amax(dim=1)
            if self._plans_safely:
                self._shelf.count_later(self.ledger, kept, self._count_again)
            elif kept is not None:
                held = kept.tolist()
        self.ledger.settle(held)
        in_order = plan is None and faults is None and min(held) == entries.position.shape[-1]
        self.slots = settle(entries, plan, self._capacity(), memory, faults, in_order=in_order)
        if self.setup.rotation is not None and use_triton(self.slots.entries.keys):
            self.slots.keep_ranks(age_rank(self.slots.entries.position).int())
            if plan is None and faults is None:  # nobody has gone
                self.slots.in_place = self.slots.length.int()
        self.counts, self._leads = self._shelf.take(self.setup, self.ledger, self.slots.length.device)

    def _capacity(self) -> int:
        """Return the slots that suffice for what is held now and for all steps that were announced."""
        final = self.ledger.allowed(ahead_tokens=self.setup.reserve_tokens)
        return max(*self.ledger.held, *final) + self.ledger.block_tokens

    def _count_again(self) -> None:
        """Go on from a ledger that was put right after this layer had settled."""
        assert isinstance(self.slots, Slots)
        self.slots.shrink(self._capacity())
        self.counts, self._leads = self._shelf.take(self.setup, self.ledger, self.slots.length.device)

    def _blank_memory(self, entries: Entries) -> Tensor | None:
        """Return (B, H, N), what a merge remembers before it did anything; None where it remembers nothing."""
        merge = self.setup.policy.merge if isinstance(self.setup.policy, ScorePolicy) else None
        if merge is None or not merge.remembers:
            return None
        shape = (*entries.position.shape[:2], merge.remembers)
        return torch.full(shape, torch.nan, device=entries.position.device)

    def _turns_by_writing(self) -> bool:
        """Whether one token's keys may come without their rotation: nobody looks at them before they are written."""
        looks = self._notes or self.setup.places is not None
        return self.slots is not None and self._unread is None and not looks and self.ledger.is_decode_step(1)

    def _write(
        self, slots: AnySlots, keys: Tensor, values: Tensor, unturned: Unturned | None = None
    ) -> tuple[Tensor, Tensor]:
        """Put the new token (B, H, 1, D) into the free slots; return the buffers of all keys and values.

        Of a ragged layer, whose buffer has another shape, the new token's own: attention finds the slots by the layer.
        """
        assert self.counts is not None
        if self._leads:
            self.counts.advance(self.ledger)
        self.ledger.arrive([1] * keys.shape[0])
        if not slots.has_room(self.ledger.held):
            slots.grow(GROW_TOKENS)
        noted = self._note_generated(self.counts, keys, values)
        if noted is not None:
            slots.note(noted)
        if use_triton(keys):
            from kvbench.kernels.slot_writes import write_slot

            write_slot(
                slots.columns(), keys, values, self.counts.seen, advance=self._cuts_every != 1, unturned=unturned
            )
        else:
            slots.write(keys, values, self.counts.seen - 1)
        return (keys, values) if isinstance(slots, RaggedSlots) else (slots.entries.keys, slots.entries.values)

    def _attend_answer(self, slots: AnySlots, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Return the output of generated tokens, (B, Hq, Q, D), none of which frees a victim, and take them in.

        keys, values (B, H, T, D): what is held, and the new ones. Nothing leaves between two of the tokens, so a causal
        mask shows each what it would have seen alone, and ranks in the cache are those of the end.
        """
        assert self.counts is not None
        new, held = query.shape[2], keys.shape[2] - query.shape[2]
        if self._leads:
            self.counts.advance(self.ledger, new)
        self.ledger.arrive([new] * query.shape[0])
        position = self.counts.seen[:, None] - torch.arange(new, 0, -1, device=query.device)
        stored = slots.position[..., :held]
        chunk = Chunk(
            query=query,
            keys=keys,
            values=values,
            query_position=position,
            key_position=torch.cat((stored, position[:, None].expand(*stored.shape[:2], new)), dim=-1),
            scaling=scaling,
            plain=False,
        )
        chunk = shifted_chunk(chunk, self.setup.rotation)
        output, lse = chunk_attention(chunk, wants_lse=Needs.MASS in self._needs)
        mass = None
        if Needs.MASS in self._needs:
            mass = ChunkStatistics(chunk, lse).mass(self.setup.policy.reduction)
            slots.add_mass(mass[..., :held])
        if not slots.has_room(self.ledger.held):
            slots.grow(new + GROW_TOKENS)
        keys, values = keys[:, :, held:], values[:, :, held:]
        noted = self._note_generated(self.counts, keys, values)
        slots.append(keys, values, position, None if mass is None else mass[..., held:], noted)
        return output

    def _decide(self, slots: AnySlots, hand_out: Callable[[], Tensor | None]) -> None:
        """End the step of this layer, or with the last one's of all where a policy pools them."""
        end = partial(self._end_step, slots, hand_out())
        if self.setup.pool is None:
            end()
        else:
            self.setup.pool.arrive(slots.entries, self.setup.num_layers, end)

    def _attend_slots(
        self, slots: AnySlots, query: Tensor, scaling: float
    ) -> tuple[Tensor, Callable[[], Tensor | None]]:
        """Return output (B, Hq, 1, D), and what gives the probabilities (B, H, C) that a policy asks for, and mass."""
        if use_triton(query):
            return self._attend_by_kernel(slots, query, scaling)
        policy, entries = self.setup.policy, slots.entries
        query, keys = shifted_step(query, entries.keys, entries.position, self.setup.rotation)
        output, rows = decode_step(query, keys, entries.values, entries.position >= 0, scaling)
        probs = reduce_group(rows, policy.reduction) if self._needs & (Needs.MASS | Needs.PROBS) else None
        if entries.mass is not None and probs is not None:
            slots.add_mass(probs)
        return output, lambda: probs

    def _attend_by_kernel(
        self, slots: AnySlots, query: Tensor, scaling: float
    ) -> tuple[Tensor, Callable[[], Tensor | None]]:
        from kvbench.kernels.decode_attention import Ragged, Turn, decode_attention

        turn, ragged, counts, policy, entries = None, None, self.counts, self.setup.policy, slots.columns()
        if entries.start is not None:
            ragged = Ragged(entries.start, entries.capacity)
        if self.setup.rotation is not None and entries.rank is not None and counts is not None:
            rank, in_place, tables = entries.rank, entries.in_place, counts.turn_tables(self.setup.rotation)
            assert in_place is not None
            turn = Turn(counts.seen, entries.position, rank, in_place, *tables)
        coarse = entries.mass is not None and self.setup.departures.mass_in_model_dtype  # the kernel sums float32 only
        output, hand_out = decode_attention(
            query,
            entries.keys,
            entries.values,
            slots.length,
            scaling,
            reduction=policy.reduction,
            mass=None if coarse else entries.mass,
            want_probs=coarse or Needs.PROBS in self._needs,
            turn=turn,
            ragged=ragged,
        )
        if not coarse:
            return output, hand_out

        def add() -> Tensor | None:
            probs = hand_out()
            if probs is not None:
                slots.add_mass(probs)
            return probs

        return output, add

    def _end_step(self, slots: AnySlots, probs: Tensor | None) -> None:
        """Free what is over the budget, or take a fresh slot next; the ledger counts it on the host."""
        by_kernels = use_triton(slots.columns().keys)
        may_ask_host = slots.length.device.type == "cpu" and not by_kernels
        if self._cuts_every != 1:
            if not by_kernels:  # the kernel of `_write` did it already
                slots.advance()
        elif may_ask_host and not self.ledger.over():
            slots.advance()
        else:
            self._evict(slots, probs if Needs.PROBS in self._needs else None, by_kernels)
        self.ledger.evicted()
        if self.cuts_blocks and self.ledger.block_tokens > 1:
            self.cut_block()

    def cut_block(self) -> None:
        """Plan the rows whose block of generated tokens is full, and free in place what they lose."""
        due, slots = self.ledger.due(), self.slots
        if slots is None or not any(due):
            return
        counts = RowCounts(self.setup, self.ledger, slots.length.device)
        entries, new_tokens = slots.entries, self.ledger.block_tokens
        view = counts.view(self.setup, entries, new_tokens=new_tokens, **self._block_statistics(slots, entries))
        plan = only_rows(self._plan(entries, view), torch.tensor(due, device=slots.length.device), view)
        slots.cut(plan)
        self.ledger.cut_block()

    def _block_statistics(self, slots: AnySlots, entries: Entries) -> dict[str, Any]:
        """Return what the view of a block has beside the entries, by field."""
        given: dict[str, Any] = {"memory_or_none": slots.memory}
        if isinstance(slots, RaggedSlots):
            given["spread_or_none"] = slots.spread
        if self._ring is not None:
            rows = self._ring.rows(entries.keys, entries.position)
            if Needs.WINDOW in self._needs:
                given["window_or_none"] = reduce_group(rows, self.setup.policy.reduction)
            if Needs.HEAD_ROWS in self._needs:
                given["head_rows_or_none"] = rows
        return given

    def _evict(self, slots: AnySlots, probs: Tensor | None, by_kernels: bool) -> None:
        """Free one victim of every row and head that is over its budget."""
        assert self.counts is not None
        policy = self.setup.policy
        view = self.counts.view(self.setup, slots.entries, probs_or_none=probs, memory_or_none=slots.memory)
        if by_kernels and self._merge is None and _is_plain_score(policy):
            from kvbench.kernels.slot_writes import free_lowest

            with self._reading(view, "score"):
                score = checked_score(policy, view)
            free_lowest(slots.columns(), score, view.budget, self.counts.sinks, self.counts.recent_from)
            return
        with self._reading(view, "victim"):
            victim = checked_victim(policy, view)
            joining = None if self._merge is None else self._joining(view, victim)
        if joining is not None:
            slots.join(*joining, slots.over(view.budget))
        if by_kernels:
            from kvbench.kernels.slot_writes import free_given

            free_given(slots.columns(), victim, view.budget)
            return
        slots.release(victim, slots.over(view.budget))
        if victim.device.type == "cpu":  # elsewhere looking would wait for the device at every step
            check_faults(slots.counted_faults, policy, self.setup.layer)

    def _joining(self, view: View, victim: Tensor) -> tuple[Joining, Tensor]:
        """Return what the victim (B, H) leaves in others, and the victim, slot 0 in place of one that is none."""
        assert self._merge is not None
        victim = torch.where((victim < 0) | (victim >= view.position.shape[-1]), 0, victim)
        return checked_joining(self._merge, view, victim), victim

    def decide(self) -> Tensor | None:
        """Return the victim (B, H) that the policy would free now, found the way a step does; nothing is freed.

        None for a policy that does not free one at each step; one that frees them in blocks makes its plan.
        """
        policy, slots, counts = self.setup.policy, self.slots, self.counts
        if slots is None or counts is None or self._cuts_every is None:
            return None
        if self._cuts_every > 1:
            rows = RowCounts(self.setup, self.ledger, slots.length.device)
            entries = slots.entries
            policy.plan(rows.view(self.setup, entries, **self._block_statistics(slots, entries)))
            return None
        probs = torch.zeros_like(slots.position, dtype=torch.float32) if Needs.PROBS in self._needs else None
        view = counts.view(self.setup, slots.entries, probs_or_none=probs, memory_or_none=slots.memory)
        if self._merge is not None:
            victim = policy.victim(view)
            self._joining(view, victim)
            return victim
        if not (use_triton(slots.columns().keys) and _is_plain_score(policy)):
            return policy.victim(view)
        from kvbench.kernels.slot_writes import lowest_slot

        score = checked_score(policy, view)
        return lowest_slot(slots.columns(), score, view.budget, counts.sinks, counts.recent_from)

    def state(self) -> list[Tensor]:
        """Return the tensors that a decode step changes in place, keys and values only where entries join others."""
        assert self.slots is not None
        assert self.counts is not None
        shared = self.counts.state() if self._leads else []
        joined: list[Tensor] = []
        if self._merge is not None:
            memory = self.slots.memory
            joined = [self.slots.buffers.keys, self.slots.buffers.values, *([] if memory is None else [memory])]
        return [*self.slots.state(), *shared, *joined, *([] if self._ring is None else self._ring.state())]

    @property
    def ring_bytes(self) -> int:
        """Bytes of the last queries, where they are kept."""
        return 0 if self._ring is None else self._ring.stored_bytes()

    def move_into(self, slots: AnySlots, counts: StepCounts) -> None:
        """Go on in buffers of the same shapes, into which all that this layer holds was copied."""
        assert self.counts is not None
        counts.follow(self.counts)
        slots.ended = None
        if isinstance(slots, RaggedSlots) and isinstance(self.slots, RaggedSlots):
            slots.row_slots = self.slots.row_slots
        self.slots, self.counts = slots, counts

    @property
    def keys(self) -> Tensor | None:
        """The buffer (B, H, C, D), None before the first token."""
        return self.slots.entries.keys if self.slots else None

    @property
    def values(self) -> Tensor | None:
        """The buffer (B, H, C, D), None before the first token."""
        return self.slots.entries.values if self.slots else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate nothing: how much stays is known only after the first plan."""
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return tokens seen (pads included), not entries held: positions are derived from it."""
        return self.ledger.padded_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of the padding mask, over everything seen, and its offset."""
        return self.ledger.padded_tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no largest length."""
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.23

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse: rows are counted on the host, and beams would need their own counts."""
        raise ModelSupportError("kvbench caches do not support beam search (reorder_cache); use num_beams=1")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what a policy evicted for tokens that are taken back is gone."""
        raise ModelSupportError(
            f"kvbench caches do not support crop({tokens_to_remove}): what was evicted for tokens that are taken back "
            "is gone; generate without assisted decoding (assistant_model, prompt_lookup_num_tokens)"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: rows are counted on the host."""
        raise ModelSupportError(
            f"kvbench caches do not support batch_repeat_interleave({repeats}); repeat the rows of the prompt instead, "
            "as generate does for num_return_sequences"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: rows are counted on the host."""
        raise ModelSupportError(
            "kvbench caches do not support batch_select_indices; run all rows of the prompt to the end, or start a "
            "new PolicyCache with the rows that go on"
        )


def _is_plain_score(policy: Policy) -> TypeGuard[ScorePolicy]:
    """Whether the kernel that frees the lowest score does what the policy's own `victim` would."""
    return isinstance(policy, ScorePolicy) and chooses_plainly(policy)
