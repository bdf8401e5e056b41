"""Turning rotary keys: by a difference of positions, as if they had been rotated there."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvbench.cache.positions import Rotation, rotation_of
from kvbench.contract.equality import rotated
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2", "qwen3", "llava"])
def test_turned_keys_are_those_the_model_would_have_made_there(name: str) -> None:
    decoder = tiny_model(name).get_decoder()
    torch.manual_seed(0)
    key, query = torch.randn(1, 2, 7, 8), torch.randn(1, 4, 7, 8)
    old, new = torch.arange(100, 107)[None], torch.tensor([[5, 0, 900, 100, 42, 7, 105]])
    _, then = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(key, old))
    _, there = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(key, new))
    turned = rotation_of(decoder).turn(then, (new - old)[:, None].expand(1, 2, 7))
    torch.testing.assert_close(turned, there, rtol=0, atol=2e-4)


def test_a_turn_is_a_complex_product_and_leaves_what_is_not_rotary() -> None:
    torch.manual_seed(0)
    states, by = torch.randn(5, 8), torch.tensor([0, 1, -3, 40, 7])
    turned = Rotation(frequencies=torch.tensor([1.0, 0.1, 0.01])).turn(states, by)
    expected = rotated(states[:, :6], by, torch.tensor([1.0, 0.1, 0.01]))
    torch.testing.assert_close(turned[:, :6].double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(turned[:, 6:], states[:, 6:])
    assert torch.equal(turned[0], states[0])


def test_bfloat16_keys_are_turned_in_float32() -> None:
    states = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    by, rotation = torch.full((5,), 2000), Rotation(frequencies=torch.tensor([1.0, 0.1]))
    turned = rotation.turn(states, by)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotation.turn(states.float(), by).bfloat16())
