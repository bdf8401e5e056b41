from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, PolicyCache, View
from kvbench.contract.driving import drive
from kvbench.errors import ConfigError
from kvbench.policies.snapkv import SnapKV
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model


def view_with(window: Tensor, position: Tensor, budget: int) -> View:
    rows = position.shape[0]
    seen = position.amax(dim=(1, 2)) + 1
    states = torch.zeros(*position.shape, 4)
    return View(
        layer=0,
        num_layers=1,
        new_tokens=position.shape[-1],
        prefill=True,
        prompt=seen,
        seen=seen,
        budget=torch.full((rows,), budget),
        prompt_budget=torch.full((rows,), budget),
        row_seed=torch.zeros(rows, dtype=torch.int64),
        keys=states,
        values=states,
        position=position,
        kind=torch.zeros_like(position, dtype=torch.int8),
        window_or_none=window,
    )


def kept_by_the_paper(votes: list[float], budget: int, policy: SnapKV) -> set[int]:
    """Positions that stay: vote, pool over the part before the window, take the best; in plain Python."""
    length = len(votes)
    window = min(policy.num_recent, budget)
    prefix = votes[: max(0, length - policy.num_recent)]
    reach = policy.kernel_tokens // 2
    pooled = []
    for at in range(length):
        near = [prefix[k] if 0 <= k < len(prefix) else 0.0 for k in range(at - reach, at + reach + 1)]
        pooled.append(max(near) if policy.pooling == "max" else sum(near) / len(near))
    newest = set(range(length - window, length))
    others = sorted(set(range(length)) - newest, key=lambda at: (pooled[at], at), reverse=True)
    return newest | set(others[: budget - len(newest)])


@settings(max_examples=share_of(60), deadline=None)
@given(data=st.data())
def test_what_stays_is_what_the_paper_describes(data: st.DataObject) -> None:
    length = data.draw(st.integers(5, 40))
    policy = SnapKV(
        num_recent=data.draw(st.integers(1, 6)),
        kernel_tokens=data.draw(st.sampled_from([1, 3, 5, 7])),
        pooling=data.draw(st.sampled_from(["max", "avg"])),
    )
    budget = data.draw(st.integers(1, length - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    # Whole numbers of sixteenths, so that sums are exact and ties are real.
    window = torch.randint(0, 16, (2, 2, 8, length), generator=generator) / 16.0
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(4)]).reshape(2, 2, length)
    by_slot = window.gather(-1, order[:, :, None].expand_as(window))
    plan = policy.plan(view_with(by_slot, order, budget))
    assert plan is not None
    for row in range(2):
        for head in range(2):
            votes = window[row, head, -policy.num_recent :].sum(dim=0).double().tolist()
            kept = set(order[row, head][plan.keep[row, head]].tolist())
            if policy.pooling == "max":
                assert kept == kept_by_the_paper(votes, budget, policy)
            else:  # sums of a mean differ in the last bit, so a tie may fall either way
                assert len(kept) == budget


def test_average_pooling_keeps_the_neighbourhood_of_a_peak_that_has_company() -> None:
    votes = torch.zeros(1, 1, 4, 30)
    votes[..., 5] = 3.0  # alone
    votes[..., 15:18] = 2.0  # three together
    position = torch.arange(30)[None, None]
    kept = {}
    for pooling in ("max", "avg"):
        policy = SnapKV(num_recent=4, kernel_tokens=3, pooling=pooling)  # type: ignore[arg-type]
        plan = policy.plan(view_with(votes, position, 7))
        assert plan is not None
        kept[pooling] = set(plan.keep[0, 0].nonzero()[:, 0].tolist()) - {26, 27, 28, 29}
    assert kept == {"max": {4, 5, 6}, "avg": {15, 16, 17}}


def test_generated_tokens_all_stay() -> None:
    model = tiny_model("llama_gqa")
    cache = PolicyCache(model, SnapKV(num_recent=4), Budget(tokens=9))
    trace = drive(model, cache, random_tokens(3, 1, 50), 30)
    first, last = trace.held[0], trace.held[-1]
    for before, after in zip(first, last, strict=True):
        for old, new in zip(before[0], after[0], strict=True):
            assert len(old) == 9
            assert {26, 27, 28, 29} <= set(old)
            assert new == (*old, *range(30, 50))


@pytest.mark.parametrize(
    "wrong", [{"num_recent": 0}, {"num_recent": 33}, {"kernel_tokens": 4}, {"kernel_tokens": 0}, {"pooling": "mean"}]
)
def test_a_setting_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SnapKV(**wrong)  # type: ignore[arg-type]
