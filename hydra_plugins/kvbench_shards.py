"""`hydra/sweeper=shards`: one product of parameters for each of several parts, and of all those cells one share.

    hydra.sweeper.params     what every part runs, the first slowest: budget.fraction: "0.2,0.1", policy: glob(*)
    hydra.sweeper.parts      by name: the words of a part, those that differ without a GPU, and how long a cell takes
    hydra.sweeper.shard      i/n: the i-th of n shares of about equal time

The cells stand in one row, part by part, the full cache first in each, and are cut where the shares end, so that at
most n - 1 groups of one model and data set are prefilled twice. Nothing of the machine decides who gets what but
whether it has a GPU. Hydra finds the class here by itself and imports it at every start, so nothing heavy is imported
at its head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

_SHARD = re.compile(r"([1-9]\d{0,3})/([1-9]\d{0,3})")
_FULL = "policy=full"
_SIZES = ("auto", "large", "small")
_FIXED = ("dataset", "task", "query_visible", "budget")  # a part says what it measures, and on what


class Listing(NamedTuple):
    """The words of each job of a share, of how many in all, and whether they are those for a machine without a GPU.

    No dataclass: Hydra imports plugins without entering them among the modules, which that needs.
    """

    jobs: list[list[str]]
    num_all: int
    shard: str
    is_small: bool

    @property
    def is_whole(self) -> bool:
        """Whether there is no other share."""
        return self.shard == "1/1"

    @property
    def sentence(self) -> str:
        """Say so in a sentence."""
        small = "; there is no GPU, so fewer and shorter texts and fewer pictures" if self.is_small else ""
        return f"{len(self.jobs)} of {self.num_all} cells are shard {self.shard}{small}"


class ShardSweeper(BasicSweeper):
    """Launches one share of the cells of all parts, in one batch.

    parts: name -> {words, small (the words that differ without a GPU), time (of a cell, relative), own_model (a model
    given on the command line is not meant)}. only: names of parts, or "all". size: "auto" looks for a GPU.
    """

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, str] | None = None,
        parts: Mapping[str, Any] | None = None,
        only: Any = "all",
        shard: str = "1/1",
        size: str = "auto",
    ) -> None:
        super().__init__(max_batch_size, params)
        self._settings = {"parts": parts or {}, "only": only, "shard": shard, "size": size}

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Return the jobs in batches. Raises: ConfigError as `listing` does."""
        jobs = listing(overrides, self._settings).jobs
        return [list(batch) for batch in self.split_overrides_to_chunks(jobs, max_batch_size)]


def listing(overrides: Sequence[Override], settings: Mapping[str, Any]) -> Listing:
    """Return the jobs of a share.

    overrides: `params` and then the user's, of which the last of a key counts. Raises: ConfigError, one line.
    """
    from kvbench.errors import ConfigError, check_known

    match = _SHARD.fullmatch(str(settings["shard"]))
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(f"shard is {settings['shard']!r}; it must be i/n with 1 <= i <= n, such as 1/2")
    number, count = int(match[1]), int(match[2])
    check_known("size", str(settings["size"]), _SIZES)
    known: Mapping[str, Any] = settings["parts"]
    only = settings["only"]
    names = list(known) if only in ("all", None) else [only] if isinstance(only, str) else list(only)
    for name in names:
        check_known("parts", name, known)
    given = {override.get_key_element(): override for override in overrides}
    for key in _FIXED:
        if (override := given.get(key)) is not None:
            raise ConfigError(f"{override.input_line} changes what is measured; parts=[...] chooses what is, and "
                              f"{key}.SETTING=... changes a setting in every part that has it")  # fmt: skip
    is_small = settings["size"] == "small" or (settings["size"] == "auto" and not _has_gpu(given.get("device")))
    jobs, ends, total = [], [], 0.0
    for name in (name for name in known if name in names):
        for words in _part_jobs(given, known[name], is_small=is_small):
            time = float(known[name].get("time", 1.0))
            jobs.append(words)
            ends.append(total + time / 2)
            total += time
    mine = [words for words, end in zip(jobs, ends, strict=True) if int(end / total * count) == number - 1]
    return Listing(jobs=mine, num_all=len(jobs), shard=f"{number}/{count}", is_small=is_small)


def _part_jobs(given: Mapping[str, Override], part: Mapping[str, Any], *, is_small: bool) -> Iterator[list[str]]:
    """Give the words of each job of a part, the full cache's first and once; the user's words come last and count."""
    words = {**part["words"], **(part.get("small") or {} if is_small else {})}
    mine = {key: one for key, one in given.items() if not (part.get("own_model") and key.split(".")[0] == "model")}
    fixed = [f"{key}={_word(value)}" for key, value in words.items() if key not in mine]
    products = list(product(*(_words(key, one) for key, one in mine.items())))
    full = [job for job in products if _FULL in job]
    if full:  # of the full cache there is nothing to divide, to merge or to budget
        swept = {word for job in products for word in job if _is_of_the_cut(word)}
        yield [*fixed, *(word for word in full[0] if word not in swept)]
    yield from ([*fixed, *job] for job in products if _FULL not in job)


def _is_of_the_cut(word: str) -> bool:
    return word.startswith(("budget.", "+policy/", "policy/"))


def _words(key: str, override: Override) -> list[str]:
    if override.is_sweep_override():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [f"{key}={override.get_value_element_as_str()}"]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _has_gpu(device: Override | None) -> bool:
    if device is not None and not str(device.value()).startswith("auto"):
        return str(device.value()).startswith("cuda")
    import torch

    return torch.cuda.is_available()
