"""The full cache's own greedy answers, computed once and stored by key.

They are the reference of `rougeL_vs_full` and of fidelity. Kept as files beside the records, so that
every cell of a sweep, and the next sweep, compares with the same texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.results.files import canonical_json, replace_file
from kvbench.results.record import cell_key

Answers = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class FullAnswers:
    """Answers under `folder` for one model and data set, described by `settings`."""

    folder: Path
    settings: Mapping[str, Any]

    def get(self, max_new_tokens: int, compute: Callable[[], Answers]) -> Answers:
        """Return token ids by example id; `compute` runs when they are not stored or not readable."""
        settings = {**self.settings, "max_new_tokens": max_new_tokens}
        path = self.folder / f"{cell_key(settings)[:16]}.json"
        stored = _read(path, settings)
        if stored is None:
            stored = compute()
            content = {"settings": settings, "answers": stored, "sha256": _digest(stored)}
            replace_file(path, canonical_json(content).encode())
        return stored


def _read(path: Path, settings: Mapping[str, Any]) -> Answers | None:
    """Return None for a file that is torn, changed or of other settings: it is computed again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        answers = dict(content["answers"])
        same = content["settings"] == json.loads(canonical_json(settings))
        return answers if same and content["sha256"] == _digest(answers) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(answers: Answers) -> str:
    return hashlib.sha256(canonical_json(answers).encode()).hexdigest()
