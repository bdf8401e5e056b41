"""What can go wrong, by who can mend it, and what an exception says of the process: no memory left, CUDA given up.

A message states what was wrong, the value seen, what is allowed and what to do. `assert` is for
our own invariants only; everything a user can cause is one of these.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

_CLOSE = 0.6  # share of letters in common; with less "fast" would be close to "default"
_NEARLY = 0.15
_SHORTEST_BEGINNING = 3
_MOST_NAMES = 10_000  # looked at in one folder; a folder of pictures may hold millions


class KvbenchError(Exception):
    """Base of every error that kvbench raises on purpose."""


class ConfigError(KvbenchError):
    """A setting is wrong; found before any model is loaded."""


class PolicyError(KvbenchError):
    """A policy broke its contract: wrong shape, values that are not finite, a protected victim."""


class ModelSupportError(KvbenchError):
    """The model uses something that kvbench does not implement, and would compute silently wrong."""


class DataError(KvbenchError):
    """A data set or one of its items cannot be used."""


class MeasureError(KvbenchError):
    """A measurement contradicts itself, so its number must not be believed."""


class NonFiniteError(MeasureError):
    """A likelihood or logit is NaN or infinite; the cell has no quality number."""


class NonFiniteChoiceError(PolicyError, NonFiniteError):
    """What a policy decides by is NaN, so what it would evict is nobody's choice; the cell has no number."""


class RecordError(KvbenchError):
    """A stored record is torn, foreign, or from a version that this one cannot read."""


def close_matches(name: str, known: Iterable[str]) -> str:
    """Return the tail of an unknown-name message: close matches if any, else all names."""
    names = sorted(known)
    near = near_names(name, names)
    return did_you_mean(near) if near else f"known: {', '.join(names) or 'none'}"


def did_you_mean(names: Iterable[str]) -> str:
    """Return the question that names all of `names`."""
    return f"did you mean {' or '.join(map(repr, names))}?"


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three of `known` that `name` may be a misspelling of, the closest and those nearly as close.

    Where none is close, those that begin with it.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=_CLOSE)
    if not near and len(name) >= _SHORTEST_BEGINNING:  # "llama" is far from "llama-3.1-8b" by its letters
        return [one for one in names if one.startswith(name)][:3]
    shares = [difflib.SequenceMatcher(None, one, name).ratio() for one in near]
    return [one for one, share in zip(near, shares, strict=True) if share > shares[0] - _NEARLY]


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise ConfigError unless `name`, the value of `what`, is one of `known`."""
    if name not in (names := list(known)):
        raise ConfigError(f"{what} is {name!r}; {close_matches(name, names)}")


def check_within(of: str, plugin: object, **limits: tuple[int, int | None]) -> None:
    """Raise ConfigError for the first setting of `plugin` outside (least, most); most None: no end; null is allowed.

    of: what stands before the names, as in "dataset.num_samples".
    """
    for name, (least, most) in limits.items():
        value = getattr(plugin, name)
        if value is not None and not (least <= value and (most is None or value <= most)):
            allowed = f"be at least {least}" if most is None else f"lie in {least} to {most}"
            raise ConfigError(f"{of}.{name} is {value}; it must {allowed}")


def missing_path(path: Path) -> str:
    """Return the tail of a message about a path that does not exist: close matches if any, else where it ends."""
    near = near_paths(path)
    if near:
        return f"there is no such file or folder; {did_you_mean(map(str, near))}"
    whole = path.absolute()
    last = next((parent for parent in whole.parents if parent.is_dir()), Path(whole.anchor))
    return f"there is no such file or folder: {last} holds no {whole.relative_to(last).parts[0]!r}"


def near_paths(path: Path) -> list[Path]:
    """Return up to three paths that exist and whose names are those of `path`, or close to them, at every level."""
    found = [Path(path.anchor)]
    for part in path.parts[bool(path.anchor) :]:
        found = [near for folder in found for near in _near_names(folder, part)][:3]
    return found


def _near_names(folder: Path, name: str) -> list[Path]:
    if os.path.lexists(folder / name):
        return [folder / name]
    names: list[str] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in islice(entries, _MOST_NAMES))
    return [folder / near for near in near_names(name, names)]


_CLASSES = ("OutOfMemoryError", "MemoryError")  # torch's own is found by name, so that nobody imports torch for it
_TEXTS = (  # of a RuntimeError: torch on the CPU, the CUDA runtime, triton's launcher and the matrix library
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_POISONED = "CUDA error"  # after one of these every later call of the process fails too


def ran_out_of_memory(exception: BaseException) -> bool:
    """Return whether memory ran out, on a device or on the host."""
    if any(kind.__name__ in _CLASSES for kind in type(exception).__mro__):
        return True
    return isinstance(exception, RuntimeError) and any(text in str(exception) for text in _TEXTS)


def is_poisoned(message: str) -> bool:
    """Whether an error with this message leaves a process in which nothing works any more."""
    return _POISONED in message
