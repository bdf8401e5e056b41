"""One cell: what it is, how far it has come, and the body of its record whatever happens.

`Cell` is everything that one record is about, `Attempt` one try at it. Below stands what is asked before anything is
measured: do data set, model and tasks fit (`check_fit`, `check_windows`, before a model is loaded), which items the
model's own processor does not take (`rejected_items`), whether prompts and answers fit into the model's context
(`context_use`: beyond it a model is given positions that it never saw, and what it then says is no policy's doing), on
which device and with which engine, and what the numbers were measured on (`environment`: an allowlist, so that no
secret can get into a record).
"""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
import time
import traceback
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch

from kvbench.autopsy import AutopsySettings
from kvbench.cache import Needs, Policy
from kvbench.cache.policy import needs_of
from kvbench.datasets.base import Dataset, Example, OnBadItem, SkippedItem
from kvbench.errors import ConfigError, DataError, ModelSupportError, NonFiniteError, close_matches, ran_out_of_memory
from kvbench.measures import budget_words
from kvbench.models.chat import next_turn_tokens
from kvbench.models.devices import chosen_devices
from kvbench.models.inputs import GivenPrompts, answer_tokens, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.models.spec import ModelSpec, takes_images
from kvbench.results.record import BODY_SCHEMA, cell_key
from kvbench.tasks.decode import ENGINES, Engine

if TYPE_CHECKING:
    from kvbench.cache import Policy
    from kvbench.tasks.decode import CacheSetting
    from kvbench.tasks.task import Task, TaskResult

BeyondContext = Literal["refuse", "allow"]
BEYOND_CONTEXT: tuple[BeyondContext, ...] = ("refuse", "allow")

_MOST_NAMES = 100  # of items that were left out, in a record
_STATUS_OF: tuple[tuple[type[BaseException], str], ...] = (
    (NonFiniteError, "nonfinite"),
    (DataError, "data_error"),
    (ConfigError, "config_error"),
    (ModelSupportError, "incompatible"),
)
SHARED_SETTINGS = ("model", "dataset", "query_visible", "batch_size", "device", "versions", "cache_semantics")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Everything one record is about. `settings` decides the key; labels are for people, as is the autopsy.

    batch_size: None where it is chosen when the model is loaded. shard: which share of a sweep it is measured in.
    """

    settings: Mapping[str, Any]
    labels: Mapping[str, Any]
    model: ModelSpec
    dataset: Dataset
    setting: CacheSetting
    full_policy: Policy
    tasks: Mapping[str, Task]
    batch_size: int | None
    seed: int
    device: str
    query_visible: bool = True
    beyond_context: BeyondContext = "refuse"
    autopsy: AutopsySettings = field(default_factory=AutopsySettings)
    shard: str | None = None

    @cached_property
    def key(self) -> str:
        """64 hex digits; the same settings give the same key everywhere."""
        return cell_key(self.settings)

    @property
    def shared_settings(self) -> dict[str, Any]:
        """What cells must agree in to share a model, its prompts and the full cache's answers."""
        return {name: self.settings[name] for name in SHARED_SETTINGS}

    @property
    def spread_over(self) -> tuple[int, ...]:
        """The numbers of the GPUs that the model's layers are spread over; empty on one device."""
        return self.model.devices if isinstance(self.model.devices, tuple) else ()

    def environment(self) -> dict[str, Any]:
        """Return what the cell is measured on, and in which share of its sweep."""
        found = environment(self.device, self.spread_over)
        return found if self.shard is None else {**found, "shard": self.shard}

    @property
    def name(self) -> str:
        """Policy and budget, as progress bars and messages call the cell."""
        return f"{self.labels['policy']} at {budget_words(self.labels['budget'])}"


@dataclass(kw_only=True)
class Attempt:
    """One try at a cell; `phase` is what runs or ran last, None when everything is done.

    batch_size: how many prompts are decoded together, once that is known.
    """

    cell: Cell
    sweep: str
    phase: str | None = "load"
    status: str = "ok"
    error: dict[str, str] | None = None
    duration_s: float = 0.0
    context: ContextUse | None = None
    batch_size: int | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def failed(self) -> bool:
        """Whether something went wrong; then nothing more is tried."""
        return self.status != "ok"

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Run a block as `phase`: its time is the cell's, and whatever it raises is the cell's failure.

        `sys.exit` in a policy is one more exception here: it must not end the other cells.
        """
        self.phase, start_s = phase, time.monotonic()
        try:
            yield
        except BaseException as exception:
            self.fail(exception)
        finally:
            self.duration_s += time.monotonic() - start_s

    def fail(self, exception: BaseException) -> None:
        """Note what ended the attempt."""
        self.status, self.error = status_of(exception), described(exception)

    def body(self, environment: Mapping[str, Any], result: TaskResult | None = None) -> dict[str, Any]:
        """Return the body of the record."""
        return {
            "schema": BODY_SCHEMA,
            "key": self.cell.key,
            "sweep": self.sweep,
            "attempt": uuid.uuid4().hex,
            "labels": dict(self.cell.labels),
            "cell": dict(self.cell.settings),
            "status": "noisy" if self.status == "ok" and result is not None and result.is_noisy else self.status,
            "phase": self.phase if self.failed else None,
            "error": self.error,
            "started_utc": self.started.isoformat(timespec="milliseconds"),
            "duration_s": self.duration_s,
            "environment": dict(environment),
            "measurements": {} if result is None else result.measurements | self._counts(),
            "samples": [] if result is None else self._sample_rows(result),
            "curves": {} if result is None else result.curves,
            "skipped_items": [
                {"item": one.item, "reason": one.reason} for one in _skipped(self.cell.dataset)[:_MOST_NAMES]
            ],
            "prompts": None if self.context is None else {**self.context.as_record(), "batch_size": self.batch_size},
        }

    def _counts(self) -> dict[str, dict[str, Any]]:
        """Items that were left out, where they may be, and prompts that were measured although they are too long."""
        dataset, counts = self.cell.dataset, {}
        if getattr(dataset, "on_bad_item", "fail") == "skip":
            num, method = len(_skipped(dataset)), "counted when the data set was made"
            counts["num_skipped_items"] = _count(num, num + len(dataset.examples()), "entries", method)
        return counts | ({} if self.context is None else self.context.measurement())

    def _sample_rows(self, result: TaskResult) -> list[dict[str, Any]]:
        """Rows with their id and cluster; without rows the data set is left alone, as it may be what failed."""
        clusters = {one.id: one.cluster for one in self.cell.dataset.examples()} if result.samples else {}
        return [{"id": name, "cluster": clusters[name], **row} for name, row in result.samples.items()]


def _count(value: int, of: int, unit: str, method: str) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": of, "unit": unit, "method": method}


def _skipped(dataset: Dataset) -> Sequence[SkippedItem]:
    return getattr(dataset, "skipped", ())


def status_of(exception: BaseException) -> str:
    """Return the status that an exception gives a cell."""
    if ran_out_of_memory(exception):
        return "oom"
    return next((status for kind, status in _STATUS_OF if isinstance(exception, kind)), "crash")


def described(exception: BaseException) -> dict[str, str]:
    """Return type, message and traceback as a record holds them."""
    trace = "".join(traceback.format_exception(exception))
    texts = {"type": type(exception).__name__, "message": str(exception), "traceback": trace}
    # A record is UTF-8, which half a surrogate pair in a message is not.
    return {name: text.encode(errors="replace").decode() for name, text in texts.items()}


# Flag of a task's class -> the part of an example that it needs, and what to say where that is missing.
_NEEDS: dict[str, tuple[Callable[[Example], object], str]] = {
    "needs_reference": (
        lambda example: example.reference or example.window is not None,
        "task.{task} scores reference answers, and {example} has none; give the data set's answers, or leave the task "
        "out with ~task.{task}",
    ),
    "needs_follow_ups": (
        lambda example: example.follow_ups,
        "task.{task} needs a second question, and {example} has none; leave it out with ~task.{task}",
    ),
}


def check_fit(dataset: Dataset, model: ModelSpec, tasks: Mapping[str, Any], *, query_visible: bool) -> None:
    """Raise DataError or ConfigError, in one line, for a combination that cannot run."""
    examples = dataset.examples()
    if not examples:
        raise DataError("the data set has no example; nothing would be measured")
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise DataError(f"the data set has the id {example.id!r} twice; ids must differ")
        seen.add(example.id)
    pictured = next((example for example in examples if example.load_image is not None), None)
    if pictured is not None and takes_images(model) is False:
        raise ConfigError(
            f"the data set has pictures ({pictured.id}), but the model {model.checkpoint} takes text only; "
            "choose another dataset or model"
        )
    for name, task in tasks.items():
        for flag, (has, text) in _NEEDS.items():
            bad = next((example for example in examples if not has(example)), None) if getattr(task, flag, 0) else None
            if bad is not None:
                raise DataError(text.format(task=name, example=bad.id))
    if not query_visible:
        _check_hidden(examples, tasks)


def check_foresight(policy: Policy, tasks: Mapping[str, Any]) -> None:
    """Raise ConfigError for a policy that sees the future and a task which cannot tell it."""
    blind = [name for name, task in tasks.items() if not getattr(task, "knows_tokens", False)]
    if blind and Needs.FUTURE in needs_of(policy):
        raise ConfigError(
            f"policy {type(policy).__name__} sees the tokens that are scored, which perplexity and fidelity know "
            f"beforehand; leave {', '.join(f'~task.{name}' for name in blind)} out, or choose task=perplexity"
        )


def check_spans(policy: Policy, dataset: Dataset, model: ModelSpec, *, query_visible: bool) -> None:
    """Raise ConfigError, in one line, if the policy reads where pictures or the question stand and data cannot say."""
    needs, examples = needs_of(policy), dataset.examples()
    name = type(policy).__name__
    if Needs.PICTURE in needs:
        drawn = takes_images(model) is not False
        bare = next((example for example in examples if not _has_picture(example, drawn)), None)
        if bare is not None:
            raise ConfigError(
                f"policy {name} ranks the tokens of pictures apart, and {bare.id} has no picture; choose a dataset "
                "with pictures (dataset=scenes), or another policy"
            )
    if Needs.QUESTION not in needs:
        return
    if not query_visible:
        raise ConfigError(
            f"policy {name} reads where the question stands when it cuts the prompt, and query_visible=false hides it "
            "until then; use query_visible=true, or another policy"
        )
    bare = next((example for example in examples if not example.has_question), None)
    if bare is not None:
        raise ConfigError(
            f"policy {name} reads where the question stands, and {bare.id} has none; choose a dataset that asks "
            "(dataset=recall, dataset=needles, dataset=scenes), or another policy"
        )


def _has_picture(example: Example, draws: bool) -> bool:
    if example.token_prompt is None:
        return example.load_image is not None
    return draws and example.token_prompt.num_images != 0


def _check_hidden(examples: Sequence[Example], tasks: Mapping[str, Any]) -> None:
    blind = [name for name, task in tasks.items() if not getattr(task, "hides_question", False)]
    if blind:
        able = "perplexity, generation, fidelity and conversation"
        raise ConfigError(
            f"query_visible=false holds for {able}; leave {', '.join(f'~task.{name}' for name in blind)} out, "
            "or choose task=quality"
        )
    bad = next((example for example in examples if not example.can_hide_question), None)
    if bad is not None:
        raise DataError(
            f"query_visible=false, but {bad.id} has neither a picture nor a context before its question; "
            "set query_visible=true or choose another dataset"
        )


@dataclass(frozen=True, kw_only=True)
class WithoutItems:
    """A data set without the items that a model's processor does not take; they are among its skipped ones.

    Its fingerprint is the whole one's: what was asked for has not changed.
    """

    whole: Dataset
    reasons: Mapping[str, str]
    on_bad_item: ClassVar[OnBadItem] = "skip"

    @property
    def fingerprint(self) -> str:
        """What the whole content depends on."""
        return self.whole.fingerprint

    @property
    def skipped(self) -> Sequence[SkippedItem]:
        """The items that the data set left out itself, then those that the processor does not take, by their id."""
        return [*_skipped(self.whole), *(SkippedItem(item=name, reason=why) for name, why in self.reasons.items())]

    def examples(self) -> Sequence[Example]:
        """Return the others, in the same order."""
        return [example for example in self.whole.examples() if example.id not in self.reasons]

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return the facts that `text` states."""
        return self.whole.facts_in(text)


def rejected_items(loaded: LoadedModel, dataset: Dataset, beat: Callable[[], None]) -> dict[str, str]:
    """Return id -> reason of the items whose prompt the model's processor does not take, where they may be skipped.

    beat: called for every item. Raises: DataError if it takes none.
    """
    if getattr(dataset, "on_bad_item", "fail") != "skip":
        return {}
    reasons: dict[str, str] = {}
    examples = dataset.examples()
    for example in examples:
        beat()
        try:
            prompt_batch(loaded, [example])
        except DataError as error:
            reasons[example.id] = str(error)
    if len(reasons) == len(examples):
        raise DataError(f"all {len(examples)} items are bad; the first: {next(iter(reasons.values()))}")
    return reasons


_NAME = re.compile(r"cpu|cuda(:\d+)?")


def resolve_device(asked: str) -> str:
    """Return "cpu" or "cuda:N"; "auto" takes a GPU if there is one. Raises: ConfigError."""
    if asked == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if not _NAME.fullmatch(asked):
        raise ConfigError(f"device is {asked!r}; it must be auto, cpu, cuda or cuda:N")
    if asked == "cpu":
        return asked
    number = int(asked.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {asked!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use device=cpu"
        )
    return f"cuda:{number}"


def resolve_devices(model: ModelSpec, asked: str) -> tuple[ModelSpec, str]:
    """Return the model with its devices by number, None for a single one, and the first device. Raises: ConfigError.

    The host's torch is asked how many GPUs there are, and no GPU is touched.
    """
    if model.devices is None:
        return model, resolve_device(asked)
    if asked not in ("auto", "cuda"):
        raise ConfigError(
            f"device is {asked!r}, but model.devices says which GPUs the model is spread over; use device=auto, or "
            "leave model.devices out"
        )
    numbers = chosen_devices(model.devices, torch.cuda.device_count())
    return replace(model, devices=numbers if len(numbers) > 1 else None), f"cuda:{numbers[0]}"


def resolve_engine(asked: str, device: str, *, is_spread: bool = False) -> Engine:
    """Return "eager" or "graph"; "auto" takes the graph on a GPU. Raises: ConfigError.

    is_spread: the model's layers lie on several GPUs, where no step is captured.
    """
    on_gpu = device.startswith("cuda")
    if asked == "auto":
        return "graph" if on_gpu and not is_spread else "eager"
    if asked not in ENGINES:
        raise ConfigError(f"engine is {asked!r}; {close_matches(asked, ('auto', *ENGINES))}")
    if asked == "graph" and not on_gpu:
        raise ConfigError(f"engine is 'graph', which needs a CUDA device, but device is {device!r}; use engine=auto")
    if asked == "graph" and is_spread:
        raise ConfigError(
            "engine is 'graph', which captures a step on one GPU, but model.devices spreads the model over several; "
            "use engine=eager (what engine=auto takes there)"
        )
    return cast(Engine, asked)


_PACKAGES = ("torch", "triton", "transformers", "hydra-core", "numpy", "rouge-score", "kvbench")


@cache
def environment(device: str, spread_over: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return versions, hardware and the code's commit; None for the version of what runs without being installed.

    spread_over: the GPUs that a model is spread over, each of which is named.
    """
    info: dict[str, Any] = {name.replace("-", "_"): _version(name) for name in _PACKAGES}
    info |= {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "device": device,
        "cpu_model": _cpu_model(),
        "num_threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        info |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    if spread_over:
        each = [torch.cuda.get_device_properties(number) for number in spread_over]
        info["devices"] = [f"cuda:{number}" for number in spread_over]
        info["gpus"] = [one.name for one in each]
        info["gpus_memory_bytes"] = [one.total_memory for one in each]
        info["accelerate"] = _version("accelerate")
    return info


def _version(name: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _git_commit() -> str | None:
    """Return the commit of a source checkout, "-dirty" if it has changes; None for a wheel."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


_MOST_MARKS = 256  # tokens that a template writes around a turn, and a tokenizer around a text, at most
_STRETCHING = ("linear", "dynamic", "yarn")  # rotary kinds whose factor stands for more context than is written


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a model is made for, from the fields of its config; None where it names no limit.

    `max_position_embeddings` of the text part. Where rotary positions are stretched by a factor it is multiplied, for
    yarn from the original length on, as published configurations mean it; llama3 and longrope write the whole length.
    """
    text = config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
    written = text.get("max_position_embeddings")
    if not isinstance(written, int) or written < 1:
        return None
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _STRETCHING:
        return written
    start = (rope.get("original_max_position_embeddings") if kind == "yarn" else None) or written
    return max(written, int(start * float(rope.get("factor") or 1.0)))


@dataclass(frozen=True, kw_only=True)
class ContextUse:
    """What a cell asks of the model's context: the limit, None without one, and which examples go beyond it.

    beyond: tokens needed, by example id, the most over all tasks. refused: those of them where a task reads text.
    """

    limit: int | None
    longest: int
    beyond: Mapping[str, int]
    refused: Mapping[str, int]
    num_examples: int
    digest: str

    def check(self) -> None:
        """Raise ModelSupportError for prompts beyond the context."""
        if not self.refused:
            return
        name = max(self.refused, key=lambda identity: self.refused[identity])
        raise ModelSupportError(
            f"{len(self.refused)} of {self.num_examples} prompts go beyond the model's context of {self.limit} tokens "
            f"({name} needs {self.refused[name]} with its answer); take shorter ones, or set beyond_context=allow to "
            "measure them all the same, which the record then says"
        )

    def as_record(self) -> dict[str, Any]:
        """Return what a record says of its prompts."""
        return {
            "digest": self.digest,
            "longest_tokens": self.longest,
            "context_tokens": self.limit,
            "num_beyond_context": len(self.beyond),
        }

    def measurement(self) -> dict[str, dict[str, Any]]:
        """Return `num_beyond_context` where there is any, else nothing."""
        method = f"prompt and answer against {self.limit} tokens"
        found = _count(len(self.beyond), self.num_examples, "prompts", method)
        return {"num_beyond_context": found} if self.beyond else {}


def context_use(
    loaded: LoadedModel,
    examples: Sequence[Example],
    given: GivenPrompts,
    setting: CacheSetting,
    tasks: Mapping[str, Task],
) -> ContextUse:
    """Return what `tasks` under `setting` ask of the context.

    Tasks of time and memory count, but nothing is refused for them: what a step costs does not depend on where a
    token stands.
    """
    limit = context_tokens(loaded.model.config.to_dict())
    beyond: dict[str, int] = {}
    refused: dict[str, int] = {}
    for task in tasks.values() if limit is not None else ():
        assert limit is not None
        reads = getattr(task, "reads_text", True)
        for example in examples if reads else examples[: getattr(task, "batch_size", len(examples))]:
            prompt = given.num_tokens[example.id]
            after = _after_prompt(loaded, example, task, limit - prompt)
            needed = _positions(prompt, prompt + after, setting, compares=hasattr(task, "max_new_tokens"))
            for found in (beyond, refused) if reads else (beyond,):
                if needed > limit:
                    found[example.id] = max(needed, found.get(example.id, 0))
    return ContextUse(
        limit=limit,
        longest=max(given.num_tokens.values(), default=0),
        beyond=beyond,
        refused=refused,
        num_examples=len(examples),
        digest=given.digest,
    )


def _after_prompt(loaded: LoadedModel, example: Example, task: Any, room: int) -> int:
    """Return how many tokens `task` feeds after the prompt; the last one of an answer is never fed.

    A text has at most as many tokens as bytes. Where that many fit into the `room` they are not counted one by one.
    """
    new = int(getattr(task, "max_new_tokens", getattr(task, "new_tokens", 0)))
    if getattr(task, "needs_follow_ups", False):
        asked = example.follow_ups[: getattr(task, "max_turns", 1) - 1]
        most = sum(new + _MOST_MARKS + len(turn.question.encode(errors="replace")) for turn in asked) + new
        if most <= room:
            return most
        return sum(new + len(next_turn_tokens(loaded, example, 2 + number)) for number in range(len(asked))) + new - 1
    if getattr(task, "needs_reference", False):
        if example.window is not None:
            return example.window.scored_tokens - 1
        most = _MOST_MARKS + len(example.reference.encode(errors="replace"))
        return most if most <= room else len(answer_tokens(loaded, example)) - 1
    return max(0, new - 1)


def _positions(prompt: int, whole: int, setting: CacheSetting, *, compares: bool) -> int:
    """Return the positions used, of a prompt and of all that is fed.

    The prompt always stands at its own positions. After it, ranks in the cache end at what the budget holds, unless the
    answers are compared with the full cache's, which stand at original ones.
    """
    if setting.positions == "original" or not setting.policy.bounded or compares:
        return whole
    held = setting.budget.entries(seen_tokens=whole, prompt_tokens=prompt) + 1
    return max(prompt, min(whole, held))


def check_windows(config: Mapping[str, Any] | None, examples: Sequence[Example], tasks: Mapping[str, Any]) -> None:
    """Raise ConfigError for windows of running text longer than the context; no tokenizer is needed to know that.

    config: the fields of the model's config, None where it is not at hand.
    """
    limit = None if config is None else context_tokens(config)
    longest = max((example.window.prompt_tokens for example in examples if example.window is not None), default=0)
    if limit is not None and longest > limit and any(getattr(task, "reads_text", True) for task in tasks.values()):
        raise ConfigError(
            f"a prompt of {longest} tokens goes beyond the model's context of {limit}; lower dataset.prompt_tokens, "
            "or beyond_context=allow to measure it all the same, which the record then says"
        )
