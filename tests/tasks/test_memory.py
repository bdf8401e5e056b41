from __future__ import annotations

import mmap

import psutil
import pytest
import torch
from torch import nn

from kvbench.tasks import memory as allocation
from kvbench.tasks.memory import PhasePeaks, StorageCounter, parameter_bytes, reset_resident_peak, resident_peak_bytes

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
