"""Greedy answers of a loaded model to a batch, from its prompt on."""

from __future__ import annotations

import torch

from kvbench.models.inputs import PromptBatch
from kvbench.models.loader import LoadedModel
from kvbench.tasks.decode import CacheSetting, greedy


@torch.inference_mode()
def answers_to(ours: LoadedModel, batch: PromptBatch, setting: CacheSetting, *, max_new_tokens: int) -> list[list[int]]:
    """The answer of each row, without its end token."""
    decoding = setting.decoding(ours, batch, max_new_tokens)
    return greedy(decoding, end_token_ids=ours.end_token_ids, max_new_tokens=max_new_tokens)
