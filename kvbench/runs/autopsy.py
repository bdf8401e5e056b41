"""The autopsies of a group of cells: after the batched tasks, before anything is timed, and never a cell's failure.

The same samples for every cell, one prefill for all of them. What goes wrong here costs the file and a line
in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvbench.autopsies import AUTOPSY_SCHEMA, autopsy_path, write_autopsy
from kvbench.models.loader import LoadedModel
from kvbench.redaction import hide_known, redacted_body
from kvbench.runs.autopsy_body import sample_body
from kvbench.runs.autopsy_replay import Watching, full_attention, replay
from kvbench.runs.autopsy_subject import subject_of
from kvbench.runs.batch_task import BatchTask
from kvbench.runs.cell import Cell
from kvbench.runs.free_memory import free_memory
from kvbench.runs.group_plan import Watcher
from kvbench.runs.prompts import Part, Prompts

_log = logging.getLogger(__name__)
PHASE = "autopsy"


def wants_autopsy(cell: Cell) -> bool:
    """Whether `cell` measures quality and autopsies are on."""
    return cell.autopsy.num_samples > 0 and any(isinstance(task, BatchTask) for task in cell.tasks.values())


def take_autopsies(cells: Sequence[Cell], loaded: LoadedModel, results: Path, watcher: Watcher) -> None:
    """Write the autopsy of each of `cells`, which share model, data set and prompts."""
    cells = [cell for cell in cells if wants_autopsy(cell)]
    if not cells or loaded.tokenizer is None:
        return
    watcher.active(cells[0].key, PHASE)
    try:
        replays = _Replays(cells, loaded, watcher)
    except Exception as error:
        _log.warning("no autopsy: %s: %s", type(error).__name__, error)
        return
    samples = replays.samples()
    for cell in cells:
        if cell.key in samples:
            _write(cell, loaded, results, samples[cell.key], replays.left_out)
    free_memory()


class _Replays:
    """The samples to look at, their prompts, and the cells that have not failed on one of them."""

    def __init__(self, cells: Sequence[Cell], loaded: LoadedModel, watcher: Watcher) -> None:
        first, self._loaded, self._watcher = cells[0], loaded, watcher
        chosen = [subject_of(loaded, example) for example in first.autopsy.chosen(first.dataset.examples())]
        most = first.autopsy.max_prompt_tokens
        self._subjects = {one.example.id: one for one in chosen if len(one.pieces) <= most}
        self.left_out = [
            {"id": one.example.id, "reason": f"its prompt has {len(one.pieces)} tokens, more than {most}"}
            for one in chosen
            if len(one.pieces) > most
        ]
        self._cells = list(cells)
        self._prompts = Prompts(
            loaded,
            [one.example for one in self._subjects.values()],
            max(1, len(self._subjects)),
            share=[*(cell.setting.policy for cell in cells), Watching()],
            query_visible=first.query_visible,
        )

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Return the samples of every cell that could be looked at, by key."""
        found: dict[str, list[dict[str, Any]]] = {cell.key: [] for cell in self._cells}
        for number in range(len(self._prompts)):
            for cell in [cell for cell in self._cells if cell.key in found]:
                self._watcher.active(cell.key, PHASE)
                try:
                    found[cell.key] += self._of_part(cell, self._prompts.part(number))
                except (Exception, SystemExit) as error:  # a policy may do anything, once more
                    _log.warning("no autopsy of %s: %s: %s", cell.name, type(error).__name__, error)
                    del found[cell.key]
                    free_memory()
        self._prompts.forget()
        return found

    def _of_part(self, cell: Cell, part: Part) -> Iterator[dict[str, Any]]:
        limits: dict[str, Any] = {
            "end_token_ids": self._loaded.end_token_ids,
            "max_new_tokens": max_new_tokens(cell),
            "beat": self._watcher.beat,
        }
        attention = part.once(("attention", limits["max_new_tokens"]), lambda: full_attention(part, **limits))
        rows = replay(part, cell.setting, **limits)
        for example, row, given in zip(part.examples, rows, attention, strict=True):
            yield without_secrets(sample_body(self._loaded, self._subjects[example.id], row, given))


def max_new_tokens(cell: Cell) -> int:
    """Return the steps to follow: as many as the answers that are measured have at most, within the limit."""
    asked = [task.max_new_tokens for task in cell.tasks.values() if hasattr(task, "max_new_tokens")]
    return min(cell.autopsy.max_new_tokens, max(asked, default=cell.autopsy.max_new_tokens))


def without_secrets(body: dict[str, Any]) -> dict[str, Any]:
    """Return `body`, without its words where they hold a secret: in pieces it could not be found again."""
    text = "".join(body["tokens"])
    if hide_known(text) != text:
        body["tokens"] = ["***"] * len(body["tokens"])
    return redacted_body(body)


def _write(
    cell: Cell, loaded: LoadedModel, results: Path, samples: list[dict[str, Any]], left_out: list[dict[str, str]]
) -> None:
    config = loaded.model.config.get_text_config()
    body = {
        "schema": AUTOPSY_SCHEMA,
        "key": cell.key,
        "num_layers": config.num_hidden_layers,
        "num_heads": _num_kv_heads(samples),
        "samples": samples,
        "left_out": left_out,
    }
    try:
        write_autopsy(autopsy_path(results, cell.key), body)
    except Exception as error:
        _log.warning("no autopsy of %s: %s", cell.name, error)


def _num_kv_heads(samples: list[dict[str, Any]]) -> int:
    return int(samples[0]["statistics"]["entries"]["shape"][-1]) if samples else 0
