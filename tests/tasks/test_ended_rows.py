"""What goes wrong in a row after its answer has ended is no fault of the cell: nothing of it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, ScorePolicy, View
from kvbench.errors import NonFiniteChoiceError
from kvbench.kernels.dispatch import kernels_forced
from kvbench.tasks.decode import CacheSetting, Decoding, forced, greedy
from tests.tasks.test_graph import loaded, padded_batch

PATHS = [False, *([pytest.param(True, marks=pytest.mark.long)] if find_spec("triton") else [])]
STEPS = 6
PROMPTS = (11, 17)


@dataclass(frozen=True, kw_only=True)
class NanLate(ScorePolicy):
    """By age, but has no number for the first row once that has seen `from_seen` tokens."""

    from_seen: int

    def score(self, view: View) -> Tensor:
        late = (view.seen >= self.from_seen) & (torch.arange(len(view.seen), device=view.seen.device) == 0)
        return view.position.float().masked_fill(late[:, None, None], torch.nan)


def decoding_of(nan_from_step: int, by_kernels: bool) -> Decoding:
    policy = NanLate(from_seen=PROMPTS[0] + nan_from_step)
    setting = CacheSetting(policy=policy, budget=Budget(tokens=6), positions="original")
    with torch.inference_mode(), kernels_forced(by_kernels):
        return setting.decoding(loaded("llama_gqa", torch.float32), padded_batch(), STEPS)


def answered(nan_from_step: int, by_kernels: bool, ends: set[int]) -> list[list[int]]:
    decoding = decoding_of(nan_from_step, by_kernels)
    with kernels_forced(by_kernels):
        return greedy(decoding, end_token_ids=ends, max_new_tokens=STEPS)


@pytest.mark.parametrize("by_kernels", PATHS)
def test_nan_after_a_rows_end_token_does_not_fail_the_others(by_kernels: bool) -> None:
    plain = answered(10**6, by_kernels, set())
    end = next(n for n in range(1, STEPS - 2) if plain[0][n] not in (*plain[0][:n], *plain[1]))
    expected = [plain[0][:end], plain[1]]
    assert answered(end + 1, by_kernels, {plain[0][end]}) == expected
    with pytest.raises(NonFiniteChoiceError, match=r"row and KV head \[0, "):
        answered(end, by_kernels, {plain[0][end]})


@pytest.mark.parametrize("by_kernels", PATHS)
def test_nan_after_a_rows_last_given_token_does_not_fail_the_others(by_kernels: bool) -> None:
    def fed(nan_from_step: int, lengths: Any) -> None:
        decoding = decoding_of(nan_from_step, by_kernels)
        with torch.inference_mode(), kernels_forced(by_kernels):
            assert len(list(forced(decoding, torch.full((2, STEPS), 5), lengths))) == STEPS
            decoding.cache.check()

    fed(4, [3, STEPS])
    fed(1, [0, STEPS])
    with pytest.raises(NonFiniteChoiceError, match=r"row and KV head \[0, "):
        fed(3, [3, STEPS])
