"""A figure as bytes that are the same for the same records: SVG, PDF or PNG.

Text is drawn as the outlines of DejaVu Sans, which comes with matplotlib, in SVG: a figure then looks the same
where that font is missing, and labels that were placed so that they do not overlap really do not. A PDF embeds
the font, so its text can be searched. No date, no library version, and identifiers from a fixed salt.
"""

from __future__ import annotations

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

_NO_DATE: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": "kvbench"},
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": "kvbench", "Producer": "kvbench"},
    "png": {"Software": "kvbench"},
}
_PNG_DPI = 200


def figure_bytes(figure: Figure, kind: str, rc: Any) -> bytes:
    """Return the figure as svg, pdf or png, drawn under the settings `rc`."""
    buffer = io.BytesIO()
    with rc_context(rc):
        figure.savefig(buffer, format=kind, metadata=_NO_DATE[kind], dpi=_PNG_DPI if kind == "png" else "figure")
    return _plain_lines(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _plain_lines(svg: bytes) -> bytes:
    """Cut the spaces that matplotlib leaves at line ends."""
    return ("\n".join(line.rstrip() for line in svg.decode().splitlines()) + "\n").encode()
