"""The file that `--out` names on any command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kvbench.errors import ConfigError


@contextlib.contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Make a refusal of the disk the one line that names `path` and the way out. Raises: ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
