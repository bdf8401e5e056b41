"""`PolicyCache`: a transformers cache that really holds only what a policy keeps.

Call `attach(model)` once, then `cache = PolicyCache(model, policy, Budget(fraction=0.2))`, and pass
`**cache_argument(model, cache)` to `model.generate` or to a forward of your own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvbench.cache import artefact
from kvbench.cache.attention import is_attached, listen
from kvbench.cache.counts import CountsShelf, LayerSetup, Ledger, OnPlan, OnSettle, Relay, StepCounts
from kvbench.cache.layer import AnySlots, PolicyLayer
from kvbench.cache.parts import Waiting
from kvbench.cache.policy import UNLIMITED, Budget, Policy, ScorePolicy, check_parts, needs_of, steps_between_cuts
from kvbench.cache.positions import POSITION_MODES, Places, PositionMode, Rotation, rotation_of
from kvbench.cache.released import Pool, departures_of
from kvbench.cache.second_pass import SecondPass
from kvbench.cache.slots import check_faults
from kvbench.cache.view import Needs
from kvbench.errors import ConfigError, ModelSupportError, close_matches


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupancy:
    """What a cache holds now, over all layers, rows and KV heads.

    entries_mean and entries_peak count entries per layer, row and KV head; stored bytes come from
    storages (keys and values), valid bytes from the entries held, statistics bytes from the attention mass
    and what a plan remembers, bookkeeping bytes from positions, kinds, ranks and lengths.
    """

    seen_tokens: float
    entries_mean: float
    entries_peak: int
    stored_bytes: int
    valid_bytes: int
    statistics_bytes: int
    bookkeeping_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheState:
    """A moment of a cache: tensors, the values they had, and the counts of each layer on the host."""

    tensors: list[Tensor]
    values: list[Tensor]
    ledgers: list[Ledger]


@dataclass(frozen=True, kw_only=True)
class StepBuffers:
    """All that decode steps of one cache read and write, layer by layer, and where it lay at first."""

    slots: list[AnySlots]
    counts: list[StepCounts]

    @cached_property
    def _first_places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.tensors()]

    def tensors(self) -> list[Tensor]:
        """Return every tensor, as it is now."""
        found: list[Tensor] = []
        for slots, counts in zip(self.slots, self.counts, strict=True):
            found += [part for part in _parts(slots) if isinstance(part, Tensor)] + counts.tensors()
        return found

    def note_places(self) -> StepBuffers:
        """Remember where everything lies, for `is_where_it_was`; return itself."""
        assert self._first_places
        return self

    @property
    def is_where_it_was(self) -> bool:
        """Whether nothing had to grow, which would put it elsewhere."""
        return self._first_places == [tensor.data_ptr() for tensor in self.tensors()]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(slots.stored_bytes() for slots in self.slots)

    def take(self, other: StepBuffers) -> bool:
        """Copy everything from `other` and return True, if that has the same shapes and shares counts alike."""
        if self._shape() != other._shape() or not all(map(StepCounts.reaches, self.counts, other.counts)):
            return False
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)
        return True

    def _shape(self) -> tuple[object, ...]:
        places = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self.tensors()]
        numbers = [[part for part in _parts(slots) if not isinstance(part, Tensor)] for slots in self.slots]
        has = [[isinstance(part, Tensor) for part in _parts(slots)] for slots in self.slots]
        return places, numbers, has, [[one is other for other in self.counts] for one in self.counts]


def _parts(slots: AnySlots) -> list[object]:
    columns = slots.columns()
    return [*(getattr(columns, field.name) for field in fields(columns)), slots.memory, slots.buffers.noted]


class PolicyCache(Cache):
    """A cache of slots under `policy` and `budget` for one batch of sequences.

    positions: `original`, `in_cache` or `released`. reserve_tokens: tokens that will be generated, so that buffers
    are allocated once; more than that still works, by copying. prompt_tokens: length of the prompt, pads included;
    needed where it comes in pieces (generate's prefill_chunk_size), because a last piece of one token is taken for
    a generated token otherwise. prompt_kind (B, T): kind of each prompt token, pads included; None: text alone.
    question_tokens: how many tokens at the end of each row's prompt are its question and what follows that; 0 where it
    comes as a further chunk, None where it is not known. A policy that reads what is None is told so by a warning.
    row_seeds: one number per sequence,
    for policies that draw. on_settle: entered in every layer, with its device, around what the policy adds to a
    prompt. on_plan: told every plan before it is carried out. future: of each layer, (B, H, P), what a policy that sees
    the future is told about each position of the prompt. Raises: ModelSupportError if `attach(model)` was not
    called.
    """

    takes_unturned = True  # a generated token's keys may come before their rotation, with what is to be done to them

    def __init__(
        self,
        model: Any,
        policy: Policy,
        budget: Budget = UNLIMITED,
        *,
        positions: PositionMode = "original",
        reserve_tokens: int = 0,
        prompt_tokens: int = 0,
        prompt_kind: Tensor | None = None,
        question_tokens: Sequence[int] | None = None,
        row_seeds: Sequence[int] | None = None,
        on_settle: OnSettle = nullcontext,
        on_plan: OnPlan | None = None,
        future: Sequence[Tensor] | None = None,
    ) -> None:
        if not is_attached(model.config):
            raise ModelSupportError("the model does not use kvbench's attention; call kvbench.attach(model) first")
        if positions not in POSITION_MODES:
            raise ConfigError(f"positions is {positions!r}; {close_matches(positions, POSITION_MODES)}")
        check_parts(policy, positions)
        foresees = Needs.FUTURE in needs_of(policy)
        if foresees and future is None:
            raise ConfigError(
                f"{type(policy).__name__} sees the future, which only a task can tell that scores tokens it knows: "
                "perplexity or fidelity; choose another policy"
            )
        _warn_of_unknown(policy, prompt_kind, question_tokens)
        rotation = rotation_of(model.get_decoder(), positions) if positions != "original" else None
        places = Places(rotation=rotation) if rotation is not None and positions == "released" else None
        pool = Pool() if departures_of(policy).pools_layers else None
        allocation = policy.allocation if isinstance(policy, ScorePolicy) else None
        waiting = Waiting() if allocation is not None and allocation.waits else None
        relay = None if type(policy).hand_over is Policy.hand_over else Relay()
        num_layers = model.config.get_text_config().num_hidden_layers
        learnt = artefact.artefact_of(model, policy)
        self.second_pass = SecondPass()
        setups = (
            LayerSetup(
                layer=index,
                num_layers=num_layers,
                policy=policy,
                budget=budget,
                rotation=rotation if places is None else None,
                places=places,
                pool=pool,
                waiting=waiting,
                second_pass=self.second_pass,
                unrotation=unrotation_of(model, [policy]),
                output_weight=output_weight(model, index) if Needs.OUTPUT in needs_of(policy) else None,
                future=future[index] if foresees and future is not None else None,
                artefact=learnt,
                reserve_tokens=reserve_tokens,
                prompt_tokens=prompt_tokens,
                prompt_kind=prompt_kind,
                question_tokens=None if question_tokens is None else tuple(question_tokens),
                relay=relay,
                row_seeds=None if row_seeds is None else tuple(row_seeds),
                on_settle=on_settle,
                on_plan=on_plan,
            )
            for index in range(num_layers)
        )
        shelf = CountsShelf()
        self.policy_layers = [PolicyLayer(setup, shelf) for setup in setups]
        super().__init__(layers=list(self.policy_layers))
        if Needs.HIDDEN in needs_of(policy):
            listen(model, self, self.policy_layers)
        self._own = {"_own", *vars(self)}

    @property
    def steps_announced(self) -> int:
        """Decode steps that the buffers have room for without growing."""
        return min(layer.setup.reserve_tokens - layer.ledger.steps_since_settled for layer in self.policy_layers)

    @property
    def awaits_second_pass(self) -> bool:
        """Whether the prompt lies uncut until `read_again` was called for it."""
        return any(layer.awaits_second_pass for layer in self.policy_layers)

    def expect_prompt(self, num_tokens: int) -> None:
        """Take the next `num_tokens` tokens as part of the prompt, even a single one."""
        for layer in self.policy_layers:
            layer.ledger.prompt_until_tokens = layer.ledger.padded_tokens + num_tokens

    @property
    def takes_answers_whole(self) -> bool:
        """Whether generated tokens may come in one chunk: nothing is freed between two of them."""
        setup = self.policy_layers[0].setup
        return steps_between_cuts(setup.policy) is None and setup.pool is None

    def expect_answer(self, num_tokens: int) -> None:
        """Take the next `num_tokens` tokens as generated ones in one chunk, after which the cache is as after steps.

        Raises: ValueError for a policy that frees entries between them.
        """
        if not self.takes_answers_whole:
            raise ValueError("the policy frees entries at every decode step; feed its tokens one by one")
        for layer in self.policy_layers:
            layer.ledger.answer_until_tokens = layer.ledger.padded_tokens + num_tokens

    def snapshot(self) -> CacheState:
        """Return what a decode step changes, on the device and on the host; keys and values of tokens held stay."""
        tensors = [tensor for layer in self.policy_layers for tensor in layer.state()]
        return CacheState(
            tensors=tensors,
            values=[tensor.clone() for tensor in tensors],
            ledgers=[copy.deepcopy(layer.ledger) for layer in self.policy_layers],
        )

    def restore(self, state: CacheState) -> None:
        """Go back to `state`, in place: what was captured in a graph stays valid."""
        for tensor, value in zip(state.tensors, state.values, strict=True):
            tensor.copy_(value)
        for layer, ledger in zip(self.policy_layers, state.ledgers, strict=True):
            layer.count_on(copy.deepcopy(ledger))

    def step_buffers(self) -> StepBuffers | None:
        """Return all that decode steps read and write; None where that is not all.

        A model may keep something of its own on the cache, and a layer the last queries.
        """
        layers = [(layer.slots, layer.counts) for layer in self.policy_layers]
        held = [(slots, counts) for slots, counts in layers if slots is not None and counts is not None]
        has_ring = any(layer.ring_bytes for layer in self.policy_layers)
        if len(held) < len(layers) or set(vars(self)) != self._own or has_ring:
            return None
        return StepBuffers(slots=[slots for slots, _ in held], counts=[counts for _, counts in held]).note_places()

    def move_into(self, buffers: StepBuffers) -> None:
        """Go on in `buffers`, which took all that this cache holds."""
        for layer, slots, counts in zip(self.policy_layers, buffers.slots, buffers.counts, strict=True):
            layer.move_into(slots, counts)

    def count_replayed_step(self) -> None:
        """Count on the host a step that the device did by itself; layers that stand alike are counted once."""
        first, *others = (layer.ledger for layer in self.policy_layers)
        alike = [ledger == first for ledger in others]
        first.replay()
        for ledger, is_alike in zip(others, alike, strict=True):
            if is_alike:
                ledger.replay_as(first)
            else:
                ledger.replay()

    def cut_blocks(self, *, by_itself: bool | None = None) -> None:
        """Plan every row whose block of generated tokens is full, in all layers.

        by_itself: whether steps do so from now on, as they do at first; a captured step cannot.
        """
        if self.policy_layers[0].ledger.block_tokens == 1:
            return
        for layer in self.policy_layers:
            layer.cuts_blocks = layer.cuts_blocks if by_itself is None else by_itself
            layer.cut_block()

    def decide(self, device: torch.device | None = None) -> None:
        """Let the policy name its victim in every layer, of `device` where given, and apply nothing: its cost alone."""
        for layer in self.policy_layers:
            if device is None or (layer.slots is not None and layer.slots.length.device == device):
                layer.decide()

    def end_rows(self, ended: Sequence[bool]) -> None:
        """Note the rows whose answers have ended: what is chosen in them from now on is no fault. Waits for nothing."""
        for layer in self.policy_layers:
            if layer.slots is not None:
                layer.slots.end_rows(torch.tensor(ended, device=layer.slots.faults.device))

    def check(self) -> None:
        """Look whether every victim so far was a choice; waits for the device.

        Captured steps, and those on a GPU, only note what goes wrong; tasks call this where they read results.
        Raises: NonFiniteChoiceError if one was chosen by NaN, PolicyError if one was a slot without a token.
        """
        held = [(layer.slots.counted_faults, layer.setup) for layer in self.policy_layers if layer.slots is not None]
        if held and bool(torch.stack([faults.to(held[0][0].device) for faults, _ in held]).any()):
            for faults, setup in held:
                check_faults(faults, setup.policy, setup.layer)

    @property
    def devices(self) -> list[torch.device]:
        """Where the layers lie, in their order, each device once; empty before the first token."""
        held = (layer.slots for layer in self.policy_layers if layer.slots is not None)
        return list(dict.fromkeys(slots.length.device for slots in held))

    def occupancy(self, device: torch.device | None = None) -> Occupancy:
        """Return what is held now, by the layers on `device` where given; waits for the device.

        Raises: ValueError before the first token, and for a device without layers.
        """
        found = [layer.slots for layer in self.policy_layers if layer.slots is not None]
        slots = [held for held in found if device is None or held.length.device == device]
        if not slots:
            raise ValueError("the cache is empty; run a prompt first")
        lengths = [s.length.float() for s in slots]
        seen = self.policy_layers[0].ledger.seen
        return Occupancy(
            seen_tokens=sum(seen) / len(seen),
            entries_mean=sum(float(length.mean()) for length in lengths) / len(lengths),
            entries_peak=max(int(length.max()) for length in lengths),
            stored_bytes=sum(s.stored_bytes() for s in slots),
            valid_bytes=sum(int(s.length.sum()) * s.entry_bytes for s in slots),
            statistics_bytes=sum(s.statistics_bytes() for s in slots) + sum(x.ring_bytes for x in self.policy_layers),
            bookkeeping_bytes=sum(s.bookkeeping_bytes() for s in slots),
        )


def _warn_of_unknown(policy: Policy, prompt_kind: Tensor | None, question_tokens: Sequence[int] | None) -> None:
    """Say what a policy reads and was not given: it takes the prompt for one that has none of it."""
    for need, what, given in (
        (Needs.PICTURE, "prompt_kind", prompt_kind),
        (Needs.QUESTION, "question_tokens", question_tokens),
    ):
        if need in needs_of(policy) and given is None:
            warnings.warn(
                f"{type(policy).__name__} reads Needs.{need.name}, but {what} is not given, so the prompt is taken for "
                "one that has none",
                stacklevel=3,
            )


def unrotation_of(model: Any, policies: Sequence[Policy]) -> Rotation | None:
    """Return how `model` rotates queries, where one of the policies reads their moments before it.

    Raises: ModelSupportError for a model whose rotation cannot be taken back.
    """
    readers = [policy for policy in policies if Needs.MOMENTS in needs_of(policy)]
    if not readers:
        return None
    try:
        return rotation_of(model.get_decoder())
    except ModelSupportError as error:
        raise ModelSupportError(
            f"{type(readers[0]).__name__} reads moments of queries before rotation, and {type(model).__name__} does "
            "not rotate by one fixed embedding that could be taken back; choose another policy or model"
        ) from error


def output_weight(model: Any, layer: int) -> Tensor:
    """Return the output projection of a layer's attention as (H, G, D, E), a view of its weight.

    Raises: ModelSupportError where there is none under the usual name.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    module = None if layers is None else getattr(layers[layer], "self_attn", None)
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ModelSupportError(
            f"{type(model).__name__} has no plain weight self_attn.o_proj, which this policy reads; use another one"
        )
    config = model.config.get_text_config()
    heads = config.num_key_value_heads
    plain: Tensor = weight.detach().t().unflatten(0, (heads, config.num_attention_heads // heads, -1))
    return plain
