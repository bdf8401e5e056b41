"""A plain float64 forward of the tiny Llamas; every query is told what it sees, layer by layer and head by head.

Written from the definition of the model and not from the harness: no cache, no mask, no batching.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Sees = list[list[list[tuple[int, ...]]]]
"""Positions in sight: [query][layer][KV head]."""


def visible_entries(held: list[list[list[tuple[int, ...]]]], prompt: int) -> Sees:
    """Return what each query sees if `held[step][layer][head]` was held after the prompt and after each step."""
    layers, heads = len(held[0]), len(held[0][0])
    causal = [[[tuple(range(at + 1))] * heads] * layers for at in range(prompt)]
    steps = [[[(*head, prompt + step) for head in layer] for layer in before] for step, before in enumerate(held[:-1])]
    return causal + steps


def visible_logits(model: Any, tokens: Tensor, sees: Sees, *, positions: str) -> Tensor:
    """Return logits (T, V) of tokens (T,), as `visible_pass` does."""
    return visible_pass(model, tokens, sees, positions=positions)[0]


@torch.no_grad()
def visible_pass(model: Any, tokens: Tensor, sees: Sees, *, positions: str) -> tuple[Tensor, Tensor]:
    """Return logits (T, V) and attention rows (L, H, G, T, T): what each query gave to each token it saw, else 0.

    in_cache: what a query sees stands at 0, 1, 2.. by age, and the query last. released: a token stands,
    for good, at the number of others that its first layer sees.
    """
    places = torch.arange(len(sees))
    if positions == "released":
        places = torch.tensor([max(len(head) for head in query[0]) - 1 for query in sees])
    hidden = _weight(model.model.embed_tokens)[tokens]
    all_rows = []
    for index, layer in enumerate(model.model.layers):
        normed = _normed(layer.input_layernorm, hidden)
        mixed, rows = _attention(model, layer.self_attn, normed, [query[index] for query in sees], places, positions)
        hidden = hidden + mixed
        all_rows.append(rows)
        normed = _normed(layer.post_attention_layernorm, hidden)
        gate, up = normed @ _weight(layer.mlp.gate_proj).T, normed @ _weight(layer.mlp.up_proj).T
        hidden = hidden + (functional.silu(gate) * up) @ _weight(layer.mlp.down_proj).T
    return _normed(model.model.norm, hidden) @ _weight(model.lm_head).T, torch.stack(all_rows)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.double()


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    scale: Tensor = (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return hidden / scale * _weight(norm)


def rotated(states: Tensor, position: Tensor, frequencies: Tensor) -> Tensor:
    """Return states (N, D) at `position` (N,): pairs (i, i + D / 2) turned, as complex numbers."""
    half = states.shape[-1] // 2
    turn = torch.polar(torch.ones(1, dtype=torch.float64), position.double()[:, None] * frequencies.double())
    pairs = torch.complex(states[:, :half].double(), states[:, half:].double()) * turn
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def _attention(
    model: Any, attn: Any, normed: Tensor, sees: list[list[tuple[int, ...]]], places: Tensor, positions: str
) -> tuple[Tensor, Tensor]:
    width, frequencies = attn.head_dim, model.model.rotary_emb.inv_freq
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    query, key, value = ((normed @ _weight(projection).T).unflatten(-1, (-1, width)) for projection in projections)
    group = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    all_rows = torch.zeros(key.shape[1], group, len(sees), len(sees), dtype=torch.float64)
    for at, heads in enumerate(sees):
        for head, visible in enumerate(heads):
            seen = torch.tensor(sorted(visible))
            assert int(seen[-1]) == at
            place = torch.arange(len(seen)) if positions == "in_cache" else places[seen]
            keys = rotated(key[seen, head], place, frequencies)
            mine = slice(head * group, (head + 1) * group)
            queries = rotated(query[at, mine], place[-1:].expand(group), frequencies)
            rows = (queries @ keys.T / width**0.5).softmax(dim=-1)
            output[at, mine] = rows @ value[seen, head]
            all_rows[head][:, at][:, seen] = rows
    return output.flatten(1) @ _weight(attn.o_proj).T, all_rows
