"""A prompt's forward: who makes it, and that both makers agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvbench.cache.attention import chunk_attention
from kvbench.kernels import forward
from tests.kernels.test_prefill_statistics import chunk_of


def test_short_prompts_and_other_devices_do_not_go_to_cudnn() -> None:
    assert not forward._cudnn_takes(torch.empty(1, 1, 16_384, 128, dtype=torch.bfloat16))
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        queries = torch.empty(1, 1, 16_384, 136, dtype=torch.bfloat16, device="cuda")
        assert forward._cudnn_takes(queries[..., :128])
        assert not forward._cudnn_takes(queries)
        assert not forward._cudnn_takes(queries[:, :, :900, :128])
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            assert not forward._cudnn_takes(queries[..., :128])


def test_what_cudnn_has_no_plan_for_goes_to_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuses(*states: object) -> tuple[Tensor, Tensor]:
        asked.append("cudnn")
        raise RuntimeError("no valid execution plan")

    def is_full(*states: object) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError

    states = torch.zeros(1, 1, 4, 16)
    monkeypatch.setattr(forward, "_cudnn_takes", lambda query: True)
    monkeypatch.setattr(forward, "_flash", lambda *states: ("output", "lse"))
    monkeypatch.setattr(forward, "_cudnn", refuses)
    assert forward.causal_forward(states, states, states, 1.0) == ("output", "lse")
    assert asked == ["cudnn"]
    monkeypatch.setattr(forward, "_cudnn", is_full)
    with pytest.raises(torch.OutOfMemoryError):
        forward.causal_forward(states, states, states, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(8, 1, 128, 900, 0, 0), (2, 7, 64, 701, 0, 0), (2, 4, 96, 515, 0, 200), (1, 4, 128, 8200, 0, 0)]
)
def test_cudnn_makes_the_forward_of_the_other_kernel(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not forward.has_tile_loads(torch.device("cuda", 0)):
        pytest.skip("older than Hopper")
    chunk = chunk_of(shape, dtype)
    made = {}
    for name, least in (("cudnn", 1), ("flash", 10**9)):
        monkeypatch.setattr(forward, "_CUDNN_TOKENS", least)
        made[name] = chunk_attention(chunk, wants_lse=True)
    (output, lse), (other_output, other_lse) = made["cudnn"], made["flash"]
    assert lse is not None
    assert other_lse is not None
    assert torch.equal(lse.isinf(), other_lse.isinf())
    torch.testing.assert_close(lse, other_lse, rtol=0.0, atol=2e-5)
    torch.testing.assert_close(output, other_output, rtol=1e-2, atol=1e-2)
