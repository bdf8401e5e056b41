"""The numbers of a decode step on the device, so that no step waits for the host.

How many entries a row may hold follows from how many tokens it has seen, which is known in advance:
a table holds the budget of every step to come. Layers with equal counts share one `StepCounts`; the
first of them moves it forward, and everything after reads it. A captured step does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.cache.layer_setup import LayerSetup
from kvbench.cache.ledger import Ledger
from kvbench.cache.policy import ScorePolicy
from kvbench.cache.rotation import Rotation
from kvbench.cache.slots import Slots
from kvbench.cache.view import Needs, View

GROW_TOKENS = 64


class StepCounts:
    """Per row (B,) int64 on the device: `prompt`, its budget, `seen` and `budget` now, `row_seed`."""

    def __init__(self, setup: LayerSetup, ledger: Ledger, device: torch.device) -> None:
        self._policy = setup.policy
        self.prompt = torch.tensor(ledger.prompt, dtype=torch.int64, device=device)
        self.prompt_budget = torch.tensor(ledger.allowed_after_prompt(), dtype=torch.int64, device=device)
        self.seen = torch.tensor(ledger.seen, dtype=torch.int64, device=device)
        self.row_seed = torch.tensor(setup.seeds_of(len(ledger.seen)), dtype=torch.int64, device=device)
        self._announce(ledger, setup.reserve_tokens)
        self.budget = self._table[0].clone()
        self.sinks, self.recent_from = self._protected()

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
            self._tables = rotation.tables(self._num_positions)
        return self._tables

    def advance(self, ledger: Ledger) -> None:
        """Count one more token in every row; `ledger` has not counted it yet."""
        if ledger.seen[0] == self._announced_until:
            self._announce(ledger, GROW_TOKENS)
        self._step += 1
        self.seen += 1
        self.budget.copy_(self._table.index_select(0, self._step)[0])
        self.sinks, self.recent_from = self._protected()

    def view(self, setup: LayerSetup, slots: Slots, probs: Tensor | None) -> View:
        """Return the view of a decode step; nothing in it comes from the host."""
        entries = slots.entries
        return View(
            layer=setup.layer,
            num_layers=setup.num_layers,
            new_tokens=1,
            prefill=False,
            prompt=self.prompt,
            seen=self.seen,
            budget=self.budget,
            prompt_budget=self.prompt_budget,
            row_seed=self.row_seed,
            keys=entries.keys,
            values=entries.values,
            position=entries.position,
            kind=entries.kind,
            mass_or_none=entries.mass,
            probs_or_none=probs if Needs.PROBS in setup.policy.needs else None,
            memory_or_none=slots.memory,
        )

    def state(self) -> list[Tensor]:
        """Return what a step changes, in place."""
        return [self._step, self.seen, self.budget]

    def _protected(self) -> tuple[Tensor, Tensor]:
        """(B,) each: positions below the first and from the second on are not to be evicted."""
        if isinstance(self._policy, ScorePolicy):
            return self._policy.checked_range(self.seen, self.budget)
        return torch.zeros_like(self.seen), self.seen


class CountsShelf:
    """The step counts of one cache, made once for all layers whose ledgers agree."""

    def __init__(self) -> None:
        self._counts: dict[object, tuple[int, StepCounts]] = {}

    def clear(self) -> None:
        """Forget all counts."""
        self._counts.clear()

    def take(self, setup: LayerSetup, ledger: Ledger, device: torch.device) -> tuple[StepCounts, bool]:
        """Return the counts of `ledger`, and whether the asking layer is the first and moves them."""
        key = (tuple(ledger.prompt), tuple(ledger.seen), tuple(ledger.settled_held), tuple(ledger.settled_seen))
        leader, counts = self._counts.get(key, (setup.layer, None))
        if counts is None or leader == setup.layer:
            leader, counts = self._counts[key] = (setup.layer, StepCounts(setup, ledger, device))
        return counts, leader == setup.layer
