"""A prompt whose n x n attention would not fit into memory; only blocks of it may ever exist."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvbench.cache import Budget
from kvbench.cache.counts import LayerSetup
from kvbench.cache.layer import PolicyLayer
from kvbench.policies.h2o import H2O

PROMPT = 16_384
LIMIT_MIB = 400

SCRIPT = """
import resource, sys
import torch
from kvbench.cache import Budget
from kvbench.cache.layer import PolicyLayer
from kvbench.cache.counts import LayerSetup
from kvbench.policies.h2o import H2O

torch.set_num_threads(2)
prompt, limit = int(sys.argv[1]), int(sys.argv[2]) * 2**20
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
setup = dict(layer=0, num_layers=1, rotation=None, reserve_tokens=1, prompt_kind=None)
layer = PolicyLayer(LayerSetup(policy=H2O(), budget=Budget(fraction=0.1), **setup))
query, key, value = torch.randn(1, 2, prompt, 8), torch.randn(1, 1, prompt, 8), torch.randn(1, 1, prompt, 8)
padding = torch.ones(1, prompt, dtype=torch.bool)
padding[:, :100] = False
keys, values = layer.update(key, value)
layer.attend(query, keys, values, 8**-0.5, padding)
print(int(layer.slots.length), "held", layer.slots.entries.mass.sum() <= prompt)
try:
    torch.zeros(limit, dtype=torch.uint8)
except RuntimeError:
    print("the limit holds")
"""


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for one in tree_leaves(given):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return given


def test_no_operation_of_a_prompt_gives_a_square_of_its_length() -> None:
    prompt = 4096
    setup = {"layer": 0, "num_layers": 1, "rotation": None, "reserve_tokens": 1, "prompt_kind": None}
    layer = PolicyLayer(LayerSetup(policy=H2O(), budget=Budget(fraction=0.1), **setup))
    query, key, value = (torch.randn(1, heads, prompt, 8) for heads in (2, 1, 1))
    padding = torch.ones(1, prompt, dtype=torch.bool)
    padding[:, :100] = False
    with Largest() as largest:
        keys, values = layer.update(key, value)
        layer.attend(query, keys, values, 8**-0.5, padding)
    assert query.numel() <= largest.elements < prompt**2 / 4
    assert layer.slots is not None
    assert int(layer.slots.length) == (prompt - 100) // 10


@pytest.mark.long
def test_a_prompt_of_16k_tokens_needs_no_square_of_its_length() -> None:
    square_mib = 4 * 2 * PROMPT**2 / 2**20
    assert square_mib / 5 > LIMIT_MIB
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(PROMPT), str(LIMIT_MIB)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split("\n")[:2] == [f"{(PROMPT - 100) // 10} held tensor(True)", "the limit holds"], done.stderr
