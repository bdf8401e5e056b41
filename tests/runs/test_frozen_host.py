"""What a captured step may not do: depend on the host. Replays are run with everything on the host as it was.

A CUDA graph replays device work alone. Here a replay runs the step's operations, kernels interpreted,
while the counts on the host stand still; a step that asked them would go another way than the eager engine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvbench.cache import Budget, Policy
from kvbench.kernels.dispatch import kernels_forced
from kvbench.policies.h2o import H2O
from kvbench.runs.graph import GraphDecoding
from kvbench.runs.loop import CacheSetting
from tests.runs.frozen import freeze_host
from tests.runs.test_graph import greedy, loaded, padded_batch

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures the step for real")

STEPS = 4


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    freeze_host(monkeypatch)


def decoded(policy: Policy, positions: Any, engine: Any, by_kernels: bool, steps: int = STEPS) -> tuple[Any, ...]:
    setting = CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions=positions, engine=engine)
    with torch.inference_mode(), kernels_forced(by_kernels):
        decoding = setting.decoding(loaded("llama_gqa", torch.float32), padded_batch(), steps)
        decoding.prepare()
        assert isinstance(decoding, GraphDecoding) == (engine == "graph")
        return (*greedy(decoding, steps), decoding.cache.occupancy())


@pytest.mark.usefixtures("frozen")
def test_replays_with_a_frozen_host_give_the_tokens_of_the_eager_engine() -> None:
    same_replays(H2O(), 2)


@pytest.mark.long
@pytest.mark.usefixtures("frozen")
def test_replays_of_every_policy_with_a_frozen_host_give_the_tokens_of_the_eager_engine(policy: Policy) -> None:
    same_replays(policy, STEPS)


def same_replays(policy: Policy, steps: int) -> None:
    positions = policy.native_positions
    tokens, held, logits, occupancy = decoded(policy, positions, "eager", True, steps)
    again, held_again, logits_again, occupancy_again = decoded(policy, positions, "graph", True, steps)
    assert torch.equal(again, tokens)
    assert held_again == held
    assert all(torch.equal(a, b) for a, b in zip(logits, logits_again, strict=True))
    assert occupancy_again == occupancy


@pytest.mark.usefixtures("frozen")
def test_a_step_that_asks_the_host_is_found() -> None:
    """The check itself: plain torch on a CPU asks the ledger whether a row is over, and so never evicts here."""
    decoded(H2O(), "original", "eager", by_kernels=False)
    with pytest.raises(RuntimeError, match="out of bounds"):
        decoded(H2O(), "original", "graph", by_kernels=False)
