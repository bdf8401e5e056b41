"""The contract as a whole: its rules in order, and what they find of one policy."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvbench.cache import Budget, Policy
from kvbench.cache.policy import keeps_ring
from kvbench.contract import deciding, equality, holding
from kvbench.contract.driving import artefacts_learnt
from kvbench.contract.terms import BrokenRuleError, Rule
from kvbench.errors import KvbenchError

RULES: tuple[Rule, ...] = tuple(
    found for module in (holding, deciding, equality) for found in vars(module).values() if isinstance(found, Rule)
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
