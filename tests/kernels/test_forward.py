"""A prompt's forward: who makes it, and that both makers agree."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache.attention import chunk_attention
from kvbench.kernels import forward
from kvbench.kernels.dispatch import generation
from tests.kernels.test_prefill_statistics import chunk_of

LONG = 16_384


def queries(tokens: int = LONG, width: int = 128, *, is_cuda: bool = True) -> Any:
    return SimpleNamespace(is_cuda=is_cuda, shape=(1, 32, tokens, width), device=torch.device("cuda", 0))


def test_cudnn_takes_long_prompts_of_the_devices_and_head_size_it_was_measured_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, Any] = {"capability": (9, 0), "version": 91_900}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    monkeypatch.setattr(forward, "generation", generation.__wrapped__)
    monkeypatch.setattr(forward, "_cudnn_version", lambda: found["version"])
    assert forward._cudnn_takes(queries())
    assert not forward._cudnn_takes(queries(is_cuda=False))
    assert not forward._cudnn_takes(queries(LONG - 1))
    assert not any(forward._cudnn_takes(queries(width=width)) for width in (64, 96, 256))
    for capability in ((8, 0), (10, 0), (12, 0)):
        found["capability"] = capability
        assert not forward._cudnn_takes(queries())
    found |= {"capability": (9, 0), "version": 91_002}
    assert not forward._cudnn_takes(queries()), "wrong for some lengths"
    found["version"] = 91_900
    assert forward._cudnn_takes(queries())
    turned_on = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(False)
        assert not forward._cudnn_takes(queries())
    finally:
        torch.backends.cuda.enable_cudnn_sdp(turned_on)


def test_what_cudnn_has_no_plan_for_goes_to_the_other_kernel_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuses(*states: object) -> tuple[Tensor, Tensor]:
        asked.append("cudnn")
        raise RuntimeError("no valid execution plan")

    def is_full(*states: object) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError

    states = torch.zeros(1, 1, 4, 16)
    monkeypatch.setattr(forward, "_refused", set())
    monkeypatch.setattr(forward, "_cudnn_takes", lambda query: True)
    monkeypatch.setattr(forward, "_flash", lambda *states: ("output", "lse"))
    monkeypatch.setattr(forward, "_cudnn", refuses)
    with pytest.warns(UserWarning, match="no valid execution plan"):
        assert forward.causal_forward(states, states, states, 1.0) == ("output", "lse")
    assert forward.causal_forward(states, states, states, 1.0) == ("output", "lse")
    assert asked == ["cudnn"]
    monkeypatch.setattr(forward, "_cudnn", is_full)
    longer = torch.zeros(1, 1, 5, 16)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            forward.causal_forward(longer, longer, longer, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 1, 128, 900, 0, 0), (2, 7, 128, 701, 0, 0), (2, 4, 128, 515, 0, 200)])
def test_cudnn_makes_the_forward_of_the_other_kernel(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_CUDNN_TOKENS", 1)
    chunk = chunk_of(shape, dtype)
    chunk = replace(chunk, left_pads=(0, shape[-1]))
    if not forward._cudnn_takes(chunk.query):
        pytest.skip("another device, or an older cuDNN")

    def none(*states: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("the other kernel was asked")

    with monkeypatch.context() as only:
        only.setattr(forward, "_flash", none)
        output, lse = chunk_attention(chunk, wants_lse=True)
    monkeypatch.setattr(forward, "_CUDNN_TOKENS", 10**9)
    other_output, other_lse = chunk_attention(chunk, wants_lse=True)
    assert lse is not None
    assert other_lse is not None
    assert torch.equal(lse.isinf(), other_lse.isinf())
    torch.testing.assert_close(lse, other_lse, rtol=0.0, atol=2e-5)
    torch.testing.assert_close(output, other_output, rtol=1e-2, atol=1e-2)
