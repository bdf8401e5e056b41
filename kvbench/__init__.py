"""kvbench: compare KV-cache policies under one definition of everything.

The names a policy or a program of your own needs; they are loaded when first used, so that the
command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbench.cache import (
        Budget,
        Kind,
        Needs,
        Plan,
        Policy,
        PolicyCache,
        ScorePolicy,
        View,
        When,
        attach,
        cache_argument,
    )

__all__ = [
    "Budget",
    "Kind",
    "Needs",
    "Plan",
    "Policy",
    "PolicyCache",
    "ScorePolicy",
    "View",
    "When",
    "attach",
    "cache_argument",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kvbench' has no attribute {name!r}")
    return getattr(importlib.import_module("kvbench.cache"), name)
