"""Tiny random models, and how they are driven through a cache, looking at what it holds after every step.

Weights come from a seed and are large, so that logits differ and attention is uneven: what a policy chooses matters.
"""

from __future__ import annotations

import gc
import types
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvbench.cache import Calibrated, Layout, Policy, PolicyCache, artefact, attach, cache_argument
from kvbench.cache.artefact import Artefact, checked_layers, named_tensors
from kvbench.cache.recording import CalibrationCache
from kvbench.cache.second_pass import read_again

VOCABULARY = 97
PICTURE_TOKEN = VOCABULARY - 1  # no text has it
TEXT_SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_HEADS = {"llama_gqa": (4, 2), "llama_gqa_8_2": (8, 2), "llama_mha": (4, 4), "qwen2": (4, 2), "qwen3": (4, 2)}
TINY_MODELS = tuple(_HEADS)

Held = list[list[list[tuple[int, ...]]]]
"""Positions held, ascending: [layer][row][head]."""


def text_model(name: str) -> PreTrainedModel:
    """Return one of `TINY_MODELS`, its weights drawn from torch's generator."""
    query_heads, kv_heads = _HEADS[name]
    settings = {**TEXT_SETTINGS, "num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**settings))
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**settings))
    return LlamaForCausalLM(LlamaConfig(**settings))


def seeded(build: Any, *arguments: Any) -> Any:
    """Return the model that `build` makes, in eval mode, of the same weights every time."""
    # Whoever asks first may be in inference mode, whose tensors others could not use.
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(7)
        model = build(*arguments).eval()
    model.generation_config.pad_token_id = 0
    return model


@cache
def tiny_model(name: str, *, attached: bool = True, double: bool = False) -> Any:
    """Return the model `name`; the same weights whether attached to kvbench's attention or not."""
    model = seeded(text_model, name)
    if double:
        model = model.double()
    if attached:
        attach(model)
    return model


def random_tokens(seed: int, *shape: int) -> Tensor:
    """Return token ids without pads and without picture tokens."""
    return torch.randint(2, PICTURE_TOKEN, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of token ids (N,) as one batch (B, T), and its mask: 0 at the pads."""
    length = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return tokens, mask


@dataclass(kw_only=True)
class Trace:
    """A drive: prompt logits (B, T, V), logits of each decode step (B, V), what was held after each pass."""

    cache: PolicyCache
    prompt_logits: Tensor
    logits: list[Tensor]
    held: list[Held]


def held_positions(cache: PolicyCache) -> Held:
    """Return what the cache holds now."""
    layers = []
    for layer in cache.policy_layers:
        assert layer.slots is not None
        rows = layer.slots.entries.position.tolist()
        layers.append([[tuple(sorted(p for p in head if p >= 0)) for head in row] for row in rows])
    return layers


_learnt: WeakKeyDictionary[Any, dict[Policy, Artefact]] = WeakKeyDictionary()


def artefacts_learnt() -> AbstractContextManager[Any]:
    """Inside, a policy that reads an artefact reads what it learns of its model here; no file is looked for."""
    return mock.patch.object(artefact, "artefact_of", learnt_artefact)


def learnt_artefact(model: Any, policy: Policy) -> Artefact | None:
    """Return what `kvbench.cache.artefact.artefact_of` reads from a file, learnt from random tokens."""
    if not isinstance(policy, Calibrated):
        return None
    known = _learnt.setdefault(model, {})
    if policy not in known:
        known[policy] = _calibrated(model, policy)
    return known[policy]


@torch.no_grad()
def _calibrated(model: Any, policy: Calibrated) -> Artefact:
    config, layout = model.config, Layout.of(model)
    pictures = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "vision_start", "vision_end")}
    words = [token for token in range(2, min(90, config.get_text_config().vocab_size)) if token not in pictures]
    drawn = torch.randint(len(words), (2, 40), generator=torch.Generator().manual_seed(11))
    cache = CalibrationCache(model, policy)
    tokens = torch.tensor(words)[drawn].to(model.device)
    model(tokens, **cache_argument(model, cache), use_cache=True)
    if cache.awaits_second_pass:
        read_again(model, cache, tokens)
    layers = [{name: one.cpu() for name, one in policy.learn(sums).items()} for sums in cache.gathered]
    return checked_layers(policy, named_tensors(layers), layout, "what was learnt here")


@torch.no_grad()
def drive(model: Any, cache: Any, tokens: Tensor, prompt_tokens: int, mask: Tensor | None = None) -> Trace:
    """Prefill `prompt_tokens`, then force the rest of `tokens` (B, N) in one by one; mask (B, N) is 0 at left pads."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if mask is not None else None
    held: list[Held] = []
    logits = []
    for start, end in [(0, prompt_tokens), *((at, at + 1) for at in range(prompt_tokens, tokens.shape[1]))]:
        out = model(
            tokens[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if positions is None else positions[:, start:end],
            **cache_argument(model, cache),
        )
        logits.append(out.logits)
        repeat_where_asked(model, cache, tokens[:, :end], None if mask is None else mask[:, :end])
        if isinstance(cache, PolicyCache):
            held.append(held_positions(cache))
    return Trace(cache=cache, prompt_logits=logits[0], logits=[step[:, -1] for step in logits[1:]], held=held)


def repeat_where_asked(model: Any, cache: Any, tokens: Tensor, mask: Tensor | None = None) -> None:
    """Give the prompt, all that came so far, a second pass if the policy waits for it."""
    if isinstance(cache, PolicyCache) and cache.awaits_second_pass:
        read_again(model, cache, tokens, mask)


def tensors_of(root: object) -> list[Tensor]:
    """Return every tensor that `root` reaches through attributes and containers; modules and types left out."""
    skipped = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, nn.Module, Policy)
    seen: set[int] = set()
    found: list[Tensor] = []
    todo = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, skipped):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        todo.extend(gc.get_referents(item))
    return found


def storage_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of what the tensors lie in, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
