"""Does a value from a yaml fit an annotation, which value is it then, and what is the type called in a message.

Two spellings of one value, such as 1 and 1.0, or 0.3 and 0.1 + 0.2, are one setting and one key.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError

_DECIMALS = 9  # as a budget is rounded: nobody means 0.30000000000000004
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


def typed(value: Any, hint: Any) -> Any:
    """Return a value that fits `hint` as that type: a whole number becomes a float where only floats are meant."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, int) and not isinstance(value, bool):
        wanted = options if origin in (typing.Union, types.UnionType) else (hint,)
        return rounded(float(value)) if float in wanted and int not in wanted else value
    # What a container holds stays as it is unless its type is said: it may be a model's own configuration.
    if isinstance(value, dict) and len(options) == 2 and options[1] is not Any:
        return {name: typed(item, options[1]) for name, item in value.items()}
    if isinstance(value, list | tuple) and options and options[1:] in ((), (...,)):
        return type(value)(typed(item, options[0]) for item in value)
    return value


def rounded(value: float) -> float:
    """Return a setting without the noise of arithmetic: rounded to the budget's 9 decimals, never minus zero.

    A number below 0.1 keeps 9 digits that count, as 9 decimals would change it; one that is not finite stays.
    """
    if not math.isfinite(value):
        return value
    small = 0 if value == 0 else max(0, -math.floor(math.log10(abs(value))) - 1)
    return round(value, _DECIMALS + small) + 0.0


def typed_settings(plugin: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a plug-in by name, all of a dataclass and `given` of any other class, as typed values."""
    values, hints = given, hints_of(type(plugin))
    if dataclasses.is_dataclass(plugin) and not isinstance(plugin, type):
        whole = dataclasses.asdict(plugin)
        values = {field.name: whole[field.name] for field in dataclasses.fields(plugin) if field.init}
    return {name: typed(value, hints.get(name, Any)) for name, value in values.items()}


def hints_of(plugin: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of the settings of a class by name."""
    return typing.get_type_hints(plugin if dataclasses.is_dataclass(plugin) else plugin.__init__)


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
