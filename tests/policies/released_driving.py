"""Drive layers of a policy and the released code side by side on the same random tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.cache import Budget, Policy
from kvbench.cache.counts import CountsShelf, LayerSetup
from kvbench.cache.layer import PolicyLayer
from kvbench.cache.released import Pool, departures_of
from tests.policies.released_code import Code, CodeStopsError, Layer, Token

WIDTH = 4
SCALE = WIDTH**-0.5


@dataclass(frozen=True, kw_only=True)
class Drive:
    """One prompt and `steps` tokens through `layers` layers."""

    prompt: int
    steps: int
    layers: int = 2
    heads: int = 2
    group: int = 1
    seed: int = 0


def policy_layers(policy: Policy, budget: Budget, count: int) -> list[PolicyLayer]:
    pool = Pool() if departures_of(policy).pools_layers else None
    setups = [
        LayerSetup(
            layer=index,
            num_layers=count,
            policy=policy,
            budget=budget,
            rotation=None,
            reserve_tokens=0,
            prompt_kind=None,
            pool=pool,
        )
        for index in range(count)
    ]
    shelf = CountsShelf()
    return [PolicyLayer(setup, shelf) for setup in setups]


def tokens_held(layer: PolicyLayer, head: int = 0) -> list[int]:
    """Positions held by a head of the first row, oldest first."""
    return [position for position, _ in _held(layer, head)]


def _held(layer: PolicyLayer, head: int) -> list[tuple[int, int]]:
    assert layer.slots is not None
    return sorted((p, slot) for slot, p in enumerate(layer.slots.entries.position[0, head].tolist()) if p >= 0)


def compare(policy: Policy, budget: Budget, code: Code, drive: Drive) -> int:
    """Assert equality after every forward until the end, or until the code stops; return the forwards compared."""
    torch.manual_seed(drive.seed)
    ours, seen = policy_layers(policy, budget, drive.layers), 0
    theirs: list[Layer] = [[] for _ in range(drive.layers)]
    for number, new in enumerate([drive.prompt] + [1] * drive.steps):
        tensors = [_tensors(drive, new) for _ in range(drive.layers)]
        rows = []
        for layer, (query, key, value) in zip(theirs, tensors, strict=True):
            layer += [Token(index=seen + i, key=key[0, :, i], value=value[0, :, i]) for i in range(new)]
            rows.append(_attention(query[0], layer, drive.group))
        seen += new
        for slow, layer, row, (query, key, value) in zip(theirs, ours, rows, tensors, strict=True):
            keys, values = layer.update(key, value)
            output = layer.attend(query, keys, values, SCALE, None)
            torch.testing.assert_close(output[0], _output(row, slow, drive.group), rtol=1e-4, atol=1e-5)
        try:
            theirs = code.cut(theirs, seen, rows)
        except CodeStopsError:
            return number
        if code.margin < 1e-6:
            return number
        for slow, layer in zip(theirs, ours, strict=True):
            _same(slow, layer, drive.heads)
    return drive.steps + 1


def _tensors(drive: Drive, new: int) -> tuple[Tensor, Tensor, Tensor]:
    query = 3 * torch.randn(1, drive.heads * drive.group, new, WIDTH)
    return query, torch.randn(1, drive.heads, new, WIDTH), torch.randn(1, drive.heads, new, WIDTH)


def _attention(query: Tensor, layer: Layer, group: int) -> Tensor:
    keys = torch.stack([token.key for token in layer], dim=1).repeat_interleave(group, dim=0)
    logits = query @ keys.transpose(-1, -2) * SCALE
    new, held = logits.shape[-2:]
    hidden = torch.ones(new, held, dtype=torch.bool).tril(held - new).logical_not()
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def _output(rows: Tensor, layer: Layer, group: int) -> Tensor:
    return rows @ torch.stack([token.value for token in layer], dim=1).repeat_interleave(group, dim=0)


def _same(slow: Layer, layer: PolicyLayer, heads: int) -> None:
    assert layer.slots is not None
    for head in range(heads):
        held = _held(layer, head)
        assert [position for position, _ in held] == [token.index for token in slow]
        slots = [slot for _, slot in held]
        keys, values = (torch.stack([getattr(t, name)[head] for t in slow]) for name in ("key", "value"))
        torch.testing.assert_close(layer.slots.entries.keys[0, head, slots], keys, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.slots.entries.values[0, head, slots], values, rtol=1e-5, atol=1e-6)


def run(policy: Policy, budget: Budget, drive: Drive) -> list[list[list[int]]]:
    """Return the tokens held after every forward: [forward][layer], of the first head."""
    torch.manual_seed(drive.seed)
    layers, held = policy_layers(policy, budget, drive.layers), []
    for new in [drive.prompt] + [1] * drive.steps:
        for layer in layers:
            query, key, value = _tensors(drive, new)
            keys, values = layer.update(key, value)
            layer.attend(query, keys, values, SCALE, None)
        held.append([tokens_held(layer) for layer in layers])
    return held
