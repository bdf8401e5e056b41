"""`kvbench check-policy`: the contract on one policy, what it costs, and where it stands; in under a minute.

kvbench check-policy h2o
kvbench check-policy mine --config-dir conf
kvbench check-policy mine.py
kvbench check-policy conf/policy/mine.yaml --contract-only
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.cli import Parser, names_in
from kvbench.cli.sweep import make_importable, quiet_libraries
from kvbench.config.compose import compose_grid
from kvbench.errors import ConfigError, KvbenchError, missing_path
from kvbench.measures import format_bytes

if TYPE_CHECKING:
    from kvbench.contract.trial import Finding

_OUTCOMES = {"holds": "holds", "broken": "BROKEN", "not asked": "not asked"}


def check_policy_command(arguments: Sequence[str]) -> int:
    """Try a policy and return 0 if every rule holds, 1 if one is broken. Raises: ConfigError."""
    parser = Parser(
        prog="kvbench check-policy",
        description="Try every rule of the contract on one policy, measure what it costs on this machine, and show "
        "where it stands beside full, h2o, snapkv and random on a dozen scenes. Exit code 1 if a rule is broken.",
    )
    parser.add_argument("policy", metavar="NAME|FILE", help="a policy's name, its yaml, or a .py with one policy class")
    parser.add_argument("--config-dir", metavar="DIR", help="look for DIR/policy/NAME.yaml too")
    parser.add_argument("--contract-only", action="store_true", help="rules alone: no costs, no standing")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    args = parser.parse_args(list(arguments))
    quiet_libraries()
    name, policy = _policy(args.policy, args.config_dir)
    from kvbench.contract.catalogue import reads
    from kvbench.contract.trial import findings

    if reads(policy, "FUTURE"):
        raise ConfigError(f"{name} sees the future, which only a task that knows its tokens can tell; nothing is tried")
    import torch

    torch.set_num_threads(1)  # the tensors are tiny: more threads take longer on a machine that does anything else
    gc.collect()
    gc.freeze()  # one rule looks for what is still alive, and need not look through libraries
    found = []
    for finding in findings(policy):
        found.append(finding)
        if not args.json:
            _print_finding(finding)
    broken = [finding for finding in found if finding.outcome == "broken"]
    told: dict[str, Any] = {"policy": name, "holds": not broken, "rules": [_plain(finding) for finding in found]}
    gc.unfreeze()  # the interpreter ends as it would without
    if not args.json:
        print(_summary(name, found))
    if reads(policy, "ARTEFACT"):  # the contract learns one of random tokens, which says nothing of quality
        told["not_measured"] = f"costs and standing need an artefact: kvbench calibrate {name}, then a sweep"
        if not args.json:
            print(told["not_measured"])
    elif not broken and not args.contract_only:
        told |= _measured(name, policy, show=not args.json)
    if args.json:
        print(json.dumps(told, indent=2))
    return 1 if broken else 0


def _policy(asked: str, config_dir: str | None) -> tuple[str, Any]:
    """Return name and policy of a name, a yaml or a module. Raises: ConfigError, one line."""
    path = Path(asked)
    if path.suffix not in (".py", ".yaml") and asked not in names_in("policy", config_dir):
        compose_grid([f"policy={asked}"], multirun=False, config_dir=config_dir)  # says so before torch is loaded
    from kvbench.contract.catalogue import policy_in_module, policy_named

    if path.suffix not in (".py", ".yaml"):
        make_importable([config_dir] if config_dir else [])
        return asked, policy_named(asked, config_dir)
    if not path.is_file():
        raise ConfigError(f"the policy to check is {asked}, but {missing_path(path)}")
    if path.suffix == ".py":
        make_importable([str(path.absolute().parent / "conf")])
        return path.stem, policy_in_module(path)
    folder = path.absolute().parent.parent
    if path.absolute().parent.name != "policy":
        raise ConfigError(f"{asked} does not lie in a folder named policy; put it there, as DIR/policy/{path.name}")
    make_importable([str(folder)])
    return path.stem, policy_named(path.stem, str(folder))


def _print_finding(finding: Finding) -> None:
    rule = finding.rule
    print(f"{_OUTCOMES[finding.outcome]:<9}  {rule.sentence}")
    print(f"{'':<9}  {finding.line if finding.line else f'because {rule.because}'}", flush=True)


def _summary(name: str, found: Sequence[Finding]) -> str:
    counts = {outcome: sum(one.outcome == outcome for one in found) for outcome in _OUTCOMES}
    cases, seconds = sum(one.num_cases for one in found), sum(one.seconds for one in found)
    return (
        f"\n{name}: {counts['holds']} rules hold, {counts['broken']} broken, {counts['not asked']} not asked of it; "
        f"{cases} cases in {seconds:.0f} s. Not tried here: kernels and captured steps, which need a GPU"
    )


def _plain(finding: Finding) -> dict[str, Any]:
    told = {"rule": finding.rule.name, "sentence": finding.rule.sentence, "because": finding.rule.because}
    return {**told, "outcome": finding.outcome, "line": finding.line, "num_cases": finding.num_cases}


def _measured(name: str, policy: Any, *, show: bool) -> dict[str, Any]:
    """Measure costs and standing, print them as they come, and return them as plain data."""
    from kvbench.contract.comparison import FRACTION, NUM_SCENES, costs, neighbours, small_model, standing

    loaded = small_model()
    try:
        cost = costs(policy, loaded)
    except KvbenchError as error:  # the scenes are nothing for it, which is no fault
        why = f"costs and standing are not measured: {' '.join(str(error).split())}"
        if show:
            print(f"\n{why}")
        return {"not_measured": why}
    if show:
        print(
            f"\ncosts, {cost.batch_size} prompts of up to {cost.prompt_tokens} tokens at {FRACTION:.0%} of seen, this "
            f"machine: {cost.prompt_ms:.2f} ms per prompt beside the model, {cost.step_ms:.3f} ms per step; reads "
            f"{', '.join(cost.needs).lower() or 'no attention'}; {format_bytes(cost.statistics_bytes)} beside "
            f"{format_bytes(cost.kv_bytes)} of keys and values"
        )
        print(f"\nperplexity of {NUM_SCENES} scenes on the bundled model at {FRACTION:.0%} (lower is better), 95 %:")
    beside = {one: other for one, other in neighbours().items() if one != name}
    stands: dict[str, Any] = {}
    for one, ppl in standing({name: policy, **beside}, loaded):
        stands[one] = ppl if isinstance(ppl, str) else {"ppl": ppl.value, "low": ppl.low, "high": ppl.high, "n": ppl.n}
        if show:
            text = ppl if isinstance(ppl, str) else f"{ppl.value:.3f} [{ppl.low:.3f}, {ppl.high:.3f}]"
            print(f"  {one:<16} {text}", flush=True)
    return {"costs": asdict(cost), "standing": stands}
