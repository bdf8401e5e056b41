"""Results whose numbers cannot be, or are not there; every number that follows from another follows from it."""

from __future__ import annotations

from tests.audit.folders import Doctored

DOCTORED_VALUES: list[Doctored] = []
