"""Kernels are interpreted under every triton that pyproject.toml allows, with a numpy that converts no (1,) array."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import mend_interpreter

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")


class Scope:
    """What triton's own scope does, without undoing it."""

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        setattr(owner, name, value)


def patched_by_triton_3_6(tensor: Any, scope: Any) -> None:
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data))


@pytest.mark.parametrize(("version", "mended"), [("3.6.0", True), ("3.6.1", True), ("3.7.1", False), ("3.9.0", False)])
def test_the_oldest_triton_counts_up_to_a_scalar(version: str, mended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched_by_triton_3_6)
    mend_interpreter()
    assert (interpreter._patch_lang_tensor is not patched_by_triton_3_6) == mended
    if mended:
        scalar = type("Tensor", (), {"handle": SimpleNamespace(data=np.array([3]))})
        interpreter._patch_lang_tensor(scalar, Scope())
        assert list(range(scalar())) == [0, 1, 2]


def test_a_machine_without_triton_needs_no_mending(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    mend_interpreter()
