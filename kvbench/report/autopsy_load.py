"""Autopsies as the report sees them: read beside the record, every shape checked once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvbench.errors import RecordError
from kvbench.report.cell import CellResult
from kvbench.results.files import Array, unpack
from kvbench.results.record import AUTOPSY_FILE, NEVER, read_autopsy

STATISTICS = ("entries", "image_kept_permille", "mean_age_tokens", "attention_permille")
_MEDIA = ("image/png", "image/webp")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """`places` (image tokens, 2) row and column in a grid of rows x columns, NEVER where a token has none."""

    source: str
    width: int
    height: int
    rows: int
    columns: int
    places: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample under one policy; N tokens, P of them the prompt, S = `layers` stored layers of L, K checkpoints.

    freed (S, H, N): the answer's token at which an entry left, 0 at the prompt's cut, NEVER for held.
    merged (S, H, P) or None: position that each entry joined. statistics: (K, L, H) by name. attention (S, P).
    coarse: whether departures are known at the checkpoints only, and moved to the next one.
    """

    id: str
    prompt_tokens: int
    steps: int
    answer: str
    tokens: tuple[str, ...]
    kinds: Array
    picture: Picture | None
    layers: tuple[int, ...]
    coarse: bool
    freed: Array
    merged: Array | None
    checkpoints: tuple[int, ...]
    statistics: Mapping[str, Array]
    attention: Array

    def held(self, step: int) -> Array:
        """(S, H, P) bool: tokens of the prompt that are held after `step` tokens of the answer."""
        found: Array = self.freed[..., : self.prompt_tokens] > step
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Autopsy:
    """What one cell's file says; `left_out` are items too long to look at, with the reason."""

    num_layers: int
    num_heads: int
    samples: tuple[Sample, ...]
    left_out: tuple[str, ...]


def load_autopsy(cell: CellResult) -> Autopsy | None:
    """Return what lies beside the record of `cell`, None if nothing does. Raises: RecordError in one line."""
    path = None if cell.cell_folder is None else cell.cell_folder / AUTOPSY_FILE
    if path is None or not path.exists():
        return None
    body = read_autopsy(path, cell.key)
    try:
        samples = tuple(_sample(sample, body["num_layers"], body["num_heads"]) for sample in body["samples"])
        left_out = tuple(f"{one['id']}: {one['reason']}" for one in body["left_out"])
    except (RecordError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RecordError(f"{path} does not hold what it should ({type(error).__name__}: {error!s:.60}).") from error
    return Autopsy(num_layers=body["num_layers"], num_heads=body["num_heads"], samples=samples, left_out=left_out)


def _sample(sample: Mapping[str, Any], num_layers: int, num_heads: int) -> Sample:
    prompt, steps = _count(sample["prompt_tokens"]), _count(sample["steps"])
    layers, checkpoints = tuple(map(_count, sample["layers"])), tuple(map(_count, sample["checkpoints"]))
    _require(bool(layers) and max(layers) < num_layers, "layers")
    _require(checkpoints == tuple(sorted(set(checkpoints))) and checkpoints[:1] == (0,), "checkpoints")
    kinds = _shaped(unpack(sample["kinds"]), (prompt + steps,), "kinds")
    tokens = tuple(map(str, sample["tokens"]))
    _require(len(tokens) == prompt + steps, "tokens")
    merged = None if sample["merged"] is None else _rows(sample["merged"], (len(layers), num_heads, prompt))
    _require(merged is None or bool(((merged < prompt) | (merged == NEVER)).all()), "merged")
    every = (len(checkpoints), num_layers, num_heads)
    return Sample(
        id=str(sample["id"]),
        prompt_tokens=prompt,
        steps=steps,
        answer=str(sample["answer"]),
        tokens=tokens,
        kinds=kinds,
        picture=None if sample["picture"] is None else _picture(sample["picture"], int((kinds == 1).sum())),
        layers=layers,
        coarse=sample["coarse"] is True,
        freed=_rows(sample["freed"], (len(layers), num_heads, prompt + steps)),
        merged=merged,
        checkpoints=checkpoints,
        statistics={
            name: _shaped(unpack(sample["statistics"][name]), every, name)
            for name in STATISTICS
            if name in sample["statistics"]
        },
        attention=_shaped(unpack(sample["attention"]), (len(layers), prompt), "attention"),
    )


def _picture(picture: Mapping[str, Any], num_tokens: int) -> Picture:
    _require(picture["media"] in _MEDIA and _BASE64.fullmatch(picture["data"]) is not None, "picture")
    rows, columns = _count(picture["rows"]), _count(picture["columns"])
    places = _shaped(unpack(picture["places"]), (num_tokens, 2), "places")
    inside = (places[:, 0] < rows) & (places[:, 1] < columns)
    _require(bool((inside | (places == NEVER).all(axis=-1)).all()), "places")
    return Picture(
        source=f"data:{picture['media']};base64,{picture['data']}",
        width=_count(picture["width"]),
        height=_count(picture["height"]),
        rows=rows,
        columns=columns,
        places=places,
    )


def _rows(stored: Mapping[str, Any], shape: tuple[int, ...]) -> Array:
    rows = unpack(stored["patterns"])[np.array(stored["of"], dtype=np.int64)]
    return _shaped(rows, shape, "patterns")


def _shaped(array: Array, shape: tuple[int, ...], name: str) -> Array:
    _require(array.shape == shape, name)
    return array


def _count(value: object) -> int:
    _require(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < NEVER, "a count")
    assert isinstance(value, int)
    return value


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} cannot be right")
