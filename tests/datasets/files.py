"""Small files for data set tests, and what a wrong one is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvbench.errors import ConfigError, DataError


def write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_picture(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (6, 5), colour).save(path)


def refusal(make: Callable[[], Any]) -> str:
    """Return the one-line message that `make` is refused with."""
    with pytest.raises((ConfigError, DataError)) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    return message
