"""What a prompt leaves before any policy decides, recorded once for many policies; and when each entry left a cache.

The output of a prompt's attention does not depend on the policy, so one forward serves every cell
that shares model and prompt. `PromptRecorder` runs in the place of a `PolicyCache` and keeps keys,
values, positions and the statistics that the given policies declare; `cache_after` then gives a
`PolicyCache` that is bit for bit the one a prefill of its own would have left.

    recorder = PromptRecorder(model, policies)
    model(**inputs, **cache_argument(model, recorder), use_cache=True)
    cache = cache_after(recorder.prompt, PolicyCache(model, policy, budget, reserve_tokens=64))

The recording holds the whole prompt uncompressed, in all layers: drop it before the next batch. In the same way a
`CalibrationCache` lets a policy gather what it learns from, batch by batch.

`EvictionLog` is for looking, never for deciding. Nothing that was evicted comes back, so one number per layer, head
and token tells the whole story; it is kept on the device of the cache, and nothing waits for the host before `freed`
is asked for.

    log = EvictionLog(num_tokens=prompt + answer)
    cache = PolicyCache(model, policy, budget, on_plan=log.note_plan)
    ...                                    # the prompt
    log.after_prompt(cache)
    ...                                    # one token
    log.after_step(cache, [True])
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache

from kvbench.cache.artefact import Calibrated, Sample
from kvbench.cache.attention import ChunkStatistics, Statistics, listen
from kvbench.cache.cache import PolicyCache, output_weight, unrotation_of
from kvbench.cache.counts import LayerSetup
from kvbench.cache.layer import PolicyLayer
from kvbench.cache.policy import UNLIMITED, Policy, keeps_ring, needs_of
from kvbench.cache.positions import Rotation, rotation_of
from kvbench.cache.ragged import RaggedSlots
from kvbench.cache.second_pass import SecondPass
from kvbench.cache.slots import Entries, Slots
from kvbench.cache.view import Needs, Plan
from kvbench.errors import ModelSupportError

HELD = -1
_Rows = tuple[int, str, bool]  # how many queries, which reduction, and whether the policy needs MASS too


@dataclass(frozen=True, kw_only=True)
class _WithMass(Policy):
    """Makes the forward give what MASS is computed from, as it does for every policy that needs it."""

    needs: ClassVar[Needs] = Needs.MASS


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPrompt:
    """One layer after a prompt: keys, values (B, H, T, D), position (B, T), real tokens per row, statistics."""

    keys: Tensor
    values: Tensor
    position: Tensor
    lengths: tuple[int, ...]
    masses: dict[str, Tensor]
    rows: dict[_Rows, Tensor]
    head_rows: dict[int, Tensor]
    moments: dict[int, tuple[Tensor, Tensor]]
    queries: dict[int, tuple[Tensor, Tensor, float]]
    hidden: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recorded:
    """The statistics of one layer as `policy` would have computed them; it gets copies."""

    prompt: LayerPrompt
    policy: Policy

    def mass(self, reduction: str) -> Tensor:
        """Return the recorded column sums (B, H, T)."""
        return self.prompt.masses[reduction].clone()

    def last_rows(self, num_queries: int, reduction: str) -> Tensor:
        """Return the recorded rows (B, H, W, T)."""
        return self.prompt.rows[num_queries, reduction, Needs.MASS in needs_of(self.policy)].clone()

    def head_rows(self, num_queries: int) -> Tensor:
        """Return the recorded rows (B, H, G, W, T)."""
        return self.prompt.head_rows[num_queries].clone()

    def moments(self, rotation: Rotation, skip_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the recorded mean (B, H, G, D) and covariance (B, H, G, D, D)."""
        mean, covariance = self.prompt.moments[skip_tokens]
        return mean.clone(), covariance.clone()

    def last_queries(self, num_queries: int) -> tuple[Tensor, Tensor, float]:
        """Return the recorded queries (B, Hq, W, D), their positions (B, W) and the scaling."""
        return self.prompt.queries[num_queries]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """What a prompt left: its layers, and what the model itself keeps on a cache, by name."""

    layers: list[LayerPrompt]
    kept_by_model: dict[str, Any]


class _RecordingLayer(PolicyLayer):
    """Attends as every layer does, and records instead of settling."""

    def __init__(self, setup: LayerSetup, policies: Sequence[Policy]) -> None:
        super().__init__(setup)
        self._masses = {p.reduction for p in policies if Needs.MASS in needs_of(p)}
        self._rows = {row for policy in policies for row in _rows_of(policy)}
        self._head_rows = {p.window_tokens for p in policies if Needs.HEAD_ROWS in needs_of(p)}
        self._skips = {p.moments_from for p in policies if Needs.MOMENTS in needs_of(p)}
        self._rings = {p.window_tokens for p in policies if keeps_ring(p)}
        self._hears = any(Needs.HIDDEN in needs_of(p) for p in policies)
        self.recorded: LayerPrompt | None = None

    def settle_chunk(self, entries: Entries, statistics: Statistics) -> None:
        """Keep what every policy may ask for."""
        assert isinstance(statistics, ChunkStatistics)
        # Kernels reuse what the forward gave for MASS; a policy without it computes its rows anew, and so does this.
        alone, unrotation = ChunkStatistics(statistics.chunk, None), self.setup.unrotation
        self.recorded = LayerPrompt(
            keys=entries.keys,
            values=entries.values,
            position=entries.position[:, 0],
            lengths=tuple(self.ledger.seen),
            masses={reduction: statistics.mass(reduction) for reduction in self._masses},
            rows={row: (statistics if row[2] else alone).last_rows(row[0], row[1]) for row in self._rows},
            head_rows={size: statistics.head_rows(size) for size in self._head_rows},
            moments={} if unrotation is None else {skip: statistics.moments(unrotation, skip) for skip in self._skips},
            queries={size: _copied(statistics.last_queries(size)) for size in self._rings},
            hidden=self._hidden if self._hears else None,
        )

    def take_notes(self, entries: Entries, hidden: Tensor | None, num_new: int) -> None:
        """Keep what policies make their notes of."""
        self._hidden = hidden


def _copied(last: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor, float]:
    """Return the last queries by themselves, so that the others are let go."""
    return last[0].clone(), last[1].clone(), last[2]


def _rows_of(policy: Policy) -> Iterator[_Rows]:
    if Needs.WINDOW in needs_of(policy):
        yield policy.window_tokens, policy.reduction, Needs.MASS in needs_of(policy)
    if Needs.PROBS in needs_of(policy):
        yield 1, policy.reduction, Needs.MASS in needs_of(policy)


class PromptRecorder(Cache):
    """Takes one prompt in one piece; the model's output is that of any other cache of kvbench."""

    def __init__(self, model: Any, policies: Iterable[Policy]) -> None:
        chosen, num_layers = list(policies), model.config.get_text_config().num_hidden_layers
        unrotation = unrotation_of(model, chosen)
        stand_in = _WithMass() if any(Needs.MASS in needs_of(policy) for policy in chosen) else Policy()
        setups = (
            LayerSetup(layer=index, num_layers=num_layers, policy=stand_in, budget=UNLIMITED, unrotation=unrotation)
            for index in range(num_layers)
        )
        self._recording = [_RecordingLayer(setup, chosen) for setup in setups]
        super().__init__(layers=list(self._recording))
        if any(Needs.HIDDEN in needs_of(policy) for policy in chosen):
            listen(model, self, self._recording)
        self._own = {"_own", *vars(self)}

    @property
    def prompt(self) -> Recording:
        """What was recorded. Raises: ValueError before the prompt."""
        recorded = [layer.recorded for layer in self._recording if layer.recorded is not None]
        if len(recorded) < len(self._recording):
            raise ValueError("nothing is recorded yet; run the prompt first")
        kept = {name: value for name, value in vars(self).items() if name not in self._own}
        return Recording(layers=recorded, kept_by_model=kept)


def cache_after(prompt: Recording, cache: PolicyCache) -> PolicyCache:
    """Return `cache`, which is empty, as its policy leaves it after `prompt`.

    The policy gets copies, so one that writes into its view harms nobody else. Raises: KeyError for a
    policy whose statistics were not recorded; what the policy itself raises.
    """
    for layer, recorded in zip(cache.policy_layers, prompt.layers, strict=True):
        layer.is_initialized = True
        position = recorded.position.clone()
        kind = layer.setup.kinds(position, position.shape[1])
        entries = layer.entries_of(recorded.keys.clone(), recorded.values.clone(), position, kind)
        statistics = _Recorded(prompt=recorded, policy=layer.setup.policy)
        layer.ledger.padded_tokens = recorded.keys.shape[2]
        layer.ledger.begin_chunk(list(recorded.lengths))
        layer.take_notes(entries, recorded.hidden, recorded.keys.shape[2])
        layer.settle_chunk(entries, statistics)
    for name, value in prompt.kept_by_model.items():
        setattr(cache, name, copy.deepcopy(value))
    return cache


class _GatheringLayer(PolicyLayer):
    """Attends as every layer does, and gathers for a policy that learns instead of settling."""

    gathered: Mapping[str, Tensor]

    def __init__(self, setup: LayerSetup, policy: Calibrated) -> None:
        super().__init__(setup)
        self._learner = policy

    def take_notes(self, entries: Entries, hidden: Tensor | None, num_new: int) -> None:
        """Keep what the policy learns from; a prompt's alone."""
        self._hidden = hidden

    def settle_chunk(self, entries: Entries, statistics: Statistics) -> None:
        """Keep what the policy sums up, or wait until the prompt was repeated."""
        if Needs.REPEATED in self._learner.learns_from:
            self._unread = (entries, statistics)
            self._repeated = torch.zeros(entries.position.shape, dtype=torch.float32, device=entries.keys.device)
        else:
            self._gather(statistics)

    def cut_repeated(self) -> None:
        """Let the policy learn from a prompt that was repeated, and let go of it."""
        if self._unread is not None:
            (_, statistics), self._unread = self._unread, None
            self._gather(statistics)
            self._repeated = None

    def _gather(self, statistics: Statistics) -> None:
        assert isinstance(statistics, ChunkStatistics)
        chunk = statistics.chunk
        sample = Sample(
            query=chunk.query,
            keys=chunk.keys,
            position=chunk.query_position,
            rotation=self.setup.unrotation,
            hidden_or_none=self._hidden,
            repeated_or_none=self._repeated,
        )
        self.gathered = self._learner.gather(sample)


class CalibrationCache(Cache):
    """Takes one batch of calibration data in one piece; `gathered` is what `policy` sums up of each layer.

    Where it learns from a prompt that is repeated, `awaits_second_pass` says that `read_again` is to be called first.
    """

    def __init__(self, model: Any, policy: Calibrated) -> None:
        num_layers, rotation = model.config.get_text_config().num_hidden_layers, None
        with contextlib.suppress(ModelSupportError):  # who needs it says so
            rotation = rotation_of(model.get_decoder())
        by_output = Needs.REPEATED in policy.learns_from and policy.repeated_as == "output"
        self.second_pass = SecondPass()
        setups = (
            LayerSetup(
                layer=n,
                num_layers=num_layers,
                policy=policy,
                budget=UNLIMITED,
                unrotation=rotation,
                second_pass=self.second_pass,
                output_weight=output_weight(model, n) if by_output else None,
            )
            for n in range(num_layers)
        )
        self.policy_layers = [_GatheringLayer(setup, policy) for setup in setups]
        super().__init__(layers=list(self.policy_layers))
        if by_output or Needs.HIDDEN in policy.learns_from | needs_of(policy):
            listen(model, self, self.policy_layers)

    @property
    def awaits_second_pass(self) -> bool:
        """Whether the prompt lies here until `read_again` was called for it."""
        return any(layer.awaits_second_pass for layer in self.policy_layers)

    @property
    def gathered(self) -> list[Mapping[str, Tensor]]:
        """What the policy sums up, layer by layer, after the batch."""
        return [layer.gathered for layer in self.policy_layers]


class EvictionLog:
    """The story of one batch; a row sees at most `num_tokens` tokens, N below."""

    def __init__(self, *, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._step = 0
        self._freed: list[Tensor] = []
        self._held: list[Tensor] = []
        self._merged: dict[int, Tensor] = {}

    def note_plan(self, layer: int, entries: Entries, plan: Plan) -> None:
        """Note which entries join another one; `PolicyCache` calls it with every plan."""
        if plan.merge_into is None:
            return
        position, target = entries.position, entries.position.gather(-1, plan.merge_into)
        joins = (position >= 0) & ~plan.keep & (target != position)
        if layer not in self._merged:
            self._merged[layer] = self._column(position, HELD)
        at = torch.where(joins, position, self._num_tokens)
        self._merged[layer].scatter_(-1, at, torch.where(joins, target, HELD))

    def after_prompt(self, cache: PolicyCache) -> None:
        """Take what the prompt left; everything else of it was dropped, which counts as step 0."""
        for slots, ledger in ((_slots(layer.slots), layer.ledger) for layer in cache.policy_layers):
            held = self._held_now(slots)
            seen = torch.tensor(ledger.seen, device=held.device)[:, None, None]
            gone = ~held & (torch.arange(held.shape[-1], device=held.device) < seen)
            self._freed.append(self._column(slots.position, HELD)[..., :-1].masked_fill_(gone, 0))
            self._held.append(held)

    def after_step(self, cache: PolicyCache, going: Sequence[bool]) -> None:
        """Note what a decode step freed, its own new token included, in the rows that are `going`."""
        self._step += 1
        for index, layer in enumerate(cache.policy_layers):
            now, before = self._held_now(_slots(layer.slots)), self._held[index]
            rows = torch.tensor(going, device=now.device)[:, None, None]
            newest = torch.tensor(layer.ledger.seen, device=now.device)[:, None, None] - 1
            before |= rows & (torch.arange(now.shape[-1], device=now.device) == newest)
            gone = before & ~now & rows
            self._freed[index].masked_fill_(gone, self._step)
            before &= ~gone

    def freed(self, row: int) -> Tensor:
        """Return (L, H, N) int64: the decode step that freed each entry, 0 for the prompt's cut, -1 for held or none.

        Entries beyond the tokens that the row has seen are -1 too.
        """
        return torch.stack([layer[row].cpu() for layer in self._freed])

    def merged_into(self, row: int) -> Tensor | None:
        """Return (L, H, N) int64: the position of the entry that each one joined, -1 for none; None without merging."""
        if not self._merged:
            return None
        nothing = torch.full_like(self._freed[0], HELD)
        layers = [self._merged.get(index, nothing)[row, :, : self._num_tokens] for index in range(len(self._freed))]
        return torch.stack([layer.cpu() for layer in layers])

    def _column(self, position: Tensor, value: int) -> Tensor:
        """(B, H, N + 1) int64; the last place takes what is not to be noted."""
        return position.new_full((*position.shape[:2], self._num_tokens + 1), value)

    def _held_now(self, slots: Slots | RaggedSlots) -> Tensor:
        """(B, H, N) bool."""
        position = slots.position
        at = torch.where(position >= 0, position, self._num_tokens)
        return self._column(position, 0).scatter_(-1, at, 1)[..., :-1].bool()


def _slots(slots: Slots | RaggedSlots | None) -> Slots | RaggedSlots:
    assert slots is not None, "the prompt comes first"
    return slots
