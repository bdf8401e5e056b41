"""Arrays of small whole numbers inside JSON: type, shape, and the bytes compressed as text.

value = pack(np.array([[0, 7], [7, 7]], dtype=np.uint16))
array = unpack(value)
"""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbench.errors import RecordError

Array = NDArray[Any]
_TYPES = {"u1": np.uint8, "u2": np.uint16}
_MOST_BYTES = 2**26  # a foreign file must not be able to ask for all memory


def pack(array: Array) -> dict[str, Any]:
    """Return an array of uint8 or uint16 as a JSON object; rows that resemble each other take little room."""
    name = next(name for name, kind in _TYPES.items() if array.dtype == kind)
    raw = array.astype(f"<{name}").tobytes()
    return {"type": name, "shape": list(array.shape), "data": base64.b64encode(zlib.compress(raw)).decode()}


def unpack(value: object) -> Array:
    """Return the array that `pack` was given. Raises: RecordError for anything that `pack` does not return."""
    try:
        assert isinstance(value, dict)
        name, shape = value["type"], tuple(value["shape"])
        assert name in _TYPES
        assert all(isinstance(size, int) and size >= 0 for size in shape)
        num_bytes = math.prod(shape) * np.dtype(_TYPES[name]).itemsize
        assert num_bytes <= _MOST_BYTES
        raw = zlib.decompressobj().decompress(base64.b64decode(value["data"], validate=True), num_bytes + 1)
        assert len(raw) == num_bytes
    except (AssertionError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise RecordError(f"a packed array is damaged ({type(error).__name__}).") from error
    return np.frombuffer(raw, dtype=f"<{name}").reshape(shape)
