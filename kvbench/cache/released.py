"""What published code does to the cache itself, beyond deciding what stays: the hook of policies/released.

A policy there asks for it by a property of its own under one of the names of `Departures`. The contract in
`kvbench.cache.policy` knows nothing of it, and a policy that has none of these properties departs in nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbench.cache.policy import DECIMALS, Budget, Policy

if TYPE_CHECKING:
    from kvbench.cache.slots import Entries


@dataclass(frozen=True, kw_only=True, slots=True)
class Departures:
    """What the cache does differently for one policy.

    counts_as_released: a share of the tokens is rounded as Elastic Cache's code does; up, and not down.
    pools_layers: the mass is averaged over all heads and layers, and all layers are cut together.
    mass_in_model_dtype: mass is summed in the dtype of the keys; float32 otherwise.
    """

    counts_as_released: bool = False
    pools_layers: bool = False
    mass_in_model_dtype: bool = False


def departures_of(policy: Policy) -> Departures:
    """Return what `policy` asks for by properties of these names."""
    return Departures(**{known.name: getattr(policy, known.name, False) for known in fields(Departures)})


def entries_as_released(budget: Budget, *, seen_tokens: int, prompt_tokens: int) -> int:
    """Return the entries allowed as Elastic Cache's code counts them: rounded up, in its own arithmetic.

    It takes the pruned share r, keeps 1 - r in floating point, and cuts the tokens to forget down to
    a whole number; 1 - 0.7 is a little more than 0.3, which shows at multiples of ten.
    """
    if budget.fraction is None:
        return budget.entries(seen_tokens=seen_tokens, prompt_tokens=prompt_tokens)
    kept = 1 - round(1 - budget.fraction, DECIMALS)
    if seen_tokens == prompt_tokens:
        return max(1, seen_tokens - int(seen_tokens - seen_tokens * kept))
    return max(1, math.ceil((seen_tokens if budget.of == "seen" else prompt_tokens) * kept))


@dataclass(kw_only=True, slots=True)
class Pool:
    """The layers of one cache that have come in this pass, with what each does next.

    Some code scores a token by its mean over every head of every layer and evicts it everywhere. A layer of such a
    policy does not cut at once: it hands in its mass, and when the last layer of the pass has come, all get the mean
    and cut in turn. Until then the prompt of every layer lies uncompressed, as in that code.
    """

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


def _mean_mass(layers: list[Entries]) -> Tensor:
    """(B, H, T): the mean over layers and heads, the same for each head."""
    found = [layer.mass for layer in layers if layer.mass is not None]
    masses = torch.stack([mass.to(found[0].device) for mass in found])  # layers may lie on several devices
    return masses.mean(dim=(0, 2)).unsqueeze(1).expand(masses.shape[1:])
