"""What one layer of a cache is told once, and the view of it that a policy gets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbench.cache.policy import Budget, Plan, Policy, View
from kvbench.cache.positions import Places, Rotation
from kvbench.cache.slots import Entries
from kvbench.errors import ModelSupportError

if TYPE_CHECKING:
    from kvbench.cache.counts import Ledger
    from kvbench.cache.layer import Pool


OnPlan = Callable[[int, Entries, Plan], None]


@dataclass(frozen=True, kw_only=True)
class LayerSetup:
    """What a layer is told once.

    rotation: given for positions=in_cache only; places: for positions=released only; pool: for policies
    that pool layers; both are shared by the layers of a cache. reserve_tokens: how many tokens will be
    generated; more than that makes the buffers grow by copying. prompt_tokens: the first tokens, pads included, that
    are the prompt however they come. prompt_kind (B, T) int8 or None for text.
    row_seeds: one number per sequence for policies that draw, None for zeros. on_settle: entered around
    what a policy adds to a prompt (plan, check, move into slots), so that it can be measured apart. on_plan:
    told the layer, its entries and the policy's plan before it is carried out; for looking only.
    """

    layer: int
    num_layers: int
    policy: Policy
    budget: Budget
    rotation: Rotation | None
    reserve_tokens: int
    prompt_tokens: int = 0
    prompt_kind: Tensor | None = None
    row_seeds: tuple[int, ...] | None = None
    places: Places | None = None
    pool: Pool | None = None
    on_settle: Callable[[], AbstractContextManager[None]] = nullcontext
    on_plan: OnPlan | None = None

    @property
    def most_tokens(self) -> int | None:
        """How many tokens a row may see, where the position mode holds no further."""
        rotation = self.places.rotation if self.places is not None else self.rotation
        return None if rotation is None else rotation.most_tokens

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


def view_of(
    setup: LayerSetup,
    ledger: Ledger,
    entries: Entries,
    *,
    new_tokens: int,
    window: Tensor | None = None,
    probs: Tensor | None = None,
    memory: Tensor | None = None,
) -> View:
    """Return the view of a prompt's `entries` for the policy; statistics it did not declare are left out.

    memory: what the plan of an earlier chunk left.
    """
    return View(
        layer=setup.layer,
        num_layers=setup.num_layers,
        new_tokens=new_tokens,
        prefill=True,
        prompt=row_tensor(ledger.prompt, entries.keys),
        seen=row_tensor(ledger.seen, entries.keys),
        budget=row_tensor(ledger.allowed(), entries.keys),
        prompt_budget=row_tensor(ledger.allowed_after_prompt(), entries.keys),
        row_seed=row_tensor(setup.seeds_of(entries.keys.shape[0]), entries.keys),
        keys=entries.keys,
        values=entries.values,
        position=entries.position,
        kind=entries.kind,
        mass_or_none=entries.mass,
        window_or_none=window,
        probs_or_none=probs,
        memory_or_none=memory,
    )


def row_tensor(numbers: list[int], like: Tensor) -> Tensor:
    """Return one number per row as int64 on the device of `like`."""
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)
