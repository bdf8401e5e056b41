"""What a captured step may not do: depend on the host. Replays are run with everything on the host as it was.

A CUDA graph replays device work alone. Here a replay runs the step's operations, kernels interpreted,
while the counts on the host stand still; a step that asked them would go another way than the eager engine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvbench.cache import Budget, Policy
from kvbench.errors import NonFiniteChoiceError
from kvbench.kernels.dispatch import kernels_forced
from kvbench.policies.h2o import H2O
from kvbench.tasks.decode import CacheSetting, GraphDecoding
from kvbench.tasks.decode import greedy as answers
from tests.tasks.benches import NanAtDecode
from tests.tasks.frozen import freeze_host
from tests.tasks.test_graph import greedy, loaded, padded_batch

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures the step for real")

STEPS = 4


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    freeze_host(monkeypatch)


def decoded(policy: Policy, engine: Any, by_kernels: bool, steps: int = STEPS, num_layers: int = 2) -> tuple[Any, ...]:
    setting = CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions=policy.native_positions, engine=engine)
    model = loaded("llama_gqa", torch.float32)
    del model.model.model.layers[num_layers:]
    model.model.config.num_hidden_layers = num_layers
    with torch.inference_mode(), kernels_forced(by_kernels):
        decoding = setting.decoding(model, padded_batch(), steps)
        decoding.prepare()
        assert isinstance(decoding, GraphDecoding) == (engine == "graph")
        return (*greedy(decoding, steps), decoding.cache.occupancy())


@pytest.mark.long
@pytest.mark.usefixtures("frozen")
def test_replays_with_a_frozen_host_give_the_tokens_of_the_eager_engine() -> None:
    same_replays(H2O(), 2, num_layers=1)


@pytest.mark.long
@pytest.mark.usefixtures("frozen")
def test_both_engines_give_every_policy_the_same_tokens_while_the_host_stands_still(policy: Policy) -> None:
    same_replays(policy, 3, num_layers=2)


def same_replays(policy: Policy, steps: int, *, num_layers: int) -> None:
    tokens, held, logits, occupancy = decoded(policy, "eager", True, steps, num_layers)
    again, held_again, logits_again, occupancy_again = decoded(policy, "graph", True, steps, num_layers)
    assert torch.equal(again, tokens)
    assert held_again == held
    assert all(torch.equal(a, b) for a, b in zip(logits, logits_again, strict=True))
    assert occupancy_again == occupancy


@pytest.mark.usefixtures("frozen")
def test_a_captured_step_notes_victims_chosen_by_nan_without_a_wait() -> None:
    setting = CacheSetting(policy=NanAtDecode(), budget=Budget(tokens=5), positions="original", engine="graph")
    with torch.inference_mode(), kernels_forced(True):
        decoding = setting.decoding(loaded("llama_gqa", torch.float32), padded_batch(), STEPS)
        decoding.prepare()
        decoding.cache.check()  # the steps of a warm-up are undone
        with pytest.raises(NonFiniteChoiceError, match="layer 0"):
            answers(decoding, end_token_ids=(-1,), max_new_tokens=2)


@pytest.mark.long
@pytest.mark.usefixtures("frozen")
def test_a_chunk_between_captured_steps_is_followed_by_a_new_capture() -> None:
    told = []
    for engine in ("eager", "graph"):
        setting = CacheSetting(policy=H2O(), budget=Budget(tokens=6), positions="original", engine=engine)
        with torch.inference_mode(), kernels_forced(True):
            decoding = setting.decoding(loaded("llama_gqa", torch.float32), padded_batch(), 2)
            first = greedy(decoding, 2)
            decoding.extend(torch.tensor([[5, 9, 2], [4, 4, 8]]))
            told.append((first, greedy(decoding, 2), decoding.cache.occupancy()))
    for ours, theirs in zip(told[0][:2], told[1][:2], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
        assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))
    assert told[0][2] == told[1][2]


@pytest.mark.usefixtures("frozen")
def test_a_step_that_asks_the_host_is_found() -> None:
    """The check itself: plain torch on a CPU asks the ledger whether a row is over, and so never evicts here."""
    decoded(H2O(), "eager", by_kernels=False)
    with pytest.raises(RuntimeError, match="out of bounds"):
        decoded(H2O(), "graph", by_kernels=False)
