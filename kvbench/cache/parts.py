"""The parts that a score policy may be put together with: how entries are divided, and what becomes of those that go.

An `Allocation` says how many entries layers and heads get; here it is asked, checked, and its arithmetic is exact:
whole numbers, none above what a head can hold, and together what a uniform cache would hold. What is divided is the
room of one row, so a sequence is divided alike alone and in a batch. A `Merge` says whom the others join.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache.view import Joining, Needs, Plan, View
from kvbench.errors import ConfigError, NonFiniteChoiceError, PolicyError


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What is divided in one row: `budget` entries for each of `num_heads` KV heads of each of `num_layers` layers.

    tokens: how many the row has seen, and the most that a head can hold. protected: what each head keeps in any case
    (sinks and recent tokens), a part of its budget. artefact: what the policy learnt offline, layer by layer.
    """

    num_layers: int
    num_heads: int
    budget: int
    tokens: int
    protected: int
    artefact: Sequence[Mapping[str, Tensor]] | None = None


Total = Literal["exact", "bounded", "data_dependent"]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Divide the entries of a uniform cache among layers (override `layers`) or among a layer's heads (`heads`).

    Class flags: `total` (`exact`: as many as a uniform cache holds; `bounded`: never more; `data_dependent`: an
    outcome, and what came out is the cell's place on the axis), `needs` (statistics of `tell` and `heads`), `waits`
    (every layer must be seen before any is divided; until then the prompt of all of them lies uncompressed) and
    `ragged` (heads of a layer differ, in real bytes).

    It is asked when a prompt is cut, in rows that exceed the budget. What a layer or head then has more or less than
    the budget stays so while the budget grows with the tokens seen.
    """

    total: ClassVar[Total] = "exact"
    needs: ClassVar[Needs] = Needs.NOTHING
    waits: ClassVar[bool] = False
    ragged: ClassVar[bool] = False

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        """Return the entries of each layer per KV head, each from `room.protected` to `room.tokens`.

        told: what `tell` returned in each layer for this row, (N,) float64 on the CPU; empty unless `waits`.
        """
        return [room.budget] * room.num_layers

    def tell(self, view: View, ranking: Tensor) -> Tensor:
        """Return (B, N), what a layer's share hangs on; ranking (B, H, T): scores, infinite where protected."""
        raise NotImplementedError(f"{type(self).__name__} waits for all layers and must define tell(view, ranking)")

    def heads(self, view: View, candidates: Tensor, free: Tensor) -> Tensor:
        """Return (B, H) int64: how many of its candidates each head keeps, `free` (B,) in all the heads of the layer.

        candidates (B, H, T): the scores of what is not protected, -inf where there is no candidate.
        """
        raise NotImplementedError(f"{type(self).__name__} is ragged and must define heads(view, candidates, free)")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Let entries that go join others that stay, wherever a plan is made, and at decode steps if it says so.

    Class flags: `needs` (statistics of `into` and `joining`), `at_decode` (the entry that a decode step frees joins
    others too) and `remembers` (numbers kept for each head from one of them to the next, NaN at first: `memory`).
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    at_decode: ClassVar[bool] = False
    remembers: ClassVar[int] = 0

    def into(self, view: View, keep: Tensor, protected: Tensor) -> Plan:
        """Return the plan that keeps `keep` (B, H, T) and says who joins whom.

        protected (B, H, T) bool: the sinks and recent tokens among what is kept.
        """
        raise NotImplementedError(f"{type(self).__name__} must define into(view, keep, protected)")

    def joining(self, view: View, victim: Tensor) -> Joining:
        """Return what slot `victim` (B, H), about to be freed, leaves in others; nothing in it may ask the host.

        It is asked of every head, and carried out in those that are over their budget.
        """
        raise NotImplementedError(f"{type(self).__name__} merges at decode and must define joining(view, victim)")


def split(weight: Tensor, total: Tensor, most: Tensor) -> Tensor:
    """Return int64 shares (..., N) of `total` (...) in proportion to `weight` (..., N), none above `most` (..., N).

    What a full one cannot take goes to the others. Shares sum up to the total, or to all of `most` if that is less;
    of rests the largest fraction is served first, of equal ones the earlier. Weights are numbers of 0 or more; where
    all that is left weigh nothing, they weigh the same. Raises: NonFiniteChoiceError for a weight that is no number.
    """
    weight = weight.double()
    if not bool((weight.isfinite() & (weight >= 0)).all()):
        raise NonFiniteChoiceError("an allocation weighs layers or heads by NaN, infinity or less than 0")
    total, full = total.minimum(most.sum(dim=-1)), torch.zeros_like(most, dtype=torch.bool)
    share = torch.zeros_like(weight)
    for _ in range(weight.shape[-1] + 1):
        left = (total - most.masked_fill(~full, 0).sum(dim=-1)).clamp(min=0)[..., None].double()
        open_weight = weight.masked_fill(full, 0.0)
        weighs = open_weight.sum(dim=-1, keepdim=True) > 0
        open_weight = torch.where(weighs, open_weight, (~full).double())
        share = left * open_weight / open_weight.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        newly = ~full & (share >= most)
        if not bool(newly.any()):
            break
        full |= newly
    whole = torch.where(full, most, share.floor().long())
    rest = (share - share.floor()).masked_fill(full | (whole >= most), -1.0)
    place = rest.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    missing = (total - whole.sum(dim=-1))[..., None]
    return whole + ((place < missing) & (rest >= 0)).long()


def split_layers(weight: Tensor, room: Room) -> list[int]:
    """Return the entries of each layer per KV head: what is protected, and by `weight` (L,) a share of the rest."""
    free = torch.tensor(room.num_layers * (room.budget - room.protected))
    most = torch.full((room.num_layers,), room.tokens - room.protected)
    return [room.protected + share for share in split(weight, free, most).tolist()]


def best_of_layer(view: View, candidates: Tensor, count: Tensor) -> Tensor:
    """Return (B, H) int64: how many of the `count` (B,) best candidates of all heads of a layer lie in each.

    candidates (B, H, T), -inf where there is none; of equal scores the newer one is better, then the earlier head.
    """
    rows, heads, _ = candidates.shape
    newest_first = view.position.flatten(1).argsort(dim=-1, descending=True, stable=True)
    best_first = candidates.flatten(1).gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    order = newest_first.gather(-1, best_first)
    is_best = torch.arange(order.shape[-1], device=order.device) < count[:, None]
    return torch.zeros_like(order).scatter_(-1, order, is_best.long()).reshape(rows, heads, -1).sum(dim=-1)


def layer_entries(
    allocation: Allocation | None,
    skip_layers: Sequence[int],
    room: Room,
    told: Sequence[Tensor] = (),
    held: Sequence[int] = (),
) -> tuple[int, ...]:
    """Return the entries of each layer per KV head in a row that exceeds its budget; `skip_layers` keep all.

    held: what a head of each layer holds, all that was seen where it is empty. After an earlier cut that may be less
    than a layer is given; where the total is exact the others get the rest.
    Raises: ConfigError where the others cannot pay for those, PolicyError for an allocation that breaks its word.
    """
    held = held or [room.tokens] * room.num_layers
    skipped = skipped_layers(skip_layers, room.num_layers)
    rest = [layer for layer in range(room.num_layers) if layer not in skipped]
    whole = {layer: held[layer] for layer in skipped}
    budget, more = divmod(room.num_layers * room.budget - sum(whole.values()), len(rest))
    if skipped and budget < room.protected:
        raise ConfigError(
            f"policy.skip_layers leaves {len(skipped)} of {room.num_layers} layers uncut, {max(whole.values())} "
            f"entries each, and a budget of {room.budget} leaves the others {budget}, but {room.protected} are "
            "protected; give a larger budget or skip fewer layers"
        )
    shares = [budget] * len(rest)
    if allocation is not None:
        divided = replace(room, num_layers=len(rest), budget=budget)
        shares = _checked_layers(allocation, divided, [told[layer] for layer in rest] if told else ())
    for index, share in enumerate(shares):
        if more > 0 and share < room.tokens:
            shares[index], more = share + 1, more - 1
    if allocation is None or allocation.total == "exact":
        shares = _within(shares, [held[layer] for layer in rest])
    entries = whole | dict(zip(rest, shares, strict=True))
    return tuple(entries[layer] for layer in range(room.num_layers))


def _within(shares: list[int], held: list[int]) -> list[int]:
    """Return shares none of which is above what is held; what that leaves over goes to the others, evenly."""
    possible = [min(pair) for pair in zip(shares, held, strict=True)]
    if possible == shares:
        return shares
    most = torch.tensor(held) - torch.tensor(possible)
    more = split(torch.ones(len(shares)), torch.tensor(sum(shares) - sum(possible)), most).tolist()
    return [share + one for share, one in zip(possible, more, strict=True)]


def skipped_layers(skip_layers: Sequence[int], num_layers: int) -> set[int]:
    """Return the layers to skip, from 0. Raises: ConfigError for one that is not there, or if none is left."""
    wrong = [layer for layer in skip_layers if not -num_layers <= layer < num_layers]
    skipped = {layer % num_layers for layer in skip_layers}
    if wrong or len(skipped) == num_layers:
        raise ConfigError(
            f"policy.skip_layers is {list(skip_layers)}, but the model has {num_layers} layers; give some of them, "
            "from 0, or from -1 for the last"
        )
    return skipped


def _checked_layers(allocation: Allocation, room: Room, told: Sequence[Tensor]) -> list[int]:
    name, most = f"{type(allocation).__name__}.layers", room.num_layers * room.budget
    given: object = allocation.layers(room, told)
    shares = list(given) if isinstance(given, list | tuple) else []
    if (
        len(shares) != room.num_layers
        or not all(type(share) is int for share in shares)
        or not all(room.protected <= share <= room.tokens for share in shares)
    ):
        raise PolicyError(
            f"{name} returned {shown(given)}; it must be {room.num_layers} whole numbers from {room.protected} to "
            f"{room.tokens}, entries per KV head"
        )
    total = sum(shares)
    if (total > most and allocation.total != "data_dependent") or (total != most and allocation.total == "exact"):
        raise PolicyError(
            f"{name} divided {total} entries per KV head over the layers where {most} are to be divided; its total is "
            f"declared {allocation.total!r}"
        )
    return shares


def checked_told(allocation: Allocation, view: View, ranking: Tensor) -> Tensor:
    """Return `allocation.tell(view, ranking)`. Raises: PolicyError for anything but a tensor (B, N)."""
    told: object = allocation.tell(view, ranking)
    rows = view.position.shape[0]
    if not isinstance(told, Tensor) or told.ndim != 2 or told.shape[0] != rows:
        raise PolicyError(
            f"{type(allocation).__name__}.tell returned {shown(told)}; it must be a tensor (B, N) = ({rows}, N)"
        )
    return told


def checked_into(merge: Merge, view: View, keep: Tensor, protected: Tensor) -> Plan:
    """Return `merge.into(view, keep, protected)`. Raises: PolicyError if it is no plan."""
    plan: object = merge.into(view, keep, protected)
    if not isinstance(plan, Plan):
        raise PolicyError(f"{type(merge).__name__}.into returned {shown(plan)}; it must be a Plan")
    return plan


def shown(answer: object) -> str:
    """Return a wrong answer of a policy or a part as messages show it, in one line."""
    if isinstance(answer, Tensor):
        return f"a tensor of {str(answer.dtype).removeprefix('torch.')} and shape {tuple(answer.shape)}"
    return f"{' '.join(repr(answer).split()):.60}"


def divided_heads(allocation: Allocation, view: View, ranking: Tensor) -> Tensor:
    """Return (B, H) int64, the entries of each head; ranking (B, H, T): scores, infinite where protected.

    A head keeps what is protected, and its best entry where nothing is. Raises: PolicyError for shares that break the
    word of the allocation.
    """
    protected = view.valid & (ranking == torch.inf)
    bare = ~protected.any(dim=-1, keepdim=True)
    best = ranking.masked_fill(~view.valid, -torch.inf).argmax(dim=-1, keepdim=True)
    places = torch.arange(ranking.shape[-1], device=ranking.device)
    protected = protected | (bare & (places == best) & view.valid)
    candidate = view.valid & ~protected
    kept, most = protected.sum(dim=-1), candidate.sum(dim=-1)
    free = (view.budget * kept.shape[1] - kept.sum(dim=-1)).clamp(min=0).minimum(most.sum(dim=-1))
    finite = ranking.clamp(min=torch.finfo(ranking.dtype).min).masked_fill(~candidate, -torch.inf)
    name, shares = f"{type(allocation).__name__}.heads", allocation.heads(view, finite, free)
    if not isinstance(shares, Tensor) or shares.dtype != torch.int64 or shares.shape != kept.shape:
        raise PolicyError(f"{name} returned {shown(shares)}; it must be int64 of shape (B, H) = {tuple(kept.shape)}")
    total = shares.sum(dim=-1)
    amiss = total > free if allocation.total != "exact" else total != free
    if bool((amiss[:, None] | (shares < 0) | (shares > most)).any()):
        raise PolicyError(
            f"{name} returned {shares.tolist()} in layer {view.layer}; it must be (B, H) = "
            f"{tuple(kept.shape)}, from 0 to the candidates of each head, {free.tolist()} in all per row "
            f"(total: {allocation.total!r})"
        )
    return kept + shares


@dataclass(kw_only=True, slots=True)
class Waiting:
    """The layers of a pass whose allocation must see all of them; until the last one came, none is cut."""

    told: list[Tensor] = field(default_factory=list)
    cuts: list[Callable[[list[int]], None]] = field(default_factory=list)

    def arrive(
        self,
        told: Tensor,
        num_layers: int,
        cut: Callable[[list[int]], None],
        divide: Callable[[int, list[Tensor]], Sequence[int]],
    ) -> None:
        """Hand in what a layer tells, (B, N). The last one has `divide` called for each row, and all cut.

        divide: the entries of all layers of a row, from what each of them told. cut: gets those of its layer, by row.
        """
        self.told.append(told.detach().cpu().double())
        self.cuts.append(cut)
        if len(self.cuts) < num_layers:
            return
        all_told, cuts = self.told, self.cuts
        self.clear()
        rows = [divide(row, [layer[row] for layer in all_told]) for row in range(told.shape[0])]
        for layer, cut_layer in enumerate(cuts):
            cuts[layer] = _done  # what waited is let go layer by layer
            cut_layer([entries[layer] for entries in rows])
            del cut_layer

    def clear(self) -> None:
        """Forget what waits."""
        self.told, self.cuts = [], []


def _done(_: list[int]) -> None:
    """Stand for a layer that was cut."""
