"""One cut for the whole model: layers wait until the attention mass of all of them is averaged.

Some code scores a token by its mean over every head of every layer and evicts it everywhere. A layer
of such a policy does not cut at once: it hands in its mass, and when the last layer of the pass has
come, all get the mean and cut in turn. Until then the prompt of every layer lies uncompressed, as in
that code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.cache.slots import Entries


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
