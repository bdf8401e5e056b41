"""kvbench: compare KV-cache policies under one definition of everything.

The names a policy or a program of your own needs, and the policies' classes (`dir(kvbench)` lists all); they are loaded
when first used, so that the command line answers at once. And which kvbench this is, if any: a checkout alone is no
installation.
"""

from __future__ import annotations

import functools
import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
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
    if name in __all__:
        return getattr(importlib.import_module("kvbench.cache"), name)
    if name.startswith("_") or name not in _policies():
        raise AttributeError(f"module 'kvbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_policies()[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_policies()})


@functools.cache
def _policies() -> dict[str, str]:
    """Return the module of every class of a policy by its name, read from their files without running them."""
    package = find_spec("kvbench.policies")
    found: dict[str, str] = {}
    for folder in package.submodule_search_locations or () if package else ():
        for prefix, files in (("released.", Path(folder, "released").glob("*.py")), ("", Path(folder).glob("*.py"))):
            for file in sorted(files):
                for name in re.findall(r"^class ([A-Z]\w*)\(", file.read_text(encoding="utf-8"), re.MULTILINE):
                    found[name] = f"kvbench.policies.{prefix}{file.stem}"
    return found


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
