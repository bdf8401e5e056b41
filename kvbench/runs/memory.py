"""Peak memory by phase and the bytes the cache really stores, in a pass of its own."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from kvbench.errors import ConfigError
from kvbench.metrics.allocation import PhasePeaks, parameter_bytes, reset_resident_peak, resident_peak_bytes
from kvbench.models.inputs import PromptBatch, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.runs.launch import repeated
from kvbench.runs.loop import CacheSetting
from kvbench.runs.task import Bench, TaskResult
from kvbench.runs.vision_phase import around_vision

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One launch of `new_tokens` steps on the first `batch_size` prompts, peaks noted per phase.

    load = weights and buffers; vision, prefill, settle (the policy's share of the prompt) and decode =
    everything alive at the phase's peak, weights included. KV bytes at the end: stored from storages,
    theoretical what the budget implies, valid what is held, without the free slot and slots not yet
    used; beside them what attention statistics left, and the bookkeeping. Before the launch the prompt runs
    through the model without any cache: what comes on top of the weights there is the plain model's own, and
    part of the bound that the peak is compared with.
    """

    protocol: ClassVar[str] = "phases_v3"
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
        batch = prompt_batch(loaded, repeated(bench.examples, self.batch_size))
        weights_bytes = parameter_bytes(loaded.model)
        inputs_bytes = sum(tensor.untyped_storage().nbytes() for tensor in batch.tensors.values())
        activation_bytes = _plain_activation_bytes(loaded, batch, weights_bytes + inputs_bytes)
        peaks = PhasePeaks(device=loaded.device, base_bytes=weights_bytes + inputs_bytes)
        resident_is_fresh = reset_resident_peak()
        cache = self._launch(loaded, batch, bench.setting, peaks)
        bench.advance(1.0)
        numbers = {f"peak_{name}_bytes": value for name, value in peaks.peak_bytes.items()}
        numbers["peak_load_bytes"] = weights_bytes
        numbers["peak_memory_bytes"] = max(peaks.peak_bytes.values())
        numbers["plain_activation_bytes"] = activation_bytes
        if peaks.reserved_bytes:
            numbers["peak_reserved_bytes"] = peaks.reserved_bytes
        if resident_is_fresh:
            numbers["peak_rss_bytes"] = resident_peak_bytes()
        numbers |= _kv_bytes(cache)
        result = TaskResult()
        for name, value in numbers.items():
            result.measurements[name] = _observed(value, "bytes")
        bound = weights_bytes + inputs_bytes + activation_bytes + numbers["kv_theoretical_bytes"]
        bound += _entry_bytes(cache) * batch.kind.numel()
        result.measurements["peak_over_bound_ratio"] = _observed(numbers["peak_memory_bytes"] / bound, "")
        return result

    @torch.inference_mode()
    def _launch(self, loaded: LoadedModel, batch: PromptBatch, setting: CacheSetting, peaks: PhasePeaks) -> PolicyCache:
        _free_what_is_cached(loaded.device)
        with peaks.phase("prefill"), around_vision(loaded.model, peaks.phase("vision")):
            decoding = setting.decoding(loaded, batch, self.new_tokens, on_settle=lambda: peaks.phase("settle"))
            token = decoding.logits.argmax(dim=-1)
        with peaks.phase("decode"):
            decoding.prepare()
            for _ in range(self.new_tokens - 1):
                token = decoding.step(token).argmax(dim=-1)
        decoding.cache.check()
        return decoding.cache


@torch.inference_mode()
def _plain_activation_bytes(loaded: LoadedModel, batch: PromptBatch, base_bytes: int) -> int:
    """Return the peak of the prompt's forward without any cache, above weights and inputs."""
    _free_what_is_cached(loaded.device)
    alive = torch.cuda.memory_allocated(loaded.device) if loaded.device.type == "cuda" else base_bytes
    peaks = PhasePeaks(device=loaded.device, base_bytes=base_bytes)
    with peaks.phase("plain"):
        loaded.model(**batch.tensors, position_ids=batch.position_ids, use_cache=False, logits_to_keep=1)
    loaded.beat()
    return peaks.peak_bytes["plain"] - alive


def _free_what_is_cached(device: torch.device) -> None:
    """Let go of what an earlier task left in a cycle or in the allocator; a CPU counts what is made from here on."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _entry_bytes(cache: PolicyCache) -> int:
    """Return the bytes of one token's key and value in one layer."""
    first = cache.policy_layers[0].keys
    assert first is not None
    _, heads, _, width = first.shape
    return 2 * heads * width * first.element_size()


def _kv_bytes(cache: PolicyCache) -> dict[str, int]:
    held = cache.occupancy()
    allowed = sum(cache.policy_layers[0].ledger.allowed())
    return {
        "kv_stored_bytes": held.stored_bytes,
        "kv_valid_bytes": held.valid_bytes,
        "statistics_bytes": held.statistics_bytes,
        "bookkeeping_bytes": held.bookkeeping_bytes,
        "kv_theoretical_bytes": _entry_bytes(cache) * len(cache.policy_layers) * allowed,
    }


def _observed(value: float, unit: str) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": 1, "unit": unit, "method": "observed once"}
