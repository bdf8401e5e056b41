from __future__ import annotations

import pytest

from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.sweep.group import ModelShelf


@pytest.fixture(scope="session")
def bundled() -> LoadedModel:
    """The bundled model, loaded once."""
    return load_model(ModelSpec(checkpoint="bundled"), "cpu")


@pytest.fixture(scope="session")
def shelf() -> ModelShelf:
    """A shelf that is shared, as a sweep shares it."""
    return ModelShelf()
