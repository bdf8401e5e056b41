"""Peak memory by phase and the bytes the cache really stores, in a pass of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvbench.cache import PolicyCache
from kvbench.errors import ConfigError
from kvbench.metrics.allocation import PhasePeaks, parameter_bytes, reset_resident_peak, resident_peak_bytes
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.runs.loop import Decoding
from kvbench.runs.task import Bench, TaskResult


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One launch of `new_tokens` steps on the first `batch_size` prompts, peaks noted per phase.

    load = weights and buffers; prefill and decode = everything alive at the phase's peak, weights
    included. KV bytes at the end: stored from storages, theoretical what the budget implies, valid
    what is held, without the free slot and slots not yet used.
    """

    protocol: ClassVar[str] = "one_launch_v1"
    reads_text: ClassVar[bool] = False

    new_tokens: int = 48
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.new_tokens < 2 or self.batch_size < 1:
            raise ConfigError(
                f"task.memory has new_tokens={self.new_tokens}, batch_size={self.batch_size}; allowed: >= 2, >= 1"
            )

    def run(self, bench: Bench) -> TaskResult:
        """Run the launch under the counters."""
        loaded = bench.loaded
        batch = prompt_batch(loaded, bench.examples[: self.batch_size])
        weights_bytes = parameter_bytes(loaded.model)
        inputs_bytes = sum(tensor.untyped_storage().nbytes() for tensor in batch.tensors.values())
        peaks = PhasePeaks(device=loaded.device, base_bytes=weights_bytes + inputs_bytes)
        resident_is_fresh = reset_resident_peak()
        cache = bench.setting.cache(loaded, batch, self.new_tokens)
        self._launch(loaded, batch, cache, peaks)
        bench.advance(1.0)
        result = TaskResult()
        numbers = {f"peak_{name}_bytes": value for name, value in peaks.peak_bytes.items()}
        numbers["peak_load_bytes"] = weights_bytes
        numbers["peak_memory_bytes"] = max(peaks.peak_bytes.values())
        if resident_is_fresh:
            numbers["peak_rss_bytes"] = resident_peak_bytes()
        numbers |= _kv_bytes(cache)
        for name, value in numbers.items():
            result.measurements[name] = _observed(value)
        return result

    @torch.inference_mode()
    def _launch(self, loaded: LoadedModel, batch: Any, cache: PolicyCache, peaks: PhasePeaks) -> None:
        with peaks.phase("prefill"):
            decoding = Decoding(loaded, batch, cache)
            token = decoding.logits.argmax(dim=-1)
        with peaks.phase("decode"):
            for _ in range(self.new_tokens - 1):
                token = decoding.step(token).argmax(dim=-1)


def _kv_bytes(cache: PolicyCache) -> dict[str, int]:
    held, first = cache.occupancy(), cache.policy_layers[0]
    assert first.keys is not None
    _, heads, _, width = first.keys.shape
    entry_bytes = 2 * len(cache.policy_layers) * heads * width * first.keys.element_size()
    return {
        "kv_stored_bytes": held.stored_bytes,
        "kv_valid_bytes": held.valid_bytes,
        "kv_theoretical_bytes": entry_bytes * sum(first.ledger.allowed()),
    }


def _observed(value: int) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": 1, "unit": "bytes", "method": "observed once"}
