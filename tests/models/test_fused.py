"""A fused decode step beside the model's own, in half precision, through the interpreter where there is no GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, PolicyCache
from kvbench.kernels.dispatch import kernels_forced
from kvbench.models.fused import fuse, liger_installed
from kvbench.policies.h2o import H2O
from tests.driving import drive
from tests.tiny_models import random_tokens, tiny_model

pytest.importorskip("triton", reason="triton is not installed")

ON = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, STEPS = 9, 4


def half(name: str) -> Any:
    return copy.deepcopy(tiny_model(name)).to(ON, torch.float16)


def logits(model: Any, by_kernels: bool) -> Tensor:
    cache = PolicyCache(model, H2O(), Budget(fraction=0.5), reserve_tokens=STEPS)
    with kernels_forced(by_kernels):
        trace = drive(model, cache, random_tokens(1, 2, PROMPT + STEPS).to(ON), PROMPT)
    return torch.stack(trace.logits).float()


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha", "qwen2", "qwen3", "llava"])
def test_a_fused_step_gives_the_logits_of_the_models_own(name: str) -> None:
    plain, fused = half(name), half(name)
    fuse(fused)
    exact = logits(copy.deepcopy(plain).double(), by_kernels=False)
    scale = float(exact.norm())
    error = float((logits(fused, by_kernels=True) - exact).norm()) / scale
    stock_error = float((logits(plain, by_kernels=False) - exact).norm()) / scale
    assert error < 2 * stock_error + 1e-4


def test_a_prompt_and_a_cpu_step_run_the_models_own_forward() -> None:
    plain, fused = copy.deepcopy(tiny_model("llama_gqa")), copy.deepcopy(tiny_model("llama_gqa"))
    fuse(fused)
    tokens = random_tokens(1, 2, PROMPT)
    with torch.no_grad():
        assert torch.equal(fused(tokens).logits, plain(tokens).logits)


def test_every_linear_and_norm_of_the_decoder_is_fused() -> None:
    model = half("llama_gqa")
    fuse(model)
    with_own = {name for name, module in model.get_decoder().named_modules() if "forward" in vars(module)}
    for layer in range(model.config.num_hidden_layers):
        assert {f"layers.{layer}.self_attn.{part}_proj" for part in "qkvo"} <= with_own
        assert f"layers.{layer}.mlp" in with_own
        assert not liger_installed() or f"layers.{layer}.input_layernorm" in with_own


def test_a_projection_that_is_asked_with_another_input_computes_anew() -> None:
    model = half("llama_gqa")
    attention = model.get_decoder().layers[0].self_attn
    stock = copy.deepcopy(attention)
    fuse(model)
    one, other = (torch.randn(1, 1, 32).to(ON, torch.float16) for _ in range(2))
    with torch.no_grad(), kernels_forced(True):
        attention.q_proj(one)
        torch.testing.assert_close(attention.k_proj(other), stock.k_proj(other), atol=1e-2, rtol=1e-2)
        attention.q_proj(one)
        torch.testing.assert_close(attention.k_proj(one), stock.k_proj(one), atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(attention.v_proj(one), stock.v_proj(one), atol=1e-2, rtol=1e-2)
