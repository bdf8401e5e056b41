"""One layer of the cache: takes tokens, attends, and settles at once.

A prompt (or any chunk of several tokens) attends in full, statistics are reduced, the policy plans,
and what stays moves into slots before the next layer runs: only one layer's prompt is ever
uncompressed. A decode step writes one token, attends with it, and frees one victim.

One decode step over a layer's slots: write the token, attend, free a victim.

On a GPU each part is one or two kernels that wait for nothing; elsewhere, and as the reference, plain
torch does the same. Which one runs is decided in one place, `use_triton`.

One cut for the whole model: layers wait until the attention mass of all of them is averaged.

Some code scores a token by its mean over every head of every layer and evicts it everywhere. A layer
of such a policy does not cut at once: it hands in its mass, and when the last layer of the pass has
come, all get the mean and cut in turn. Until then the prompt of every layer lies uncompressed, as in
that code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvbench.cache.counts import GROW_TOKENS, CountsShelf, Ledger, StepCounts
from kvbench.cache.policy import Needs, Plan, Policy, ScorePolicy, View, When
from kvbench.cache.positions import shifted_chunk, shifted_step
from kvbench.cache.selection import age_rank
from kvbench.cache.setup import LayerSetup, view_of
from kvbench.cache.slots import (
    NAN_SCORE,
    Entries,
    Slots,
    check_plan,
    check_statistics,
    columns_of,
    new_positions,
    real_tokens,
    settle,
)
from kvbench.cache.statistics import Chunk, ChunkStatistics, Statistics, chunk_attention, decode_step, reduce_group
from kvbench.errors import ModelSupportError, NonFiniteChoiceError, PolicyError
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
            check_faults(slots.counted_faults, policy, setup.layer)
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


@dataclass(kw_only=True, slots=True)
class Pool:
    """The layers of one cache that have come in this pass, with what each does next."""

    waiting: list[tuple[Entries, Callable[[], None]]] = field(default_factory=list)

    def arrive(self, entries: Entries, num_layers: int, cut: Callable[[], None]) -> None:
        """Hand in the mass of a layer; the last one of `num_layers` sets the mean in all and lets them cut.

        Slots of the layers agree, because all of them evict the same tokens.
        """
        self.waiting.append((entries, cut))
        if len(self.waiting) < num_layers:
            return
        waiting, self.waiting = self.waiting, []
        mean = _mean_mass([layer for layer, _ in waiting])
        for layer, cut_layer in waiting:
            assert layer.mass is not None
            layer.mass.copy_(mean)  # in place: a captured step finds it at the same address
            cut_layer()

    def clear(self) -> None:
        """Forget a pass that did not end."""
        self.waiting = []


def cut_when_pooled(pool: Pool | None, entries: Entries, num_layers: int, cut: Callable[[], None]) -> None:
    """Cut at once where there is no pool, else when the last layer of the pass has come."""
    if pool is None:
        cut()
    else:
        pool.arrive(entries, num_layers, cut)


def _mean_mass(layers: list[Entries]) -> Tensor:
    """(B, H, T): the mean over layers and heads, the same for each head."""
    masses = torch.stack([layer.mass for layer in layers if layer.mass is not None])
    return masses.mean(dim=(0, 2)).unsqueeze(1).expand(masses.shape[1:])


LAYER_TAG = "kvbench_layer"


class PolicyLayer(CacheLayerMixin):
    """Slots of one layer under one policy; made by `PolicyCache`, whose layers share a shelf of counts."""

    def __init__(self, setup: LayerSetup, shelf: CountsShelf | None = None) -> None:
        self.setup = setup
        self._shelf = shelf or CountsShelf()
        self.reset()

    def reset(self) -> None:
        """Forget everything; buffers are let go."""
        self._shelf.clear()
        self.slots: Slots | None = None
        self.counts: StepCounts | None = None
        self._leads = False
        self._decodes = False
        self.ledger = Ledger(
            policy=self.setup.policy,
            budget=self.setup.budget,
            prompt_tokens=self.setup.prompt_tokens,
            prompt_until_tokens=self.setup.prompt_tokens,
            most_tokens=self.setup.most_tokens,
        )
        self.is_initialized = False
        if self.setup.pool is not None:
            self.setup.pool.clear()

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

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take new tokens (B, H, Q, D) and hand out what they attend to, tagged with this layer.

        The model passes the very same tensor object on to the attention function, which finds the
        layer by the tag; so no hook, no patch and no global state is needed.
        """
        self.is_initialized = True
        self._decodes = self.slots is not None and self.ledger.is_decode_step(key_states.shape[2])
        self.ledger.padded_tokens += key_states.shape[2]
        if self.setup.places is not None and self.slots is not None and self.counts is not None:
            key_states = self.setup.places.arrive(key_states, self.setup.layer, self.slots.length, self.counts.seen)
        if self.slots is None:
            keys, values = key_states, value_states
        elif self._decodes:
            keys, values = self._write(self.slots, key_states, value_states)
        else:
            keys = torch.cat((self.slots.entries.keys, key_states), dim=2)
            values = torch.cat((self.slots.entries.values, value_states), dim=2)
        setattr(keys, LAYER_TAG, weakref.ref(self))
        return keys, values

    def _write(self, slots: Slots, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        counts = self.counts
        assert counts is not None
        if self._leads:
            counts.advance(self.ledger)
        self.ledger.arrive([1] * keys.shape[0])
        if max(self.ledger.held) > slots.capacity:
            slots.grow(slots.capacity + GROW_TOKENS)
        write_token(slots, keys, values, self.setup, counts)
        return slots.entries.keys, slots.entries.values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, padding: Tensor | None) -> Tensor:
        """Return the output (B, Hq, Q, D) and settle. `padding` (B, seen) bool is False at pads."""
        if self.slots is not None and self.setup.places is not None:
            query = self.setup.places.turned(query)
        if self.slots is not None and self._decodes:
            return self._decode(self.slots, query, scaling)
        real = real_tokens(query, padding, seen=self.ledger.seen)
        position = new_positions(real, self.ledger.seen)
        entries = columns_of(keys, values, position, self.slots, self.setup.policy, self.setup.prompt_kind)
        self.ledger.begin_chunk(real.sum(dim=-1).tolist())
        chunk = Chunk(
            query=query,
            keys=keys,
            values=values,
            query_position=position,
            key_position=entries.position,
            scaling=scaling,
            plain=self.slots is None and min(self.ledger.seen) == query.shape[2],
        )
        chunk = shifted_chunk(chunk, self.setup.rotation)
        output, lse = chunk_attention(chunk, wants_lse=entries.mass is not None)
        self.settle_chunk(entries, ChunkStatistics(chunk, lse))
        return output

    def settle_chunk(self, entries: Entries, statistics: Statistics) -> None:
        """Let the policy plan on a chunk that has attended, and move what stays into slots."""
        if entries.mass is not None:
            entries.mass = (entries.mass + statistics.mass(self.setup.policy.reduction)).to(entries.mass.dtype)
        cut_when_pooled(self.setup.pool, entries, self.setup.num_layers, partial(self._cut, entries, statistics))

    def _cut(self, entries: Entries, statistics: Statistics) -> None:
        policy, plan = self.setup.policy, None
        with self.setup.on_settle():
            if policy.bounded and When.PREFILL in policy.when and self.ledger.over():
                view = self._chunk_view(entries, statistics)
                check_statistics(view)
                plan = policy.plan(view)
                check_plan(plan, entries, self.ledger.allowed(), policy, self.setup.layer)
                if plan is not None and self.setup.on_plan is not None:
                    self.setup.on_plan(self.setup.layer, entries, plan)
            self._settle(entries, plan)

    def _chunk_view(self, entries: Entries, statistics: Statistics) -> View:
        policy = self.setup.policy
        window = probs = None
        if Needs.WINDOW in policy.needs:
            window = statistics.last_rows(policy.window_tokens, policy.reduction)
        if Needs.PROBS in policy.needs:
            probs = statistics.last_rows(1, policy.reduction)[:, :, 0]
        return view_of(
            self.setup,
            self.ledger,
            entries,
            new_tokens=statistics.new_tokens,
            window=window,
            probs=probs,
            memory=None if self.slots is None else self.slots.memory,
        )

    def _settle(self, entries: Entries, plan: Plan | None) -> None:
        memory, faults = (None, None) if self.slots is None else (self.slots.memory, self.slots.faults)
        self.slots = None
        held = self.ledger.held
        if plan is not None:
            held = plan.keep.sum(dim=-1).amax(dim=1).tolist()
        self.ledger.settle(held)
        final = self.ledger.allowed(ahead_tokens=self.setup.reserve_tokens)
        self.slots = settle(entries, plan, max(*held, *final) + 1, memory, faults)
        if self.setup.rotation is not None and use_triton(self.slots.entries.keys):
            self.slots.rank = age_rank(self.slots.entries.position).int()
        self.counts, self._leads = self._shelf.take(self.setup, self.ledger, self.slots.length.device)

    def _decode(self, slots: Slots, query: Tensor, scaling: float) -> Tensor:
        """Attend to the slots, the new token among them, then free one victim per row and head."""
        assert self.counts is not None
        output, probs = attend_slots(slots, query, scaling, self.setup, self.counts)
        end = partial(end_step, slots, probs, self.setup, self.counts, self.ledger)
        cut_when_pooled(self.setup.pool, slots.entries, self.setup.num_layers, end)
        return output

    def state(self) -> list[Tensor]:
        """Return the tensors that a decode step changes in place, keys and values excepted."""
        assert self.slots is not None
        assert self.counts is not None
        return self.slots.state() + (self.counts.state() if self._leads else [])

    def decide(self) -> Tensor | None:
        """Return the victim (B, H) that the policy would free now, None for one that frees nothing at decode."""
        if self.slots is None or self.counts is None or not evicts_at_decode(self.setup.policy):
            return None
        return decide(self.slots, self.setup, self.counts)
