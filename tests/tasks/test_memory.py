"""Bytes that are known are counted, and the largest batch that fits is found."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kvbench.cache import Budget
from kvbench.datasets.text import Synthetic
from kvbench.errors import ConfigError
from kvbench.models.loader import LoadedModel, load_model
from kvbench.tasks import memory as allocation
from kvbench.tasks import memory as capacity
from kvbench.tasks.memory import (
    Capacity,
    PhasePeaks,
    StorageCounter,
    largest_that_fits,
    parameter_bytes,
    reset_resident_peak,
    resident_peak_bytes,
)
from kvbench.tasks.task import TaskResult
from tests.models.architectures import small_spec
from tests.tasks.benches import FULL, bench_of, cut

KIB = torch.Size([256])  # float32


def test_known_tensors_are_counted_to_the_byte() -> None:
    with StorageCounter() as counter:
        kept = [torch.zeros(KIB), torch.empty(100, dtype=torch.int8), torch.ones(3, 5, dtype=torch.float64)]
    assert counter.live_bytes == counter.peak_bytes == 1024 + 100 + 120
    assert len(kept) == 3


def test_a_freed_tensor_is_subtracted_and_the_peak_stays() -> None:
    with StorageCounter() as counter:
        first = torch.zeros(KIB)
        del first
        assert counter.live_bytes == 0
        second = torch.zeros(KIB) + 1
    assert (counter.live_bytes, counter.peak_bytes) == (1024, 2048)
    del second
    assert counter.live_bytes == 0, "a tensor freed after the phase counts as freed too"


def test_views_and_work_in_place_are_not_counted_twice() -> None:
    outside = torch.zeros(64, 4)
    with StorageCounter() as counter:
        whole = torch.zeros(64, 4)
        views = [whole.view(-1), whole.t(), whole[3:], whole.expand(2, 64, 4), whole.detach(), outside[1:]]
        whole.add_(1)
        whole.masked_fill_(whole > 0, 2.0)
    assert counter.live_bytes == 1024
    del whole
    assert counter.live_bytes == 1024, "a view keeps the storage alive"
    views.clear()
    assert counter.live_bytes == 0


def test_many_short_lives_end_at_zero() -> None:
    with StorageCounter() as counter, torch.inference_mode():
        for size in range(1, 200):
            torch.rand(size).softmax(dim=0).sum()
    assert counter.live_bytes == 0
    assert 0 < counter.peak_bytes < 4 * 3 * 200


def test_a_phase_counts_weights_and_what_earlier_phases_left() -> None:
    peaks = PhasePeaks(devices=[torch.device("cpu")], base_bytes=10_000)
    with peaks.phase("prefill"):
        kept = torch.zeros(KIB)
        big = torch.zeros(4, 256)
        del big
    with peaks.phase("decode"):
        small = torch.zeros(16)
    assert peaks.peak_bytes == {"prefill": 10_000 + 5 * 1024, "decode": 10_000 + 1024 + 64}
    del kept
    with peaks.phase("decode"):
        pass
    assert peaks.peak_bytes["decode"] == 10_000 + 1024 + 64, "the largest of a phase's peaks counts"
    assert small.numel() == 16


def test_a_phase_inside_another_takes_its_moments_away_from_it() -> None:
    peaks = PhasePeaks(devices=[torch.device("cpu")], base_bytes=0)
    with peaks.phase("prefill"):
        kept = torch.zeros(KIB)
        for size in (8, 2):
            with peaks.phase("settle"):
                torch.zeros(size, 256)
        torch.zeros(3, 256)
    assert peaks.peak_bytes == {"prefill": 4 * 1024, "settle": 9 * 1024}
    assert kept.numel() == 256


def test_a_phase_that_fails_leaves_the_counters_usable() -> None:
    peaks = PhasePeaks(devices=[torch.device("cpu")], base_bytes=0)
    with pytest.raises(ValueError, match="stop"), peaks.phase("prefill"), peaks.phase("settle"):
        raise ValueError("stop")
    with peaks.phase("decode"):
        torch.zeros(KIB)
    assert peaks.peak_bytes == {"prefill": 0, "settle": 0, "decode": 1024}


def test_shared_weights_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    own = parameter_bytes(model)
    model[1].weight = model[0].weight
    assert own - parameter_bytes(model) == 8 * 8 * 4
    assert own == 2 * 256 + 2 * 32 + 2 * 32 + 8


def test_the_resident_peak_holds_what_was_resident_for_a_moment() -> None:
    """A mapping of its own, written page by page: an allocator may hand out memory that is resident already."""
    if not reset_resident_peak():
        pytest.skip("the system keeps no peak that can be started anew")
    before = resident_peak_bytes()
    size = 64 * 2**20
    with mmap.mmap(-1, size) as large:
        large.write(b"x" * size)
        while_mapped = psutil.Process().memory_info().rss
    slack = 2**20
    assert resident_peak_bytes() >= max(before, while_mapped) - slack


def test_a_reset_that_changes_nothing_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "resident_peak_bytes", lambda: 10**12)
    assert not reset_resident_peak()


@given(true_size=st.integers(0, 300), limit=st.integers(1, 300))
def test_the_search_finds_the_largest_size_in_few_tries(true_size: int, limit: int) -> None:
    tries: list[int] = []

    def fits(size: int) -> bool:
        assert 1 <= size <= limit
        tries.append(size)
        return size <= true_size

    assert largest_that_fits(fits, limit) == min(true_size, limit)
    assert len(tries) == len(set(tries)) <= 2 * limit.bit_length() + 1


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    return load_model(small_spec("llama-3.1-8b"), "cpu")


def with_room_for(entries: int, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    """Give the device room for so many entries of 2 layers, 2 KV heads of width 8; a real launch stores them."""
    real = capacity.launch

    def launch(*arguments: Any, observe: Any, **options: Any) -> Any:
        def look(cache: Any) -> None:
            observe(cache)
            held = cache.occupancy()
            if held.stored_bytes > entries * 2 * 2 * 2 * 8 * 4:
                raise error or torch.OutOfMemoryError("no room")

        return real(*arguments, **options, observe=look)

    monkeypatch.setattr(capacity, "launch", launch)


def run(loaded: LoadedModel, folder: Path, setting: Any, **options: int) -> TaskResult:
    """Prompts of 20 tokens; the full cache stores 24 entries for each, 3 new tokens and a free slot included."""
    bench = replace(bench_of(loaded, folder, setting), examples=Synthetic(prompt_tokens=20).examples())
    return Capacity(new_tokens=3, num_launches=2, **options).run(bench)


def test_a_smaller_budget_fits_more_prompts(
    small: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(75, monkeypatch)
    result = run(small, tmp_path, cut(Budget(tokens=9)), max_batch_size=64)
    found = {name: entry["value"] for name, entry in result.measurements.items()}
    assert found["capacity_prompts"] == 7, "9 entries and a free slot each"
    assert found["full_capacity_prompts"] == 3
    assert found["capacity_ratio_to_full"] == 7 / 3
    assert found["capacity_throughput_tokens_per_s"] > 0
    tried = result.curves["capacity_tries"]
    assert [0, 7, 1.0] in tried
    assert [0, 8, 0.0] in tried
    assert {arm for arm, _, _ in tried} == {0, 1}


def test_a_search_that_ends_at_its_limit_says_so(small: LoadedModel, tmp_path: Path) -> None:
    result = run(small, tmp_path, cut(Budget(tokens=9)), max_batch_size=2)
    assert result.measurements["capacity_prompts"]["value"] == 2
    assert "limit of the search" in result.measurements["capacity_prompts"]["method"]


def test_a_full_cache_that_never_fits_leaves_the_policy_alone(
    small: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(23, monkeypatch)
    found = run(small, tmp_path, cut(Budget(tokens=9))).measurements
    assert found["capacity_prompts"]["value"] == 2
    assert found["full_capacity_prompts"]["value"] == 0
    assert "capacity_ratio_to_full" not in found


def test_not_even_one_prompt_is_out_of_memory(
    small: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(10, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        run(small, tmp_path, FULL)


def test_memory_runs_out_in_other_words_too(
    small: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(75, monkeypatch, RuntimeError("Triton Error [CUDA]: out of memory"))
    found = run(small, tmp_path, cut(Budget(tokens=9)), max_batch_size=64).measurements
    assert found["capacity_prompts"]["value"] == 7


def test_an_error_that_is_not_about_memory_ends_the_search(
    small: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(75, monkeypatch, RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        run(small, tmp_path, cut(Budget(tokens=9)), max_batch_size=64)


@pytest.mark.parametrize("wrong", [{"new_tokens": 2}, {"num_launches": 0}, {"max_batch_size": 0}])
def test_a_number_out_of_range_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="it must be at least"):
        Capacity(**wrong)
