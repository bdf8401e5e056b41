"""What a layer of a cache is told once, and its counts per row: tokens seen, entries held, entries allowed.

On the host (`Ledger`) they follow from the lengths of what went in, so deciding whether a step is over budget never
waits for the device. On the device (`StepCounts`) they are what a decode step reads, so that no step waits for the
host either: how many entries a row may hold follows from how many tokens it has seen, which is known in advance, so a
table holds the budget of every step to come. Layers with equal counts share one `StepCounts`; the first of them moves
it forward, and everything after reads it. A captured step does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from kvbench.cache.artefact import Artefact
from kvbench.cache.parts import Waiting
from kvbench.cache.policy import Budget, Policy, ScorePolicy, When, checked_range, needs_of, steps_between_cuts
from kvbench.cache.positions import Places, Rotation
from kvbench.cache.released import Departures, Pool, departures_of, entries_as_released
from kvbench.cache.second_pass import SecondPass
from kvbench.cache.slots import EMPTY, Entries
from kvbench.cache.view import Doubts, Kind, Needs, Plan, View, unread
from kvbench.errors import ModelSupportError

GROW_TOKENS = 64
OnPlan = Callable[[int, Entries, Plan], None]
OnSettle = Callable[[torch.device], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class LayerSetup:
    """What a layer is told once.

    question_tokens: how many at the end of each row's prompt are its question, None where that is not known. relay:
    what a policy hands over from layer to layer, shared by the layers of a cache, None where it hands nothing over.
    rotation: given for positions=in_cache only; places: for positions=released only; pool: for policies
    that pool layers; waiting: for allocations that must see all layers; second_pass: for policies that have the prompt
    repeated; these four are shared by the layers of a cache. unrotation: how the model rotates, for moments of queries;
    output_weight (H, G, D, E): for policies that read it; future (B, H, P): for each position of a prompt, what
    `View.future` tells; artefact: for policies that learnt something offline. reserve_tokens: how many tokens will be
    generated; more than that makes the buffers grow by copying. prompt_tokens: the first tokens, pads included, that
    are the prompt however they come. prompt_kind (B, T) int8 or None for text.
    row_seeds: one number per sequence for policies that draw, None for zeros. on_settle: entered, with
    the layer's device, around what a policy adds to a prompt (plan, check, move into slots), so that it can be
    measured apart. on_plan:
    told the layer, its entries and the policy's plan before it is carried out; for looking only.
    """

    layer: int
    num_layers: int
    policy: Policy
    budget: Budget
    rotation: Rotation | None = None
    reserve_tokens: int = 0
    prompt_tokens: int = 0
    prompt_kind: Tensor | None = None
    row_seeds: tuple[int, ...] | None = None
    places: Places | None = None
    pool: Pool | None = None
    waiting: Waiting | None = None
    second_pass: SecondPass | None = None
    unrotation: Rotation | None = None
    output_weight: Tensor | None = None
    future: Tensor | None = None
    question_tokens: tuple[int, ...] | None = None
    relay: Relay | None = None
    artefact: Artefact | None = None
    on_settle: OnSettle = nullcontext
    on_plan: OnPlan | None = None

    @cached_property
    def departures(self) -> Departures:
        """What the policy asks of the cache beyond the contract."""
        return departures_of(self.policy)

    @property
    def most_tokens(self) -> int | None:
        """How many tokens a row may see, where the position mode holds no further."""
        rotation = self.places.rotation if self.places is not None else self.rotation
        return None if rotation is None else rotation.most_tokens

    def kinds(self, position: Tensor, end: int) -> Tensor:
        """Return the kinds (B, Q) int8 of tokens at `position` (B, Q), of which the last is token number `end`.

        Raises: ModelSupportError if there is not one for each token of the prompt.
        """
        rows, new = position.shape
        given, length = self.prompt_kind, max(new, self.prompt_tokens)
        if given is None or end > length:
            return torch.zeros_like(position, dtype=torch.int8)
        if given.shape != (rows, length):
            raise ModelSupportError(
                f"prompt_kind has shape {tuple(given.shape)}, the first prompt {(rows, length)}; give one kind per "
                "prompt token, pads included, and prompt_tokens where the prompt comes in pieces"
            )
        return given[:, end - new : end].to(position.device, torch.int8, copy=True)

    def seeds_of(self, num_rows: int) -> list[int]:
        """Return the seed of each of `num_rows` rows. Raises: ModelSupportError if there are not as many."""
        if self.row_seeds is None:
            return [0] * num_rows
        if len(self.row_seeds) != num_rows:
            raise ModelSupportError(
                f"row_seeds has {len(self.row_seeds)} numbers, the prompt {num_rows} rows; give one per row (generate "
                "with num_return_sequences=n makes n rows of each prompt)"
            )
        return list(self.row_seeds)


@dataclass(kw_only=True, slots=True)
class Relay:
    """What a policy handed over in an earlier layer of the prompt that runs."""

    handed: Tensor | None = None


@dataclass(kw_only=True, slots=True)
class Ledger:
    """One layer's counts; every list has one number per row of the batch.

    `held` is the largest count over the heads of the row. `settled_*` are the counts when the last
    chunk of several tokens was settled. `padded_tokens` counts pads too, the same for all rows. `prompt` is what
    came first, or the first `prompt_tokens` with pads if that is more; tokens before `prompt_until_tokens` are
    planned as a prompt, even one by one; those before `answer_until_tokens` are generated ones, even in a chunk.
    most_tokens: how many a row may see, where a position mode holds no further.
    counts_as_released: as in `Departures`. shift: how many more entries than the uniform budget an allocation gave this
    layer when the last chunk was cut, empty for none. block_tokens: how many tokens come before a plan at decode.
    question: positions of each row from which on and below which the question stands; `question_tokens` of the prompt,
    later the chunk that came last. uncut: as `held`, when the last chunk of several tokens had come and was not cut.
    """

    policy: Policy
    budget: Budget
    prompt: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    settled_seen: list[int] = field(default_factory=list)
    settled_held: list[int] = field(default_factory=list)
    padded_tokens: int = 0
    prompt_tokens: int = 0
    prompt_until_tokens: int = 0
    answer_until_tokens: int = 0
    most_tokens: int | None = None
    counts_as_released: bool = False
    shift: list[int] = field(default_factory=list)
    block_tokens: int = 1
    question_tokens: tuple[int, ...] = ()
    question: list[tuple[int, int]] = field(default_factory=list)
    uncut: list[int] = field(default_factory=list)

    @property
    def steps_since_settled(self) -> int:
        """Tokens that came one by one after the last chunk."""
        return self.seen[0] - self.settled_seen[0] if self.settled_seen else 0

    def is_decode_step(self, num_tokens: int) -> bool:
        """Return whether `num_tokens` more are a generated token: one, after the prompt, where every row has begun.

        Until then a single token may be a pad, or the last piece of a prompt.
        """
        return (
            num_tokens == 1
            and bool(self.seen)
            and min(self.seen) > 0
            and self.padded_tokens >= self.prompt_until_tokens
        )

    def is_answer(self, num_tokens: int) -> bool:
        """Return whether `num_tokens` more are several generated tokens in one chunk."""
        return num_tokens > 1 and self.padded_tokens + num_tokens <= self.answer_until_tokens

    def arrive(self, added: list[int]) -> None:
        """Count `added` new tokens per row, pads left out. Raises: ModelSupportError for more than `most_tokens`."""
        empty = [0] * len(added)
        self.seen = [old + plus for old, plus in zip(self.seen or empty, added, strict=True)]
        self.held = [old + plus for old, plus in zip(self.held or empty, added, strict=True)]
        in_pieces = 0 < self.padded_tokens <= self.prompt_tokens
        before = empty if in_pieces else self.prompt or empty
        self.prompt = [old or seen for old, seen in zip(before, self.seen, strict=True)]
        if self.most_tokens is not None and max(self.seen) > self.most_tokens:
            raise ModelSupportError(
                f"a row has seen {max(self.seen)} tokens, but away from positions=original this model's rotation holds "
                f"up to its training length of {self.most_tokens}; use shorter texts, or positions=original"
            )

    def begin_chunk(self, added: list[int]) -> None:
        """Count a chunk of several tokens; it is planned as a prompt, under the plain budget."""
        self.settled_seen, self.settled_held, self.shift = [], [], []
        before, is_prompt = list(self.seen), not self.seen or self.padded_tokens <= self.prompt_tokens
        self.arrive(added)
        self.uncut = list(self.held)
        if is_prompt:
            left = max(self.prompt_tokens, self.padded_tokens) - self.padded_tokens  # of it that is still to come
            ends = [seen + left for seen in self.seen]
            lengths = self.question_tokens or (0,) * len(ends)
            if len(lengths) != len(ends):
                raise ModelSupportError(
                    f"question_tokens has {len(lengths)} numbers, the prompt {len(ends)} rows; give one per row"
                )
            self.question = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        else:
            self.question = list(zip(before, self.seen, strict=True))

    def before_cut(self, row: int, other: Ledger) -> int:
        """Return what a head of `row` in the layer of `other` holds before the chunk that came here last is cut."""
        if other.padded_tokens == self.padded_tokens:  # it has come there too
            return other.uncut[row]
        return (other.held[row] + self.seen[row] - other.seen[row]) if other.seen else self.seen[row]

    def settle(self, held: list[int]) -> None:
        """Note what a chunk left behind."""
        self.held, self.settled_held, self.settled_seen = list(held), list(held), list(self.seen)

    def evicted(self) -> None:
        """Note that every row over its budget lost one entry, where one goes at each step."""
        if self.block_tokens > 1:
            return
        self.held = [min(h, max(a, h - 1)) for h, a in zip(self.held, self.allowed(), strict=True)]

    def replay(self) -> None:
        """Count a decode step that the device did by itself: the token that arrived, and the victim."""
        self.padded_tokens += 1
        self.arrive([1] * len(self.seen))
        self.evicted()

    def replay_as(self, other: Ledger) -> None:
        """Count the step that `other`, equal to this one before, has counted; lists are never changed but replaced."""
        self.padded_tokens, self.prompt = other.padded_tokens, other.prompt
        self.seen, self.held = other.seen, other.held

    def due(self) -> list[bool]:
        """Return the rows whose block of generated tokens is full and is planned now."""
        if self.block_tokens == 1:
            return [False] * len(self.held)
        return [h - a >= self.block_tokens for h, a in zip(self.held, self.allowed(), strict=True)]

    def cut_block(self) -> None:
        """Note that the rows that were due hold what they may."""
        rows = zip(self.due(), self.held, self.allowed(), strict=True)
        self.held = [allowed if due else held for due, held, allowed in rows]

    def divide(self, entries: list[int]) -> None:
        """Note what an allocation gives this layer, per row; it grows as the uniform budget does."""
        self.shift = [given - uniform for given, uniform in zip(entries, self.uniform(), strict=True)]

    def uniform(self) -> list[int]:
        """Return the entries each row may hold now were all layers alike."""
        return self._entries(self.seen)

    def over(self) -> bool:
        """Return whether any row holds more than it may."""
        return any(h > a for h, a in zip(self.held, self.allowed(), strict=True))

    def allowed(self, *, ahead_tokens: int = 0) -> list[int]:
        """Return the entries each row may hold once `ahead_tokens` more tokens were seen.

        A policy that cuts only the prompt lets generated tokens stay; one that cuts only at decode
        keeps what the prompt left.
        """
        if not self.policy.bounded:
            return [seen + ahead_tokens for seen in self.seen]
        entries = self._shifted(self._entries([seen + ahead_tokens for seen in self.seen]))
        if not self.settled_seen or self.policy.when is When.BOTH:
            return entries
        return [self._after_settling(row, self.seen[row] + ahead_tokens, entries[row]) for row in range(len(entries))]

    def allowed_after_prompt(self) -> list[int]:
        """Return the entries each row was allowed when it had seen its first prompt."""
        return self._shifted(self._entries(self.prompt)) if self.policy.bounded else list(self.prompt)

    def _shifted(self, entries: list[int]) -> list[int]:
        if not self.shift:
            return entries
        return [max(1, uniform + more) for uniform, more in zip(entries, self.shift, strict=True)]

    def _entries(self, seen: list[int]) -> list[int]:
        rows = zip(seen, self.prompt, strict=True)
        return [_entries(self.budget, so_far, prompt, self.counts_as_released) for so_far, prompt in rows]

    def _after_settling(self, row: int, seen: int, entries: int) -> int:
        if seen > self.settled_seen[row] and When.DECODE not in self.policy.when:
            return self.settled_held[row] + seen - self.settled_seen[row]
        if seen > self.settled_seen[row] and When.PREFILL not in self.policy.when:
            return max(entries, self.settled_held[row])
        return entries


@lru_cache(maxsize=4096)
def _entries(budget: Budget, seen_tokens: int, prompt_tokens: int, as_released: bool) -> int:
    """Ask once for what every layer of a step asks for again."""
    count = entries_as_released if as_released else Budget.entries
    return count(budget, seen_tokens=seen_tokens, prompt_tokens=prompt_tokens)


class RowCounts:
    """Per row (B,) int64 on the device: `prompt`, its budget, `seen` and `budget` now, `row_seed`."""

    def __init__(self, setup: LayerSetup, ledger: Ledger, device: torch.device) -> None:
        def rows(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        self._setup = setup
        self.prompt, self.prompt_budget = rows(ledger.prompt), rows(ledger.allowed_after_prompt())
        self.seen, self.budget = rows(ledger.seen), rows(ledger.allowed())
        self.row_seed = rows(setup.seeds_of(len(ledger.seen)))
        self._needs = needs_of(setup.policy)
        self.question = None
        if Needs.QUESTION in self._needs:
            self.question = torch.tensor(ledger.question, dtype=torch.int64, device=device)

    def view(
        self,
        setup: LayerSetup,
        entries: Entries,
        *,
        new_tokens: int = 1,
        prefill: bool = False,
        **given: Any,
    ) -> View:
        """Return what the policy sees of the layer of `setup`, which may share its counts with others.

        given: what else the view has, by the names of its fields; what is None there is not declared.
        """
        position = entries.position
        if Needs.PICTURE in self._needs:
            given["picture_or_none"] = (entries.kind == int(Kind.IMAGE)) & (position >= 0)
        if self.question is not None:
            begin, end = self.question[:, :1, None], self.question[:, 1:, None]
            given["question_or_none"] = (position >= begin) & (position < end)
        artefact = setup.artefact
        return View(
            layer=setup.layer,
            num_layers=setup.num_layers,
            new_tokens=new_tokens,
            prefill=prefill,
            prompt=self.prompt,
            seen=self.seen,
            budget=self.budget,
            prompt_budget=self.prompt_budget,
            row_seed=self.row_seed,
            keys=unread(entries, "keys"),
            values=unread(entries, "values"),
            position=position,
            kind=entries.kind,
            mass_or_none=entries.mass,
            noted_or_none=entries.noted,
            output_weight_or_none=setup.output_weight,
            artefact_or_none=None if artefact is None else artefact.of_layer(setup.layer, position.device),
            **given,
        )


class StepCounts(RowCounts):
    """The counts of decode steps, moved forward in place; `sinks` and `recent_from` bound what a policy protects.

    Both are (B,): positions below the first and from the second on are not to be evicted.
    """

    def __init__(self, setup: LayerSetup, ledger: Ledger, device: torch.device) -> None:
        super().__init__(setup, ledger, device)
        self._announce(ledger, setup.reserve_tokens)
        self._protect()

    def _announce(self, ledger: Ledger, num_steps: int) -> None:
        """Fill the table for the steps to come, at least GROW_TOKENS of them."""
        num_steps = max(num_steps, GROW_TOKENS)
        self._announced_until = ledger.seen[0] + num_steps
        rows = [ledger.allowed(ahead_tokens=ahead) for ahead in range(num_steps + 1)]
        self._table = torch.tensor(rows, dtype=torch.int64, device=self.seen.device)
        self._step = torch.zeros(1, dtype=torch.int64, device=self.seen.device)
        self._num_positions = max(ledger.seen) + num_steps + 1
        self._tables: tuple[Tensor, Tensor] | None = None

    def turn_tables(self, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (P, D / 2) for every distance a key can be turned, made once."""
        if self._tables is None:
            self._tables = rotation.tables(self._num_positions, self.seen.device)
        return self._tables

    def advance(self, ledger: Ledger, num_tokens: int = 1) -> None:
        """Count `num_tokens` more in every row; `ledger` has not counted them yet."""
        if ledger.seen[0] + num_tokens > self._announced_until:
            self._announce(ledger, num_tokens)
        self._step += num_tokens
        self.seen += num_tokens
        self.budget.copy_(self._table.index_select(0, self._step)[0])
        self._protect()

    def _protect(self) -> None:
        if isinstance(self._setup.policy, ScorePolicy):
            self.sinks, self.recent_from = checked_range(self._setup.policy, self.seen, self.budget)
        else:
            self.sinks, self.recent_from = torch.zeros_like(self.seen), self.seen

    def state(self) -> list[Tensor]:
        """Return what a step changes, in place."""
        return [self._step, self.seen, self.budget]

    def tensors(self) -> list[Tensor]:
        """Return all that a step reads, what it changes among it."""
        fixed = [self._table, self.prompt, self.prompt_budget, self.row_seed]
        return [*self.state(), *fixed, *([] if self.question is None else [self.question])]

    def reaches(self, other: StepCounts) -> bool:
        """Whether what was made once, up to a number of positions, serves the steps of `other` too."""
        return self._num_positions >= other._num_positions

    def follow(self, other: StepCounts) -> None:
        """Go on as `other`, whose tensors were copied into these."""
        self._announced_until = other._announced_until


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """New tokens of a chunk: `position` (B, Q) and `kind` (B, Q) int8, pads at -1; tokens without pads per row."""

    position: Tensor
    kind: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, setup: LayerSetup, ledger: Ledger, query: Tensor, padding: Tensor | None) -> Arrival:
        """Tell them from `padding` (B, N), False at pads, of all that came; `ledger` has not counted them yet.

        Raises: ModelSupportError unless pads stand left of a row's first real token only, and some row has one.
        """
        batch, _, new, _ = query.shape
        seen = ledger.seen or [0] * batch
        if padding is None:
            real = torch.ones((batch, new), dtype=torch.bool, device=query.device)
            counts = [new] * batch
        else:
            real = padding[:, -new:].bool()
            counts = real.sum(dim=-1).tolist()
            left_padded = bool((real.long().diff(dim=-1) >= 0).all())  # within these; across pieces by what was seen
            begun = any(had and count < new for had, count in zip(seen, counts, strict=True))
            if not left_padded or begun or not any(counts):
                raise ModelSupportError(
                    f"the attention mask has pads that do not stand left of the first prompt (real tokens per row of "
                    f"this chunk: {counts} of {new}); set padding_side='left'"
                )
        before = torch.tensor(seen, dtype=torch.int64, device=real.device)
        position = torch.where(real, real.long().cumsum(-1) - 1 + before[:, None], EMPTY)
        return cls(position=position, kind=setup.kinds(position, ledger.padded_tokens), counts=tuple(counts))


class CountsShelf:
    """What the layers of one cache share on each device: what follows from counts in which they agree, made once.

    So the layers of a prompt wait for the device once, not each. doubts: looked at when the last of them is cut.
    ledgers: of each layer, in order.
    """

    def __init__(self) -> None:
        self.doubts = Doubts()
        self.ledgers: dict[int, Ledger] = {}
        self._kept: list[tuple[Ledger, Tensor | None, Callable[[], None]]] = []
        self._counts: dict[object, tuple[int, StepCounts]] = {}
        self._arrivals: dict[torch.device, tuple[Tensor | None, object, Arrival]] = {}
        self._rows: dict[torch.device, tuple[object, RowCounts]] = {}

    def clear(self) -> None:
        """Forget everything."""
        self.doubts.clear()
        self._kept.clear()
        for shelf in (self._counts, self._arrivals, self._rows):
            shelf.clear()

    def count_later(self, ledger: Ledger, kept: Tensor | None, count_again: Callable[[], None]) -> None:
        """Remember that a layer settled as if its plan had kept all that it may; kept (B,) is what it did, or None."""
        self._kept.append((ledger, kept, count_again))

    def look(self) -> None:
        """Look at a pass that has ended: at what plans kept, and at what was doubted. Raises: the first of the errors.

        Where they kept other numbers than was taken for granted, every layer of the pass counts again.
        """
        settled, self._kept = self._kept, []
        try:
            self._count(settled)
        finally:
            self.doubts.look()

    def _count(self, settled: Sequence[tuple[Ledger, Tensor | None, Callable[[], None]]]) -> None:
        counted = [(ledger, kept) for ledger, kept, _ in settled if kept is not None]
        differs = False
        for device in dict.fromkeys(kept.device for _, kept in counted):
            there = [(ledger, kept) for ledger, kept in counted if kept.device == device]
            numbers = torch.stack([kept for _, kept in there]).tolist()
            for (ledger, _), held in zip(there, numbers, strict=True):
                if held != ledger.settled_held:
                    ledger.settle(held)
                    differs = True
        if differs:
            self._counts.clear()
            for _, _, count_again in settled:
                count_again()

    def arrival(self, setup: LayerSetup, ledger: Ledger, query: Tensor, padding: Tensor | None) -> Arrival:
        """Return `Arrival.of` the same, of an earlier layer of this pass if there was one."""
        key = (query.shape[0], query.shape[2], ledger.padded_tokens, tuple(ledger.seen))
        mask, known, arrival = self._arrivals.get(query.device, (None, None, None))
        if arrival is None or mask is not padding or known != key:
            arrival = Arrival.of(setup, ledger, query, padding)
            self._arrivals[query.device] = padding, key, arrival
        return arrival

    def rows(self, setup: LayerSetup, ledger: Ledger, device: torch.device) -> RowCounts:
        """Return the counts of `ledger` now, of an earlier layer that has the same."""
        lists = (ledger.prompt, ledger.seen, ledger.settled_seen, ledger.settled_held, ledger.shift, ledger.question)
        key = tuple(tuple[object, ...](one) for one in lists)
        known, rows = self._rows.get(device, (None, None))
        if rows is None or known != key:
            rows = RowCounts(setup, ledger, device)
            self._rows[device] = key, rows
        return rows

    def take(self, setup: LayerSetup, ledger: Ledger, device: torch.device) -> tuple[StepCounts, bool]:
        """Return the counts of `ledger` on `device`, and whether the asking layer is the first and moves them."""
        key: tuple[object, ...] = (device, *map(tuple, (ledger.prompt, ledger.seen, ledger.settled_seen)))
        if steps_between_cuts(setup.policy) == 1:  # else no step reads a budget, and layers may differ in theirs
            key += (tuple(ledger.settled_held), tuple(ledger.shift))
        leader, counts = self._counts.get(key, (setup.layer, None))
        if counts is None or leader == setup.layer:
            leader, counts = self._counts[key] = (setup.layer, StepCounts(setup, ledger, device))
        return counts, leader == setup.layer
