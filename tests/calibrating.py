"""Artefacts of models that tests make: learnt in this process from random tokens, and never written."""

from __future__ import annotations

import pytest

from kvbench.cache import Calibrated, Policy, artefact
from kvbench.contract.driving import learnt_artefact


def in_process(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    """Return `policy`; a cache under it reads what it learns of its model, where it needs an artefact."""
    if isinstance(policy, Calibrated):
        monkeypatch.setattr(artefact, "artefact_of", learnt_artefact)
    return policy
