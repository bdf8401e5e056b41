"""Does a value from a yaml fit an annotation, and what is that type called in a message."""

from __future__ import annotations

import math
import types
import typing
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError

_TYPE_NAMES = {type(None): "null", int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value read from yaml may be given where `hint` is annotated."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin is dict:
        return isinstance(value, dict)
    if hint in (int, float, bool, str):
        allowed = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}[hint]
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))
    if hint is type(None):
        return value is None
    return isinstance(value, str) if hint is Path else True


def truth(value: Any, name: str) -> bool:
    """Return a setting that is true or false. Raises: ConfigError for anything else."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be true or false")
    return value


def type_name(hint: Any) -> str:
    """Return a type as error messages name it."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in options)
    if typing.get_origin(hint) is dict:
        return "a mapping"
    if options:
        return " or ".join(type_name(option) for option in options)
    return _TYPE_NAMES.get(hint, str(hint))
