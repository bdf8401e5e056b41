from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvbench.errors import RecordError
from kvbench.results.files import canonical_json, pack, unpack

SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)


@given(st.sampled_from([np.uint8, np.uint16]).flatmap(lambda kind: arrays.arrays(kind, SHAPES)))
def test_what_was_packed_comes_back(array: Any) -> None:
    again = unpack(pack(array))
    canonical_json(pack(array))
    assert again.dtype == array.dtype
    assert again.shape == array.shape
    assert np.array_equal(again, array)


def test_patterns_that_repeat_take_little_room() -> None:
    assert len(pack(np.tile(np.arange(700, dtype=np.uint16), (1024, 1)))["data"]) < 30_000


@pytest.mark.parametrize(
    "damage",
    [
        {"type": "f8"},
        {"shape": [2, 4]},
        {"shape": [-2, -3]},
        {"shape": [2**20, 2**20]},
        {"shape": "ab"},
        {"data": "not base64"},
        {"data": base64.b64encode(b"not zlib").decode()},
        {"data": base64.b64encode(zlib.compress(bytes(10**7))).decode()},
        {"data": None},
    ],
)
def test_a_damaged_array_is_an_error_of_one_line(damage: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match="packed array is damaged"):
        unpack(pack(np.zeros((2, 3), dtype=np.uint16)) | damage)


@pytest.mark.parametrize("value", [None, 3, [], "text", {}])
def test_what_is_no_packed_array_is_an_error_of_one_line(value: Any) -> None:
    with pytest.raises(RecordError):
        unpack(value)
