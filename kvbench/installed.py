"""Whether this Python has kvbench installed, and which version; a checkout alone is no installation."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from kvbench.errors import ConfigError

_HOW = "run make install in the checkout, or python -m pip install -e . with this Python"


def installed_version() -> str:
    """Return the version of kvbench, as records name it. Raises: ConfigError where it is not installed."""
    try:
        found = version("kvbench")
    except PackageNotFoundError:
        raise ConfigError(f"kvbench is not installed in this Python, its files are only beside it; {_HOW}") from None
    for part in ("conf", "policies"):  # an old egg-info beside the files names a version, and nothing else is there
        if find_spec(f"kvbench.{part}") is None:
            raise ConfigError(f"kvbench is not installed in this Python: kvbench.{part} is not found; {_HOW}")
    return found
