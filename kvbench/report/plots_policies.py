"""How each policy is drawn: a colour, a marker and a line style that are its own in every figure and report.

A look follows from the policy's name alone, so it does not change with what else is shown. What a paper
describes and what its release does share a colour and differ in marker and line. Policies that are not
bundled draw theirs from colours and markers that no bundled one has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvbench.report.plots_theme import LIGHT, Theme

_SOLID, _DASHED, _DOTTED = "-", (0, (6, 1.6)), (0, (1, 1.1))
_DASH_DOT, _SHORT, _DASH_DOT_DOT = (0, (5, 1.2, 1, 1.2)), (0, (2.5, 1.1)), (0, (4, 1, 1, 1, 1, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How a series is drawn; `fill` (a fill style of markers) tells apart series of one policy."""

    colour: str
    marker: Any
    line: Any
    fill: str = "full"


@dataclass(frozen=True, slots=True)
class Shape:
    """A look whose colour is still a name of the theme."""

    colour: str
    marker: Any
    line: Any


BUNDLED = {
    "full": Shape("ink", "s", "--"),
    "random": Shape("grey", "X", _DOTTED),
    "streaming_llm": Shape("orange", "^", _DASH_DOT),
    "h2o": Shape("blue", "o", _SOLID),
    "elastic": Shape("green", "D", _DASHED),
    "snapkv": Shape("purple", "P", _DASH_DOT_DOT),
    "elastic_released": Shape("green", "d", _SHORT),
    "h2o_released": Shape("blue", "p", _SHORT),
    "h2o_elastic_release": Shape("blue", "h", _DASH_DOT_DOT),
    "streaming_llm_released": Shape("orange", "v", _SHORT),
    "local_elastic_release": Shape("orange", "<", _DASH_DOT_DOT),
}
# 3 colours x 6 markers x 2 lines; neighbours in this order differ in as much as they can.
_COLOURS = ("vermilion", "sky", "brown")
_MARKERS: tuple[Any, ...] = (">", "*", (4, 1, 0), (3, 1, 0), (8, 1, 0), "H")
OTHERS = tuple(Shape(_COLOURS[i % 3], _MARKERS[i // 3 % 6], (_SOLID, _DASHED)[(i + i // 18) % 2]) for i in range(36))
_FILLS = {"original": "full", "in_cache": "none", "released": "left"}
_VARIANT_FILLS = ("full", "none", "left", "top", "right", "bottom")


class Palette:
    """The looks of `policies`; only names that are not bundled and meet in one look move on to the next free one."""

    def __init__(self, policies: Iterable[str], theme: Theme = LIGHT) -> None:
        self.theme = theme
        self._shapes: dict[str, Shape] = {}
        taken: set[int] = set()
        for name in sorted(set(policies)):
            if name in BUNDLED:
                self._shapes[name] = BUNDLED[name]
                continue
            place = _wanted_place(name)
            if len(taken) < len(OTHERS):
                while place in taken:
                    place = (place + 1) % len(OTHERS)
            taken.add(place)
            self._shapes[name] = OTHERS[place]

    def mark(self, policy: str, positions: str = "original", variant: int = 0) -> Mark:
        """Return the look of `policy`: its fill says the position mode, or which of several variants it is."""
        shape = self._shapes[policy]
        fill = _VARIANT_FILLS[variant % len(_VARIANT_FILLS)] if variant else _FILLS.get(positions, "full")
        return Mark(colour=getattr(self.theme, shape.colour), marker=shape.marker, line=shape.line, fill=fill)


def _wanted_place(name: str) -> int:
    """Return a place in OTHERS that depends on the name alone, not on the process or the machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(OTHERS)
