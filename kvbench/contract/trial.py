"""The contract as a whole, tried on one policy: what its rules find, what it costs here, and where it stands.

Where it stands is told in seconds: the bundled picture model answers a few held-out scenes with a fifth of the cache:
perplexity, teacher-forced through the policy's own decode, with its interval. Costs are of the same prompts. It says
whether a policy works, not how it ranks.
"""

from __future__ import annotations

import statistics
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvbench.cache import Budget, Needs, Policy, PolicyCache
from kvbench.cache.policy import keeps_ring, needs_of
from kvbench.contract import equality, holding
from kvbench.contract.catalogue import policy_named
from kvbench.contract.driving import artefacts_learnt
from kvbench.contract.terms import BrokenRuleError, Rule
from kvbench.datasets.scenes import Scenes
from kvbench.errors import KvbenchError
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.stats.intervals import Interval
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.perplexity import Perplexity
from kvbench.tasks.speed import deciding_ms, launch
from kvbench.tasks.task import Bench, FullAnswers, Prompts

RULES: tuple[Rule, ...] = tuple(
    found for module in (holding, equality) for found in vars(module).values() if isinstance(found, Rule)
)
_OURS = str(Path(__file__).parents[1])


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one rule: it holds, is broken (`line` says how), or asks nothing of the policy (`line`: why)."""

    rule: Rule
    outcome: Literal["holds", "broken", "not asked"]
    line: str
    num_cases: int
    seconds: float


def findings(policy: Policy, rules: Sequence[Rule] = RULES) -> Iterator[Finding]:
    """Try every case of every rule, up to the first that a rule is broken in."""
    for rule in rules:
        start = time.perf_counter()
        why = rule.spares(policy)
        outcome: Literal["holds", "broken", "not asked"] = "not asked" if why else "holds"
        tried: list[dict[str, Any]] = []
        for case in [] if why else rule.cases():
            if keeps_ring(policy) and "positions" in case:
                case["positions"] = "original"  # the last queries are kept as they were rotated
            tried.append(case)
            line = _broken(rule, policy, case)
            if line is not None:
                outcome, why = "broken", line
                break
        taken = time.perf_counter() - start
        yield Finding(rule=rule, outcome=outcome, line=why or "", num_cases=len(tried), seconds=taken)


def _broken(rule: Rule, policy: Policy, case: dict[str, Any]) -> str | None:
    """Return how a rule is broken in a case, in one line; None if it is kept."""
    try:
        with artefacts_learnt(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # prompts of plain tokens have no picture and no question
            rule(policy, **case)
    except BrokenRuleError as error:
        told = str(error)
    except Exception as error:  # a policy may raise anything
        told = " ".join(str(error).split())[:400]
        if not isinstance(error, KvbenchError):
            told = f"{type(error).__name__}: {told} ({_place(error)})"
    else:
        return None
    where = ", ".join(
        f"{name} {value.describe() if isinstance(value, Budget) else value}" for name, value in case.items()
    )
    return f"{told} [{where}]" if where else told


def _place(error: BaseException) -> str:
    """Return the line of the user's own file that an exception came by, else the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_OURS) and "site-packages" not in frame.filename]
    last = (own or list(frames))[-1]
    return f"{Path(last.filename).name}, line {last.lineno}"


BESIDE = ("full", "h2o", "snapkv", "random")
FRACTION = 0.2
NUM_SCENES = 12
_REPEATS = 5
BATCH_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a policy costs: per prompt and per step in ms on this machine, and bytes beside keys and values.

    prompt_ms: all that it adds to a prompt of `batch_size` x `prompt_tokens`, statistics included. step_ms: the time in
    which all layers name their victims. kv_bytes, statistics_bytes: after the prompt and the steps.
    """

    needs: tuple[str, ...]
    batch_size: int
    prompt_tokens: int
    prompt_ms: float
    step_ms: float
    kv_bytes: int
    statistics_bytes: int


def small_model() -> LoadedModel:
    """Return the bundled model on the CPU."""
    return load_model(ModelSpec(checkpoint="bundled"), "cpu")


def costs(policy: Policy, loaded: LoadedModel) -> Costs:
    """Measure what a policy costs beside the model. Raises: KvbenchError."""
    batch = prompt_batch(loaded, Scenes(num_samples=BATCH_SIZE).examples())
    caches: list[PolicyCache] = []
    settled: list[float] = []
    for _ in range(_REPEATS):
        done = launch(loaded, batch, _setting(policy), 4, observe=caches.append)
        settled.append(done.settle_ms)
    cache = caches[-1]
    held = cache.occupancy()
    return Costs(
        needs=tuple(need.name for need in Needs if need in needs_of(policy) and need.name is not None),
        batch_size=BATCH_SIZE,
        prompt_tokens=max(batch.prompt_tokens),
        prompt_ms=statistics.median(settled),
        step_ms=deciding_ms(cache, policy).value or 0.0,
        kv_bytes=held.stored_bytes,
        statistics_bytes=held.statistics_bytes,
    )


def standing(
    policies: Mapping[str, Policy], loaded: LoadedModel, num_scenes: int = NUM_SCENES
) -> Iterator[tuple[str, Interval | str]]:
    """Yield the perplexity of each policy on the same scenes, or why it has none."""
    data, full = Scenes(num_samples=num_scenes), policy_named("full")
    prompts = Prompts(loaded, data.examples(), num_scenes, share=[*policies.values(), full])
    for name, policy in policies.items():
        bench = Bench(
            loaded=loaded,
            dataset=data,
            examples=data.examples(),
            setting=_setting(policy),
            full_policy=full,
            answers=FullAnswers(folder=Path("unused"), settings={}),
            batch_size=num_scenes,
            advance=lambda share: None,
            shared_prompts=prompts,
        )
        try:
            found = Perplexity().run(bench).measurements["ppl"]
        except KvbenchError as error:
            yield name, " ".join(str(error).split())
            continue
        yield name, Interval(**{key: found[key] for key in ("value", "low", "high", "n", "method")})


def neighbours(names: Sequence[str] = BESIDE) -> dict[str, Policy]:
    """Return the policies that stand beside."""
    return {name: policy_named(name) for name in names}


def _setting(policy: Policy) -> CacheSetting:
    return CacheSetting(policy=policy, budget=Budget(fraction=FRACTION), positions=policy.native_positions)
