"""The autopsies of a group of cells: each after its cell's record, so that nothing here can cost a measurement.

The same samples for every cell. What goes wrong costs the file and a line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import is_poisoned
from kvbench.models.loader import LoadedModel
from kvbench.results.files import Array
from kvbench.results.record import AUTOPSY_SCHEMA, autopsy_path, write_autopsy
from kvbench.results.redaction import hide_known, redacted_body
from kvbench.runs.autopsy_body import sample_body
from kvbench.runs.autopsy_replay import Watching, full_attention, replay
from kvbench.runs.autopsy_settings import AutopsySettings
from kvbench.runs.autopsy_subject import subject_of
from kvbench.runs.batch_task import BatchTask
from kvbench.runs.cell import Cell
from kvbench.runs.free_memory import free_memory
from kvbench.runs.prompts import Part, Prompts

if TYPE_CHECKING:
    from kvbench.runs.group_plan import Watcher

_log = logging.getLogger(__name__)
PHASE = "autopsy"


def wants_autopsy(cell: Cell) -> bool:
    """Whether `cell` measures quality and autopsies are on."""
    return cell.autopsy.num_samples > 0 and any(isinstance(task, BatchTask) for task in cell.tasks.values())


class Autopsies:
    """The autopsies of a group of cells, each taken after its cell's record is written, by a prefill of its own.

    What is the same for all cells is found once: the samples, and the full cache's attention, both on the host.
    """

    def __init__(self, results: Path, watcher: Watcher) -> None:
        self._results, self._watcher = results, watcher
        self._chosen: dict[AutopsySettings, _Chosen] = {}

    def take(self, cell: Cell, loaded: LoadedModel) -> bool:
        """Write the autopsy of `cell`, if it wants one; return False if nothing works in this process any more."""
        if not wants_autopsy(cell) or loaded.tokenizer is None:
            return True
        self._watcher.active(cell.key, PHASE)
        try:
            chosen = self._chosen.get(cell.autopsy)
            if chosen is None:
                chosen = self._chosen[cell.autopsy] = _Chosen(cell, loaded)
            _write(cell, loaded, self._results, chosen.samples(cell), chosen.left_out)
        except BaseException as error:  # a policy may do anything, once more
            _log.warning("no autopsy of %s: %s: %s", cell.name, type(error).__name__, error)
            return not is_poisoned(str(error))
        finally:
            free_memory()
        return True


class _Chosen:
    """The samples to look at, and what the full cache attends to in them."""

    def __init__(self, first: Cell, loaded: LoadedModel) -> None:
        self._loaded = loaded
        subjects = [subject_of(loaded, example) for example in first.autopsy.chosen(first.dataset.examples())]
        most = first.autopsy.max_prompt_tokens
        self._subjects = {one.example.id: one for one in subjects if len(one.pieces) <= most}
        self.left_out = [
            {"id": one.example.id, "reason": f"its prompt has {len(one.pieces)} tokens, more than {most}"}
            for one in subjects
            if len(one.pieces) > most
        ]
        self._attention: dict[tuple[int, int], list[Array]] = {}

    def samples(self, cell: Cell) -> list[dict[str, Any]]:
        """Return the samples of `cell` as they are stored."""
        examples = [one.example for one in self._subjects.values()]
        policies = [cell.setting.policy, Watching()]
        prompts = Prompts(
            self._loaded, examples, max(1, len(examples)), share=policies, query_visible=cell.query_visible
        )
        return [row for number in range(len(prompts)) for row in self._of_part(cell, prompts.part(number))]

    def _of_part(self, cell: Cell, part: Part) -> Iterator[dict[str, Any]]:
        limits: dict[str, Any] = {"end_token_ids": self._loaded.end_token_ids, "max_new_tokens": max_new_tokens(cell)}
        steps = limits["max_new_tokens"]
        attention = self._attention.get((part.number, steps))
        if attention is None:
            attention = self._attention[part.number, steps] = full_attention(part, **limits)
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
    write_autopsy(autopsy_path(results, cell.key), body)


def _num_kv_heads(samples: list[dict[str, Any]]) -> int:
    return int(samples[0]["statistics"]["entries"]["shape"][-1]) if samples else 0
