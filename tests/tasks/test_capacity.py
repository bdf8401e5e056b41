from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbench.cache import Budget
from kvbench.datasets.text import Synthetic
from kvbench.errors import ConfigError
from kvbench.models.loader import LoadedModel, load_model
from kvbench.tasks import memory as capacity
from kvbench.tasks.memory import Capacity, largest_that_fits
from kvbench.tasks.task import TaskResult
from tests.models.architectures import small_spec
from tests.tasks.benches import FULL, bench_of, cut


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
