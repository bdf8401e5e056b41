"""The cache, the policy contract and the attention that feeds it.

What needs transformers is imported when it is first used, so that a sweep can be checked without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvbench.cache.artefact import Calibrated, Layout, Sample
from kvbench.cache.parts import Allocation, Merge, Room
from kvbench.cache.policy import CACHE_SEMANTICS, UNLIMITED, Budget, Policy, ScorePolicy, When
from kvbench.cache.view import Joining, Kind, Needs, Plan, View

if TYPE_CHECKING:
    from kvbench.cache.attention import attach, cache_argument
    from kvbench.cache.cache import Occupancy, PolicyCache

__all__ = [
    "CACHE_SEMANTICS",
    "UNLIMITED",
    "Allocation",
    "Budget",
    "Calibrated",
    "Joining",
    "Kind",
    "Layout",
    "Merge",
    "Needs",
    "Occupancy",
    "Plan",
    "Policy",
    "PolicyCache",
    "Room",
    "Sample",
    "ScorePolicy",
    "View",
    "When",
    "attach",
    "cache_argument",
]
_LATER = {"attach": "attention", "cache_argument": "attention", "Occupancy": "cache", "PolicyCache": "cache"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'kvbench.cache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvbench.cache.{_LATER[name]}"), name)
