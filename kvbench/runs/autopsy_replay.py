"""Decode a few prompts once more, one operation after the other, and write down what leaves the cache when.

Two replays: the cell's own policy, and once for all cells the full cache, whose attention while it answers
says what there was to lose.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvbench.cache import UNLIMITED, Needs, Policy
from kvbench.cache.recording import EvictionLog
from kvbench.results.files import Array
from kvbench.runs.loop import CacheSetting, greedy
from kvbench.runs.prompts import Part

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache


@dataclass(frozen=True, kw_only=True)
class Watching(Policy):
    """The full cache, with the attention that each entry receives summed up."""

    needs: ClassVar[Needs] = Needs.MASS
    bounded: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """One row: its answer, the `steps` tokens of it that went through the cache, and when entries left.

    freed (L, H, N) int64: the decode step that freed an entry, 0 for the prompt's cut, -1 for held. merged
    (L, H, N) int64 or None: the position of the entry that each one joined, -1 for none.
    """

    answer: list[int]
    steps: int
    freed: Array
    merged: Array | None


@torch.inference_mode()
def replay(part: Part, setting: CacheSetting, *, end_token_ids: Collection[int], max_new_tokens: int) -> list[Replayed]:
    """Return what `setting` does to each row of `part` while it answers greedily. Raises: NonFiniteError."""
    log = EvictionLog(num_tokens=longest_prompt(part) + max_new_tokens)
    decoding = part.decoding(replace(setting, engine="eager"), max_new_tokens, on_plan=log.note_plan)
    log.after_prompt(decoding.cache)
    steps = [0] * len(part.examples)

    def on_step(cache: PolicyCache, going: list[bool]) -> None:
        log.after_step(cache, going)
        steps[:] = [count + one for count, one in zip(steps, going, strict=True)]

    answers = greedy(decoding, end_token_ids=end_token_ids, max_new_tokens=max_new_tokens, on_step=on_step)
    rows = []
    for row, answer in enumerate(answers):
        merged = log.merged_into(row)
        rows.append(
            Replayed(
                answer=answer,
                steps=steps[row],
                freed=log.freed(row).numpy(),
                merged=None if merged is None else merged.numpy(),
            )
        )
    return rows


@torch.inference_mode()
def full_attention(part: Part, *, end_token_ids: Collection[int], max_new_tokens: int) -> list[Array]:
    """Return (L, H, N) float32 per row: attention that the full cache gives each token while it answers.

    Summed over the steps of its own greedy answer, mean over the query heads of a KV head. Where nothing was
    decoded, the attention of the prompt's own tokens.
    """
    setting = CacheSetting(policy=Watching(), budget=UNLIMITED, positions="original")
    decoding = part.decoding(setting, max_new_tokens)
    before = _masses(decoding.cache)
    latest = [mass.clone() for mass in before]

    def on_step(cache: PolicyCache, going: list[bool]) -> None:
        rows = torch.tensor(going, device=latest[0].device)
        for known, mass in zip(latest, _masses(cache), strict=True):
            known[rows] = mass[rows]

    greedy(decoding, end_token_ids=end_token_ids, max_new_tokens=max_new_tokens, on_step=on_step)
    decoded = torch.stack([after - first for first, after in zip(before, latest, strict=True)], dim=1)
    nothing = (decoded.sum(dim=(1, 2, 3)) <= 0)[:, None, None, None]
    found = torch.where(nothing, torch.stack(before, dim=1), decoded).float().cpu()
    return list(found.numpy())


def longest_prompt(part: Part) -> int:
    """Return the tokens of the longest prompt in `part`, its question included."""
    question = part.batch.question_ids
    return max(part.batch.prompt_tokens) + (0 if question is None else question.shape[1])


def _masses(cache: PolicyCache) -> list[Tensor]:
    """(B, H, C) per layer in the order of tokens, which is that of storage where nothing is ever evicted."""
    masses = []
    for layer in cache.policy_layers:
        assert layer.slots is not None
        assert layer.slots.entries.mass is not None
        masses.append(layer.slots.entries.mass.masked_fill(layer.slots.entries.position < 0, 0.0).clone())
    return masses
