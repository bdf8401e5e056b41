"""Artefacts of models that tests make: learnt in this process from random tokens, and never written."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from kvbench.cache import Calibrated, Layout, Policy, artefact, cache_argument
from kvbench.cache.artefact import Artefact, checked_layers
from kvbench.cache.recording import CalibrationCache

_learnt: WeakKeyDictionary[Any, dict[Policy, Artefact]] = WeakKeyDictionary()


def in_process(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    """Return `policy`; a cache under it reads what it learns of its model, where it needs an artefact."""
    if isinstance(policy, Calibrated):
        monkeypatch.setattr(artefact, "artefact_of", artefact_of)
    return policy


def artefact_of(model: Any, policy: Policy) -> Artefact | None:
    """What `kvbench.cache.artefact.artefact_of` reads from a file."""
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
    model(torch.tensor(words)[drawn].to(model.device), **cache_argument(model, cache), use_cache=True)
    layers = [policy.learn(sums) for sums in cache.gathered]
    named = {f"layers.{n}.{name}": one.cpu() for n, layer in enumerate(layers) for name, one in layer.items()}
    return checked_layers(policy, named, layout, "what a test learnt")
