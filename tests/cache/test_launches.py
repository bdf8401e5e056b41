"""How many launches settling a prompt takes in a layer on a GPU, counted where the kernels are interpreted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kvbench.cache import Budget, Policy, PolicyCache
from kvbench.cache.attention import cache_argument
from kvbench.kernels.dispatch import interpreted, kernels_forced
from kvbench.policies.elastic import Elastic
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.voronoi import Voronoi
from kvbench.policies.snapkv import SnapKV
from tests.tiny_models import random_tokens, tiny_model

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(not interpreted(), reason="launches are counted where kernels are interpreted")

_VIEWS = (
    "view expand unsqueeze squeeze slice select alias as_strided transpose permute t detach _unsafe_view unbind split"
)
_NO_LAUNCH = {*_VIEWS.split(), "empty", "empty_like", "new_empty", "empty_strided"}
_NO_LAUNCH |= {"scalar_tensor"}  # a number of the host


class Launches(TorchDispatchMode):
    """Counts operations of torch that run on the device, and kernels of ours, by name."""

    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            made_of_others = func.decompose(*args, **(kwargs or {}))
        if made_of_others is not NotImplemented:
            return made_of_others
        name = func._schema.name.removeprefix("aten::")
        if name not in _NO_LAUNCH:
            self._counted[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def settling(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what settling launches, by name; what the interpreter itself asks of torch is none of it."""
    from triton.runtime.interpreter import GridExecutor

    counted: Counter[str] = Counter()
    original = GridExecutor.__call__

    def counting(executor: Any, *args: Any, **options: Any) -> Any:
        counted[f"kernel {executor.fn.__name__}"] += 1
        with _disable_current_modes():
            return original(executor, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", counting)
    return counted


def launches_of_a_layer(policy: Policy, counted: Counter[str]) -> Counter[str]:
    """Return what the last layer of a prompt launches to settle."""
    model = tiny_model("llama_gqa")

    @contextmanager
    def counting(device: torch.device) -> Iterator[None]:
        counted.clear()
        with Launches(counted):
            yield

    with kernels_forced(True), torch.inference_mode():
        cache = PolicyCache(model, policy, Budget(fraction=0.5), on_settle=counting)
        model(random_tokens(3, 1, 9), **cache_argument(model, cache))
    return Counter(counted)


MOST = [
    (Elastic(), 29),
    (H2O(), 14),
    pytest.param(SnapKV(num_recent=4, merge=Voronoi()), 40, marks=pytest.mark.long),
    pytest.param(SnapKV(num_recent=4), 28, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("policy", "most"), MOST)
def test_settling_a_layer_takes_no_more_launches(policy: Policy, most: int, settling: Counter[str]) -> None:
    found = launches_of_a_layer(policy, settling)
    assert 0 < found.total() <= most, dict(found)
