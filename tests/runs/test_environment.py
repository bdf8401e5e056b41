"""What a record says of where it was made."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from kvbench.sweep import cell as environment


def test_code_that_runs_without_being_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.version

    def version(name: str) -> str:
        if name == "kvbench":
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(environment, "version", version)
    environment.environment.cache_clear()
    told = environment.environment("cpu")
    environment.environment.cache_clear()
    assert told["kvbench"] is None
    assert told["torch"] == torch.__version__
