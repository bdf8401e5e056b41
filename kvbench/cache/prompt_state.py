"""What a prompt leaves in every layer before any policy decides, recorded once for many policies.

The output of a prompt's attention does not depend on the policy, so one forward serves every cell
that shares model and prompt. `PromptRecorder` runs in the place of a `PolicyCache` and keeps keys,
values, positions and the statistics that the given policies declare; `cache_after` then gives a
`PolicyCache` that is bit for bit the one a prefill of its own would have left.

    recorder = PromptRecorder(model, policies)
    model(**inputs, past_key_values=recorder, use_cache=True)
    cache = cache_after(recorder.prompt, model, policy, budget, positions="original", reserve_tokens=64)

The recording holds the whole prompt uncompressed, in all layers: drop it before the next batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache

from kvbench.cache.budget import UNLIMITED, Budget
from kvbench.cache.chunks import columns_of
from kvbench.cache.layer import PolicyLayer
from kvbench.cache.layer_setup import LayerSetup
from kvbench.cache.policy import Policy
from kvbench.cache.policy_cache import PolicyCache
from kvbench.cache.positions import PositionMode
from kvbench.cache.slots import Entries
from kvbench.cache.statistics import Statistics
from kvbench.cache.view import Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPrompt:
    """One layer after a prompt: keys, values (B, H, T, D), position (B, T), real tokens per row, statistics."""

    keys: Tensor
    values: Tensor
    position: Tensor
    lengths: tuple[int, ...]
    masses: dict[str, Tensor]
    rows: dict[tuple[int, str], Tensor]

    @property
    def new_tokens(self) -> int:
        """Tokens of the prompt, pads included."""
        return self.keys.shape[2]

    def mass(self, reduction: str) -> Tensor:
        """Return a copy of the recorded column sums (B, H, T)."""
        return self.masses[reduction].clone()

    def last_rows(self, num_queries: int, reduction: str) -> Tensor:
        """Return a copy of the recorded rows (B, H, W, T)."""
        return self.rows[num_queries, reduction].clone()


class _RecordingLayer(PolicyLayer):
    """Attends as every layer does, and records instead of settling."""

    def __init__(self, setup: LayerSetup, policies: Sequence[Policy]) -> None:
        super().__init__(setup)
        self._masses = {p.reduction for p in policies if Needs.MASS in p.needs}
        self._rows = {(p.window_tokens, p.reduction) for p in policies if Needs.WINDOW in p.needs}
        self._rows |= {(1, p.reduction) for p in policies if Needs.PROBS in p.needs}
        self.recorded: LayerPrompt | None = None

    def settle_chunk(self, entries: Entries, statistics: Statistics) -> None:
        """Keep what every policy may ask for."""
        self.recorded = LayerPrompt(
            keys=entries.keys,
            values=entries.values,
            position=entries.position[:, 0],
            lengths=tuple(self.ledger.seen),
            masses={reduction: statistics.mass(reduction) for reduction in self._masses},
            rows={(number, reduction): statistics.last_rows(number, reduction) for number, reduction in self._rows},
        )


class PromptRecorder(Cache):
    """Takes one prompt in one piece; the model's output is that of any other cache of kvbench."""

    def __init__(self, model: Any, policies: Iterable[Policy]) -> None:
        chosen = list(policies)
        num_layers = model.config.get_text_config().num_hidden_layers
        self._recording = [_RecordingLayer(_unlimited(index, num_layers), chosen) for index in range(num_layers)]
        super().__init__(layers=list(self._recording))

    @property
    def prompt(self) -> list[LayerPrompt]:
        """What was recorded, by layer. Raises: ValueError before the prompt."""
        recorded = [layer.recorded for layer in self._recording if layer.recorded is not None]
        if len(recorded) < len(self._recording):
            raise ValueError("nothing is recorded yet; run the prompt first")
        return recorded


def _unlimited(index: int, num_layers: int) -> LayerSetup:
    return LayerSetup(
        layer=index,
        num_layers=num_layers,
        policy=Policy(),
        budget=UNLIMITED,
        rotation=None,
        reserve_tokens=0,
        prompt_kind=None,
    )


def cache_after(
    prompt: Sequence[LayerPrompt],
    model: Any,
    policy: Policy,
    budget: Budget,
    *,
    positions: PositionMode,
    reserve_tokens: int,
    prompt_kind: Tensor | None = None,
    row_seeds: Sequence[int] | None = None,
) -> PolicyCache:
    """Return the cache that `policy` leaves after `prompt`; arguments as for `PolicyCache`.

    The policy gets copies, so one that writes into its view harms nobody else. Raises: KeyError for a
    policy whose statistics were not recorded; what the policy itself raises.
    """
    cache = PolicyCache(
        model,
        policy,
        budget,
        positions=positions,
        reserve_tokens=reserve_tokens,
        prompt_kind=None if prompt_kind is None else prompt_kind.clone(),
        row_seeds=row_seeds,
    )
    for layer, recorded in zip(cache.policy_layers, prompt, strict=True):
        _take(layer, recorded)
    return cache


def _take(layer: PolicyLayer, recorded: LayerPrompt) -> None:
    """Bring `layer` to where it stands when a prompt of its own has attended, and settle."""
    layer.is_initialized = True
    layer.padded_tokens = recorded.new_tokens
    entries = columns_of(
        recorded.keys.clone(),
        recorded.values.clone(),
        recorded.position.clone(),
        None,
        layer.setup.policy,
        layer.setup.prompt_kind,
    )
    layer.ledger.begin_chunk(list(recorded.lengths))
    layer.settle_chunk(entries, recorded)
