"""Logits of the published modelling code, run unchanged on its own versions of everything, on a tiny random model.

golden.safetensors holds its token ids and logits only (docs/models.md says how it was made).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvbench.cache import PolicyCache, attach, cache_argument
from kvbench.cache.attention import CACHE_NAME
from kvbench.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from kvbench.policies.full import Full
from tests.models.qwen_vl.golden_model import CONFIG, golden_pixels, golden_weights

GOLDEN: dict[str, Tensor] = load_file(Path(__file__).parent / "golden.safetensors")
CLOSE = {"rtol": 0.0, "atol": 1e-4}
ATTENTIONS = ("sdpa", "eager", "kvbench")
NUM_PADS = 11
PICTURES = {"pictures": [0, 1], "two_pictures": [2, 0]}


@pytest.fixture(scope="module", params=ATTENTIONS)
def model(request: pytest.FixtureRequest) -> Any:
    built = QwenVLForConditionalGeneration(QwenVLConfig(**CONFIG)).eval()
    weights = golden_weights({name: tuple(tensor.shape) for name, tensor in built.state_dict().items()})
    left = built.load_state_dict(weights, strict=False)
    assert left.missing_keys == ["transformer.visual.attn_pool.pos_embed"]
    assert not left.unexpected_keys
    if request.param == "kvbench":
        attach(built)
    else:
        built.set_attn_implementation(request.param)
    return built


def last_logits(model: Any, name: str, **inputs: Any) -> Tensor:
    kept: Tensor = GOLDEN[f"{name}.logits"]
    with torch.inference_mode():
        logits: Tensor = model(GOLDEN[f"{name}.ids"], use_cache=False, logits_to_keep=kept.shape[1], **inputs).logits
    return logits


@pytest.mark.parametrize("name", ["short", "at_training_length", "just_beyond", "beyond", "far_beyond"])
def test_text_within_and_beyond_the_training_length(model: Any, name: str) -> None:
    torch.testing.assert_close(last_logits(model, name), GOLDEN[f"{name}.logits"], **CLOSE)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_in_the_prompt(model: Any, name: str) -> None:
    logits = last_logits(model, name, pixel_values=golden_pixels(3)[PICTURES[name]])
    torch.testing.assert_close(logits, GOLDEN[f"{name}.logits"], **CLOSE)


def test_vectors_of_a_picture(model: Any) -> None:
    with torch.inference_mode():
        vectors = model.transformer.visual(golden_pixels(3))
    torch.testing.assert_close(vectors[:, :2], GOLDEN["vectors"], **CLOSE)


def test_left_pads(model: Any) -> None:
    mask = torch.ones_like(GOLDEN["left_pads.ids"])
    mask[0, :NUM_PADS] = 0
    torch.testing.assert_close(
        last_logits(model, "left_pads", attention_mask=mask), GOLDEN["left_pads.logits"], **CLOSE
    )


@pytest.mark.parametrize(("name", "prompt"), [("decode_from_within", 28), ("decode_from_beyond", 70)])
def test_decoding_goes_on_with_the_frequencies_of_the_prompt(model: Any, name: str, prompt: int) -> None:
    """The first answer grows past the training length, the second starts beyond it."""
    ids = GOLDEN[f"{name}.ids"]
    ours = model.config._attn_implementation == "kvbench"
    cache = PolicyCache(model, Full()) if ours else None
    with torch.inference_mode():
        output = model(ids[:, :prompt], **cache_argument(model, cache), use_cache=True)
        logits = [output.logits[:, -1:]]
        for at in range(prompt, ids.shape[1]):
            logits.append(model(ids[:, at : at + 1], **cache_argument(model, output[CACHE_NAME])).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), GOLDEN[f"{name}.logits"], **CLOSE)
