"""How a cache is handed to a model, under the names of every supported transformers."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from kvbench.cache import Budget, PolicyCache, attach, cache_argument
from kvbench.contract.driving import drive
from kvbench.errors import ModelSupportError
from kvbench.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from kvbench.policies.h2o import H2O
from tests.models.qwen_vl.golden_model import CONFIG
from tests.tiny_models import random_tokens, tiny_model

NEW_TOKENS = 5


def native_qwen_vl() -> Any:
    torch.manual_seed(0)
    model = QwenVLForConditionalGeneration(QwenVLConfig(**{**CONFIG, "initializer_range": 0.3})).eval()
    attach(model)
    return model


@pytest.mark.parametrize("make", [lambda: tiny_model("llama_gqa"), native_qwen_vl], ids=["llama", "qwen_vl"])
def test_generate_takes_the_cache_without_a_warning_and_uses_it(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    prompt = random_tokens(3, 1, 16)
    logging.getLogger("transformers").propagate, before = True, logging.getLogger("transformers").propagate
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            cache = PolicyCache(model, H2O(), Budget(tokens=9))
            answer = model.generate(
                prompt, **cache_argument(model, cache), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
            )
    finally:
        logging.getLogger("transformers").propagate = before
    assert not [record.message for record in caplog.records if "deprecated" in record.message]
    assert cache.occupancy().entries_peak == 9  # the model wrote into it, and the policy cut it
    ours = drive(model, PolicyCache(model, H2O(), Budget(tokens=9)), answer[:, :-1], prompt.shape[1])
    steps = torch.stack([ours.prompt_logits[:, -1], *ours.logits], dim=1)
    assert torch.equal(steps.argmax(dim=-1), answer[:, prompt.shape[1] :])


def test_the_native_qwen_vl_takes_a_cache_under_either_name() -> None:
    model, tokens = native_qwen_vl(), random_tokens(4, 1, 12)
    logits = []
    for name in ("cache", "past_key_values"):
        cache = PolicyCache(model, H2O(), Budget(tokens=6))
        with torch.inference_mode():
            logits.append(model(tokens, **{name: cache}, use_cache=True).logits)
        assert cache.occupancy().entries_peak == 6
    assert torch.equal(*logits)


def test_a_forward_without_a_cache_is_refused_by_name() -> None:
    with pytest.raises(ModelSupportError, match=r"Linear\.forward takes no cache under cache or past_key_values"):
        cache_argument(nn.Linear(1, 1), None)
