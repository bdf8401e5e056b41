"""Rows of a data set on the Hugging Face hub, pinned to a commit; needs the extra `datasets`.

A source is written `hub:OWNER/NAME@COMMIT`, with `?config=...&split=...` where the default
(no configuration, split test) is not meant.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from kvbench.errors import ConfigError, DataError, close_matches

HUB_PREFIX = "hub:"
_SOURCE = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)@(?P<commit>[0-9a-f]{40})(?:\?(?P<options>.*))?")
_OPTIONS = ("config", "split")
_INSTALL = "pip install 'kvbench[datasets]'"


def hub_rows(source: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `source`. Raises: ConfigError, DataError."""
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ConfigError(
            f"dataset.path is {source!r}; a data set on the hub is written "
            "hub:OWNER/NAME@COMMIT?config=NAME&split=NAME, its commit 40 hex digits (its page lists them)"
        )
    options = _options(match["options"] or "")
    library = _library()
    try:
        table = library.load_dataset(
            match["name"], options.get("config"), split=options.get("split", "test"), revision=match["commit"]
        )
        yield from table
    except Exception as error:  # the library raises what its file systems raise
        raise DataError(
            f"{source} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "without the network give a local file"
        ) from error


def _options(text: str) -> dict[str, str]:
    options = dict(parse_qsl(text, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(f"dataset.path has the option {name!r}; {close_matches(name, _OPTIONS)}")
    return options


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(f"a data set on the hub needs the package `datasets`; {_INSTALL}") from error
