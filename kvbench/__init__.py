"""kvbench: compare KV-cache policies under one definition of everything.

The names a policy or a program of your own needs; they are loaded when first used, so that the
command line answers at once. And which kvbench this is, if any: a checkout alone is no installation.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kvbench.errors import ConfigError

if TYPE_CHECKING:
    from kvbench.cache import (
        Allocation,
        Budget,
        Joining,
        Kind,
        Merge,
        Needs,
        Plan,
        Policy,
        PolicyCache,
        Room,
        ScorePolicy,
        View,
        When,
        attach,
        cache_argument,
    )

__all__ = [
    "Allocation",
    "Budget",
    "Joining",
    "Kind",
    "Merge",
    "Needs",
    "Plan",
    "Policy",
    "PolicyCache",
    "Room",
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


_PARTS = ("kvbench.conf", "kvbench.policies", "hydra_plugins.kvbench_launcher")


def installed_version() -> str:
    """Return the version of kvbench, as records name it. Raises: ConfigError where it is not installed."""
    how = "run make install in the checkout, or python -m pip install -e . with this Python"
    try:
        found = version("kvbench")
    except PackageNotFoundError:
        raise ConfigError(f"kvbench is not installed in this Python, its files are only beside it; {how}") from None
    for part in _PARTS:  # an old egg-info beside the files names a version, and nothing else is there
        if find_spec(part) is None:
            raise ConfigError(f"kvbench is not installed in this Python: {part} is not found; {how}")
    return found
