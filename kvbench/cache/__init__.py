"""The cache, the policy contract and the attention that feeds it.

What needs transformers is imported when it is first used, so that a sweep can be checked without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvbench.cache.budget import UNLIMITED, Budget
from kvbench.cache.policy import Policy, ScorePolicy
from kvbench.cache.view import Kind, Needs, Plan, View, When

if TYPE_CHECKING:
    from kvbench.cache.attention import attach, cache_argument
    from kvbench.cache.policy_cache import Occupancy, PolicyCache

__all__ = [
    "UNLIMITED",
    "Budget",
    "Kind",
    "Needs",
    "Occupancy",
    "Plan",
    "Policy",
    "PolicyCache",
    "ScorePolicy",
    "View",
    "When",
    "attach",
    "cache_argument",
]
_MODULE_OF = {
    "attach": "kvbench.cache.attention",
    "cache_argument": "kvbench.cache.attention",
    "Occupancy": "kvbench.cache.policy_cache",
    "PolicyCache": "kvbench.cache.policy_cache",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kvbench.cache' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
