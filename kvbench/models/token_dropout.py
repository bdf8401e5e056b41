"""Token dropout: teach the tiny model the redundancy that large models have.

A small model trained on full attention spreads what it needs over every token, so that any eviction
ruins it and no policy differs from another. Large vision-language models are not like that: most
image tokens can go. So in the last stage of training, tokens see only part of what lies before them: a
random share of the image patches is hidden, but never the patch that holds an object's centre, and
of the text a random share of what is older than a random window. The choice is blind to attention
and to every policy; it only makes background and old text dispensable, and objects not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.models.scene_batches import SceneBatch

KEEP_ALL_SHARE = 0.25
MIN_WINDOW_TOKENS = 6
MAX_WINDOW_TOKENS = 64


def attention_mask(batch: SceneBatch, image_token_id: int) -> Tensor:
    """Return (B, 1, T, T) bool, True where a query may attend; every token sees itself."""
    num_rows, length = batch.ids.shape
    age = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    image = batch.ids == image_token_id
    window = torch.randint(MIN_WINDOW_TOKENS, MAX_WINDOW_TOKENS + 1, (num_rows, 1, 1))
    shown_tokens = torch.where(image[:, None, :], 0, window)
    hidden = _dropped(batch, image)[:, None, :] & (age > shown_tokens)
    return ((age >= 0) & ~hidden)[:, None]


def _dropped(batch: SceneBatch, image: Tensor) -> Tensor:
    """(B, T) bool: tokens drawn to be hidden, one share per row; the first token never is."""
    num_rows, length = batch.ids.shape
    share = torch.rand(num_rows, 1) * (torch.rand(num_rows, 1) > KEEP_ALL_SHARE)
    dropped = torch.rand(num_rows, length) < share
    dropped[:, 0] = False
    dropped[image] &= ~batch.centres.flatten()
    return dropped
