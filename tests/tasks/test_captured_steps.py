"""One captured step for all batches of a shape under a setting: as many captures as needed, and the same tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Needs, Policy, ScorePolicy, View
from kvbench.cache.policy import is_ragged, keeps_ring
from kvbench.contract.driving import Held, left_padded
from kvbench.kernels.dispatch import kernels_forced
from kvbench.models.inputs import PromptBatch
from kvbench.policies.allocation.ada import Ada
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.cam import CaM
from kvbench.policies.merge.d2o import D2O
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.tasks import decode
from kvbench.tasks.decode import CacheSetting, CapturedSteps, Decoding
from tests.tasks.frozen import freeze_host
from tests.tasks.test_graph import ON, greedy, loaded
from tests.tiny_models import random_tokens

STEPS = 3
SNAP = SnapKV(num_recent=3)
on_the_cpu = pytest.mark.skipif(ON == "cuda", reason="a GPU captures the step for real")


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every capture; on a CPU a replay runs the step itself."""
    if ON == "cpu":
        freeze_host(monkeypatch)
    counted: list[int] = []
    capture = decode.captured
    monkeypatch.setattr(decode, "captured", lambda *what: [counted.append(1), capture(*what)][1])
    return counted


def batch(number: int, *, longest: int = 17, rows: int = 2) -> PromptBatch:
    """Prompts of their own; the last is as long as the longest, the others have pads."""
    lengths = [*(9 + (number + row) % 5 for row in range(rows - 1)), longest]
    prompt, mask = left_padded([random_tokens(10 * number + row, length) for row, length in enumerate(lengths)])
    return PromptBatch(
        tensors={"input_ids": prompt.to(ON), "attention_mask": mask.to(ON)},
        kind=torch.zeros_like(prompt, dtype=torch.int8).to(ON),
        row_seeds=tuple(range(number, number + rows)),
    )


def setting_of(policy: Policy, *, positions: Any = "original", engine: Any = "graph") -> CacheSetting:
    return CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions=positions, engine=engine)


def answered(
    setting: CacheSetting, given: PromptBatch, steps: CapturedSteps | None, num_steps: int = STEPS
) -> tuple[Tensor, list[Held], list[Tensor], Any]:
    decoding = setting.decoding(loaded("llama_gqa", torch.float32), given, STEPS, steps=steps)
    return *greedy(decoding, num_steps), decoding.cache.occupancy()


def same_answers(setting: CacheSetting, given: PromptBatch, steps: CapturedSteps, num_steps: int = STEPS) -> None:
    tokens, held, logits, occupancy = answered(replace(setting, engine="eager"), given, None, num_steps)
    again, held_again, logits_again, occupancy_again = answered(setting, given, steps, num_steps)
    assert torch.equal(again, tokens)
    assert held_again == held
    assert all(torch.equal(a, b) for a, b in zip(logits, logits_again, strict=True))
    assert occupancy_again == occupancy


@on_the_cpu
@torch.inference_mode()
@pytest.mark.parametrize("positions", ["original", "in_cache", "released"])
def test_batches_of_a_shape_share_one_capture(captures: list[int], positions: Any) -> None:
    steps = CapturedSteps()
    for number in (1, 2, 3):
        same_answers(setting_of(SNAP, positions=positions), batch(number), steps)
    assert len(captures) == 1


@pytest.mark.long
@on_the_cpu
@torch.inference_mode()
def test_a_policy_that_evicts_goes_on_in_the_buffers_of_an_earlier_batch(captures: list[int]) -> None:
    steps = CapturedSteps()
    with kernels_forced(True):
        for number in (1, 2):
            same_answers(setting_of(H2O()), batch(number), steps, 2)
    assert len(captures) == 1


@pytest.mark.gpu
@pytest.mark.skipif(ON == "cpu", reason="a CUDA graph needs a CUDA device")
@torch.inference_mode()
def test_every_policy_shares_one_capture_on_a_gpu(captures: list[int], policy: Policy, positions: Any) -> None:
    steps = CapturedSteps()
    for number in (1, 2, 3):
        same_answers(setting_of(policy, positions=positions), batch(number), steps)
    divided = isinstance(policy, ScorePolicy) and policy.allocation is not None and policy.allocation.waits
    assert len(captures) == 1 or is_ragged(policy) or keeps_ring(policy) or divided, "shapes that follow from the data"


@on_the_cpu
@torch.inference_mode()
def test_ragged_buffers_serve_a_batch_whose_heads_hold_as_many(captures: list[int]) -> None:
    steps = CapturedSteps()
    for number in (1, 2, 1):
        same_answers(setting_of(SnapKV(num_recent=3, allocation=Ada())), batch(number), steps)
    assert 1 <= len(captures) <= 2, "the batch that came again needs no capture"


@dataclass(frozen=True, kw_only=True)
class LooksBack(ScorePolicy):
    """Reads the rows of the last queries wherever it plans, so that they are kept."""

    needs: ClassVar[Needs] = Needs.WINDOW
    window_tokens: ClassVar[int] = 3

    def score(self, view: View) -> Tensor:
        return view.window.sum(dim=2)


@on_the_cpu
@torch.inference_mode()
@pytest.mark.parametrize(("policy", "num_captures"), [(H2O(every_tokens=2), 1), (LooksBack(every_tokens=2), 2)])
def test_blocks_are_cut_between_captured_steps(captures: list[int], policy: ScorePolicy, num_captures: int) -> None:
    """Buffers that were cut in place serve the next batch; kept queries lie outside of them, so a capture is anew."""
    steps = CapturedSteps()
    for number in (1, 2):
        same_answers(setting_of(policy), batch(number), steps)
    assert len(captures) == num_captures


@dataclass(frozen=True, kw_only=True)
class Hears(ScorePolicy):
    """Notes a number of what the attention is given of each token."""

    needs: ClassVar[Needs] = Needs.HIDDEN

    def note(self, view: View) -> Tensor:
        return view.hidden[..., : view.keys.shape[1]].transpose(1, 2)

    def score(self, view: View) -> Tensor:
        return view.noted


@on_the_cpu
@torch.inference_mode()
def test_what_a_step_notes_is_captured_and_goes_on_in_the_buffers_of_an_earlier_batch(captures: list[int]) -> None:
    steps = CapturedSteps()
    for number in (1, 2, 3):
        same_answers(setting_of(Hears(num_recent=2)), batch(number), steps)
    assert len(captures) == 1


@on_the_cpu
@torch.inference_mode()
@pytest.mark.parametrize("policy", [StreamingLLM(merge=CaM(spread_tokens=2)), H2O(merge=D2O())], ids=["cam", "d2o"])
def test_what_warming_up_merged_is_undone_and_replays_merge(captures: list[int], policy: ScorePolicy) -> None:
    steps = CapturedSteps()
    for number in (1, 2):
        same_answers(setting_of(policy), batch(number), steps)
    assert len(captures) == 1


@on_the_cpu
@torch.inference_mode()
def test_another_shape_or_setting_is_captured_for_itself(captures: list[int]) -> None:
    steps = CapturedSteps()
    first, other = setting_of(SNAP), replace(setting_of(SNAP), budget=Budget(fraction=0.25))
    for setting, given in (
        (first, batch(1)),
        (first, batch(1, longest=23)),
        (first, batch(1, rows=3)),
        (other, batch(1)),
    ):
        before = len(captures)
        same_answers(setting, given, steps)
        assert len(captures) == before + 1
    for setting, given in ((first, batch(4)), (other, batch(4)), (first, batch(5, rows=3))):
        same_answers(setting, given, steps)
    assert len(captures) == 4


@on_the_cpu
@torch.inference_mode()
def test_two_decodings_at_a_time_have_buffers_of_their_own(captures: list[int]) -> None:
    steps, setting, model = CapturedSteps(), setting_of(SNAP), loaded("llama_gqa", torch.float32)

    def both(engine: Any, kept: CapturedSteps | None) -> list[Tensor]:
        some: list[Decoding] = [
            replace(setting, engine=engine).decoding(model, batch(number), STEPS, steps=kept) for number in (1, 2)
        ]
        return [one.step(torch.tensor([3, 4])).clone() for _ in range(STEPS) for one in some]

    expected = both("eager", None)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(both("graph", steps), expected, strict=True))
    assert len(captures) == 2


@on_the_cpu
@torch.inference_mode()
def test_buffers_that_had_to_grow_serve_nobody_else(captures: list[int]) -> None:
    steps = CapturedSteps()
    same_answers(setting_of(SNAP), batch(1), steps, STEPS + 4)
    same_answers(setting_of(SNAP), batch(2), steps)
    assert len(captures) == 2


@on_the_cpu
@torch.inference_mode()
def test_what_a_model_keeps_on_the_cache_is_not_shared(captures: list[int]) -> None:
    steps, model = CapturedSteps(), loaded("llama_gqa", torch.float32)
    for number in (1, 2):
        decoding = setting_of(SNAP).decoding(model, batch(number), STEPS, steps=steps)
        decoding.cache.stretch = torch.ones(2)  # type: ignore[attr-defined]
        decoding.prepare()
    assert len(captures) == 2


@on_the_cpu
@torch.inference_mode()
def test_what_came_first_stays_where_all_would_take_too_much(captures: list[int]) -> None:
    settings = [replace(setting_of(SNAP), budget=Budget(tokens=number)) for number in (8, 9, 10)]
    model = loaded("llama_gqa", torch.float32)
    sizes = [setting.decoding(model, batch(1), STEPS).cache.occupancy().stored_bytes for setting in settings]
    steps = CapturedSteps(most_bytes=sizes[0] + sizes[1])
    for number, expected in ((1, 3), (2, 4), (3, 5)):
        for setting in settings:
            answered(setting, batch(number), steps)
        assert len(captures) == expected, "only the third setting is captured for every batch"
    nothing = CapturedSteps(most_bytes=0)
    for number in (1, 2):
        same_answers(settings[0], batch(number), nothing)
    assert len(captures) == 7


def test_steps_that_are_let_go_leave_nothing(captures: list[int]) -> None:
    steps = CapturedSteps()
    for _ in range(2):
        with torch.inference_mode():
            answered(setting_of(SNAP), copy.copy(batch(1)), steps)
        steps.clear()
    assert len(captures) == 2
