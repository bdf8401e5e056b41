"""What a task gets and gives back; a task never knows which policy it runs.

A cell hands each of its tasks a `Bench` and merges the `TaskResult`s into its record. A `BatchTask` is measured batch
by batch, so that cells share prompts and a kill costs one batch. `FullAnswers` are the full cache's own greedy answers,
the reference of `rougeL_vs_full` and of fidelity: files beside the records, so that every cell of a sweep, and the next
sweep, compares with the same texts. `Prompts` are the planned batches of a data set, each a `Part` that is prefilled
once for all cells and tasks that share it; only the part in use is alive, because its prompt state holds the
uncompressed prompt of every layer.

`foreseen` is what tokens that a task will score look at in the prompt, for a policy that is told before they come.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from kvbench.cache import UNLIMITED, Needs, Policy
from kvbench.cache.policy import needs_of
from kvbench.datasets.base import Dataset, Example
from kvbench.errors import MeasureError
from kvbench.measures import bounds_on_scale, score_scale
from kvbench.models.inputs import PromptBatch, by_question_length, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.results.files import canonical_json, replace_file
from kvbench.results.record import cell_key
from kvbench.stats.intervals import Interval, mean_interval, pooled_ratio_interval
from kvbench.tasks.decode import CacheSetting, CapturedSteps, Decoding

if TYPE_CHECKING:
    from kvbench.cache.counts import OnPlan
    from kvbench.cache.recording import PromptRecorder


@dataclass(frozen=True, kw_only=True)
class Watching(Policy):
    """The full cache, with the attention that each entry receives summed up."""

    needs: ClassVar[Needs] = Needs.MASS
    bounded: ClassVar[bool] = False


@torch.inference_mode()
def foreseen(loaded: LoadedModel, batch: PromptBatch, tokens: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return of each layer (B, H, P) float32: what the full cache gives each position of the prompt of `batch`.

    It is the attention of the first lengths[row] of `tokens` (B, N), fed after the prompt, the mean over the query
    heads of a KV head; a question that follows the prompt is a part of it.
    """
    setting = CacheSetting(policy=Watching(), budget=UNLIMITED, positions="original")
    decoding = setting.decoding(loaded, batch, tokens.shape[1])
    layers = [layer.slots.entries for layer in decoding.cache.policy_layers if layer.slots is not None]
    places = [entries.position.clone() for entries in layers]
    for entries in layers:
        assert entries.mass is not None
        entries.mass.zero_()  # what the prompt itself gave is past
    found = [torch.zeros_like(place, dtype=torch.float32) for place in places]
    for start, end in pairwise(sorted({0, *lengths})):
        decoding.feed(tokens[:, start:end])
        rows = torch.tensor([length == end for length in lengths])
        for layer, place, told in zip(decoding.cache.policy_layers, places, found, strict=True):
            assert layer.slots is not None
            mass = layer.slots.entries.mass
            assert mass is not None
            ended, known = rows.to(mass.device), place >= 0
            received = mass[..., : place.shape[-1]].masked_fill(~known, 0.0)
            told[ended] = torch.zeros_like(told).scatter_add_(-1, place.clamp(min=0), received)[ended]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """Examples of one batch; the last `num_question_tokens` of each prompt follow as a second chunk."""

    examples: Sequence[Example]
    num_question_tokens: int


class Part:
    """One planned batch. `policies` None: nothing is shared, every decoding runs its own prefill."""

    def __init__(
        self,
        loaded: LoadedModel,
        planned: Planned,
        number: int,
        policies: Sequence[Policy] | None,
        steps: CapturedSteps | None = None,
    ) -> None:
        self._steps = steps
        self.number = number
        self.examples = planned.examples
        self.batch: PromptBatch = prompt_batch(
            loaded, planned.examples, num_question_tokens=planned.num_question_tokens
        )
        self._loaded = loaded
        self._policies = policies
        self._kept: dict[Hashable, Any] = {}

    @property
    def shares(self) -> bool:
        """Whether other cells use this part too."""
        return self._policies is not None

    @torch.inference_mode()
    def decoding(
        self,
        setting: CacheSetting,
        reserve_tokens: int,
        *,
        on_plan: OnPlan | None = None,
        told: tuple[torch.Tensor, Sequence[int]] | None = None,
    ) -> Decoding:
        """Return the batch after its prompt, under `setting`; the numbers are the same shared or not.

        told: the tokens that will be fed, (B, N), and how many of each row count, for a policy that sees the future.
        """
        loaded, batch, future = self._loaded, self.batch, None
        if told is not None and Needs.FUTURE in needs_of(setting.policy):
            name = ("foreseen", tuple(map(tuple, told[0].tolist())), tuple(told[1]))
            future = self.once(name, lambda: foreseen(loaded, batch, *told))
        if self._policies is None:
            return setting.decoding(loaded, batch, reserve_tokens, on_plan=on_plan, future=future, steps=self._steps)
        from kvbench.cache.recording import cache_after  # needs transformers

        recorder, logits = self.once("prompt", self._record)
        cache = cache_after(
            recorder.prompt, setting.cache(loaded, batch, reserve_tokens, on_plan=on_plan, future=future)
        )
        return setting.decoding_with(loaded, batch, cache, prompt_logits=logits, steps=self._steps)

    def _record(self) -> tuple[PromptRecorder, torch.Tensor]:
        assert self._policies is not None
        from kvbench.cache.recording import PromptRecorder

        recorder = PromptRecorder(self._loaded.model, self._policies)
        return recorder, Decoding(self._loaded, replace(self.batch, question_ids=None), recorder).logits

    def once(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """Return what `compute` gave first; computed again each time where nothing is shared."""
        if self._policies is None:
            return compute()
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]


class Prompts:
    """All planned batches; membership depends on the list of examples only.

    Where the question is hidden, only examples whose questions have equally many tokens share a batch.
    share: the policies of all cells that share the prompts; None when nothing is shared.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        batch_size: int,
        *,
        share: Sequence[Policy] | None = None,
        query_visible: bool = True,
    ) -> None:
        self._loaded = loaded
        groups = {0: examples} if query_visible else by_question_length(loaded, examples)
        self._parts = [
            Planned(examples=group[start : start + batch_size], num_question_tokens=length)
            for length, group in groups.items()
            for start in range(0, len(group), batch_size)
        ]
        self._policies = share
        self._steps = CapturedSteps()
        self._part: Part | None = None
        self._kept: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def ids_of(self, number: int) -> list[str]:
        """Return the ids of the examples of the batch `number`."""
        return [example.id for example in self._parts[number].examples]

    def part(self, number: int) -> Part:
        """Return the batch `number`; the part returned before is let go."""
        if self._part is None or self._part.number != number:
            self._part = None
            self._part = Part(self._loaded, self._parts[number], number, self._policies, self._steps)
        return self._part

    def once(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """Return what `compute` gave first, for all parts, tasks and cells that share these prompts."""
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    def forget(self) -> None:
        """Let the part in use go, with everything that is kept for it, and the captured steps."""
        self._part = None
        self._steps.clear()


Answers = dict[str, list[int]]
_NONE: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class FullAnswers:
    """Answers under `folder` for one model and data set, described by `settings`."""

    folder: Path
    settings: Mapping[str, Any]

    def get(self, max_new_tokens: int, compute: Callable[[], Answers], needed: Mapping[str, str] = _NONE) -> Answers:
        """Return token ids by example id; `compute` runs when they are not stored or not readable.

        needed: names that must be among them, each with its example's id. Raises: MeasureError if one is not.
        """
        stored = self.read(max_new_tokens)
        if stored is None:
            stored = compute()
            self.write(max_new_tokens, stored)
        check_complete(stored, needed)
        return stored

    def read(self, max_new_tokens: int) -> Answers | None:
        """Return what is stored, None where nothing is or it cannot be read."""
        path, settings = self._place(max_new_tokens)
        return _read(path, settings)

    def write(self, max_new_tokens: int, answers: Answers) -> None:
        """Store the answers to all examples."""
        path, settings = self._place(max_new_tokens)
        content = {"settings": settings, "answers": answers, "sha256": _digest(answers)}
        replace_file(path, canonical_json(content).encode())

    def _place(self, max_new_tokens: int) -> tuple[Path, dict[str, Any]]:
        settings = {**self.settings, "max_new_tokens": max_new_tokens}
        return self.folder / f"{cell_key(settings)[:16]}.json", settings


def check_complete(stored: Answers, needed: Mapping[str, str]) -> None:
    """Raise MeasureError if a name of `needed`, each with its example's id, is not among the stored answers."""
    for name, example_id in needed.items():
        if name not in stored:
            raise MeasureError(f"the stored full answers lack {example_id}; delete results/full_answers and run again")


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


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything a task may use. `advance(share)` moves the cell's progress bar, shares add up to 1.

    `full` is the full cache as a setting of its own; `answers` gives its greedy answers, computed once
    per model, data set and length. `shared_prompts`: those of the group of cells, None for a cell alone.
    query_visible: whether the question is part of what a policy sees when it compresses the prompt; if not,
    picture and context are compressed first and the question follows.
    """

    loaded: LoadedModel
    dataset: Dataset
    examples: Sequence[Example]
    setting: CacheSetting
    full_policy: Policy
    answers: FullAnswers
    batch_size: int
    advance: Callable[[float], None]
    shared_prompts: Prompts | None = None
    query_visible: bool = True

    def beat(self) -> None:
        """Tell a watchdog that work goes on; `Decoding` does at every pass of the model, so other loops have to."""
        self.loaded.beat()

    @property
    def full(self) -> CacheSetting:
        """The full cache at original positions: what everything is compared with."""
        return CacheSetting(policy=self.full_policy, budget=UNLIMITED, positions="original", engine=self.setting.engine)

    @cached_property
    def prompts(self) -> Prompts:
        """The planned batches."""
        return self.shared_prompts or self.own_prompts()

    def own_prompts(self) -> Prompts:
        """Return the planned batches anew, shared with nobody."""
        return Prompts(self.loaded, self.examples, self.batch_size, query_visible=self.query_visible)


@dataclass(kw_only=True)
class TaskResult:
    """Measurements by name, rows by example id, curves by name; as the record stores them.

    is_noisy: its times come from a machine that was not quiet, which gives the cell the status noisy.
    """

    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    is_noisy: bool = False

    def measure(self, name: str, interval: Interval, unit: str = "") -> None:
        """Add one measurement, its interval cut to what the measure can be."""
        if interval.value is not None and interval.low is not None and interval.high is not None:
            low, high = bounds_on_scale(name, interval.value, interval.low, interval.high)
            interval = replace(interval, low=low, high=high)
        self.measurements[name] = interval.as_measurement(unit)

    def note(self, name: str, value: float, unit: str = "", *, n: int = 1, method: str = "observed once") -> None:
        """Add a number that has no interval."""
        self.measurements[name] = {"value": value, "low": None, "high": None, "n": n, "unit": unit, "method": method}

    def note_devices(
        self, name: str, values: Sequence[float], unit: str = "", *, method: str = "observed once"
    ) -> None:
        """Add a number of each device, `device0_NAME` and so on, where there are several."""
        for number, value in enumerate(values if len(values) > 1 else ()):
            self.note(f"device{number}_{name}", value, unit, method=method)

    def measure_means(self, names: Iterable[str], bench: Bench, units: Mapping[str, str] = _NONE) -> None:
        """Add the mean over the examples that have it of each field of `samples`."""
        for name in names:
            found = [(self.samples[one.id].get(name), one.cluster) for one in bench.examples]
            scored = [(value, cluster) for value, cluster in found if value is not None]
            values, clusters = [value for value, _ in scored], [cluster for _, cluster in scored]
            interval = mean_interval(values, clusters, scale=score_scale(name))
            self.measure(name, interval, units.get(name, ""))

    def pooled(
        self,
        total: str,
        count: str,
        examples: Iterable[Example],
        transform: Callable[[float], float] | None = None,
        scale: tuple[float, float] | None = None,
    ) -> Interval:
        """Return the sum of one field of `samples` over that of another; `scale` is that of any sample's ratio."""
        rows = [(self.samples[one.id], one.cluster) for one in examples]
        sums, counts = [row[total] for row, _ in rows], [row[count] for row, _ in rows]
        return pooled_ratio_interval(sums, counts, [cluster for _, cluster in rows], transform, scale=scale)

    def add(self, other: TaskResult) -> None:
        """Merge another task's result; rows of one example become one row."""
        self.measurements |= other.measurements
        self.curves |= other.curves
        self.is_noisy |= other.is_noisy
        for example_id, row in other.samples.items():
            self.samples.setdefault(example_id, {}).update(row)


class Task(Protocol):
    """One measurement pass, a frozen dataclass whose fields are its settings.

    `protocol` names the definition of what it measures; a change of definition is a new name. A task
    that looks at no text, so that random weights and random prompts serve it, says `reads_text = False`.
    The class flags `needs_reference`, `needs_follow_ups` and `hides_question` (it honours query_visible=false)
    are checked against the data set before the model is loaded. One that knows the tokens that it feeds before the
    prompt, and tells them to a policy that sees the future, says `knows_tokens = True`. A task whose numbers do not
    depend on what else runs on the machine says `is_timed = False`, and waits for nobody.
    """

    protocol: ClassVar[str]

    def run(self, bench: Bench) -> TaskResult:
        """Measure. Raises: MeasureError when a number contradicts itself."""


def is_timed(task: object) -> bool:
    """Whether nothing of the sweep may work beside `task`, which is so unless it says otherwise."""
    return bool(getattr(task, "is_timed", True))


Payload = dict[str, Any]
"""What one batch gave, as JSON holds it: dict with text keys, list, text, int, float, bool, None."""


def joined(payloads: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rows of all batches by example id."""
    return {name: row for payload in payloads for name, row in payload.items()}


class BatchTask(ABC):
    """A quality task: its numbers are a function of the cell, never of the machine or of time.

    Every batch is measured on its own, perhaps in another process, and `summarise` sees only payloads. One that lets
    the model choose tokens, which are fed one by one under every policy, says `generates = True`.
    """

    protocol: ClassVar[str]
    is_timed: ClassVar[bool] = False
    generates: ClassVar[bool] = False

    @abstractmethod
    def measure(self, bench: Bench, part: Part) -> Payload:
        """Measure one planned batch."""

    @abstractmethod
    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        """Return the result of all batches, in their order."""

    def run(self, bench: Bench) -> TaskResult:
        """Measure all batches of one cell, one after the other."""
        payloads = []
        for number in range(len(bench.prompts)):
            part = bench.prompts.part(number)
            payloads.append(self.measure(bench, part))
            bench.advance(len(part.examples) / len(bench.examples))
        return self.summarise(bench, payloads)
