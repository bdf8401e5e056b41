"""`hydra/sweeper=laws`: the jobs of a sweep are the cells that laws of the field need, each once.

A product of parameters cannot say them: a law compares a few cells, and another law has other ones. Hydra finds the
class here by itself and imports it at every start, so nothing heavy is imported at its head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

_LAWS = "laws"
_GIVEN_WAY = "dataset"  # the user's choice of text holds for laws that need no data of their own


class LawSweeper(BasicSweeper):
    """Launches what the laws named by `laws=` need, all of them without it, in one batch."""

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Return the jobs in batches. Raises: ConfigError for a law that is not known, or a word that laws set."""
        jobs = list(law_jobs(overrides))
        return [list(batch) for batch in self.split_overrides_to_chunks(jobs, max_batch_size)]


def law_jobs(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Give the words of each job. Raises: ConfigError as `split_arguments` does."""
    from kvbench.report.laws import load_laws

    asked = [name for override in overrides if override.get_key_element() == _LAWS for name in _names(override)]
    others = [override for override in overrides if override.get_key_element() != _LAWS]
    known: set[frozenset[str]] = set()
    for law in load_laws(asked or None):
        for cell in law.cells_needed:
            own = [override for override in others if not _is_set(override, cell, law.name)]
            words = [f"{key}={_word(value)}" for key, value in cell.items()]
            ((*products,),) = BasicSweeper.split_arguments(own, None)
            for product in products:
                if (job := frozenset((*product, *words))) not in known:
                    known.add(job)
                    yield [*product, *words]


def _names(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(name) for name in override.sweep_string_iterator()]
    given: Any = override.value()
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    return [] if names == ["all"] else names


def _is_set(override: Override, cell: Mapping[str, object], law: str) -> bool:
    """Whether the law's word stands in the place of the user's. Raises: ConfigError where that would change the law."""
    from kvbench.errors import ConfigError

    key = override.key_or_group
    group = key.partition(".")[0]
    if key not in cell and group not in cell:
        return False
    if group != _GIVEN_WAY:
        raise ConfigError(f"{override.input_line} changes what the law {law} compares; leave it out, or {_LAWS}=[...] "
                          "names laws that do not set it")  # fmt: skip
    return True


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
