"""`kvbench frontier`: per policy the smallest budget that is as good as full at a margin, by bisection.

kvbench frontier policy=h2o,elastic
kvbench frontier policy=h2o,snapkv measure=ppl margin=0.05 dataset=mm_vet dataset.path=FILE
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvbench.cli.parser import Parser
from kvbench.cli.sweep import quiet_libraries
from kvbench.errors import ConfigError
from kvbench.frontier.search import LADDER, asked, asked_ladder, task_words
from kvbench.measures import measure
from kvbench.stats.power import look_confidence, most_looks, smallest_sample

if TYPE_CHECKING:
    from kvbench.config.compose import Composed
    from kvbench.frontier.search import Plan


_OWN = ("measure", "margin", "ladder", "name")
_TEXT = """\
Per policy the smallest budget at which a quality is at most MARGIN worse than with the full cache, by bisection.

words:
  measure=rougeL_vs_full   the quality; margin=0.02: how much worse is still safe (its declared margin by default)
  ladder=0.1,0.2,0.4,0.8   budgets to choose from; by default {ladder}
  name=NAME                of the file results/frontier/NAME.json; by default measure, margin and a digest of the
                           settings, so that the same command replaces its own file and no other one

Every other KEY=VALUE is a setting of the sweep: policy=h2o,elastic model=... dataset=... budget=tokens results=FOLDER.
"""


class _Stopped(Exception):  # noqa: N818
    """A signal ended the sweep; the same command goes on."""

    def __init__(self, code: int) -> None:
        self.code = code


def frontier_command(arguments: Sequence[str]) -> int:
    """Run the search, print its table, write its file, and return the exit code. Raises: ConfigError."""
    if {"--help", "-h"} & set(arguments):
        print("usage: kvbench frontier [policy=A,B] [measure=NAME] [margin=X] [ladder=A,B,C] [KEY=VALUE ...]\n")
        print(_TEXT.format(ladder=",".join(f"{rung:g}" for rung in LADDER)))
        return 0
    parser = Parser(prog="kvbench frontier", add_help=False, allow_abbrev=False)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=os.path.abspath)
    flags, words = parser.parse_known_args(list(arguments))
    for word in words:
        if word.startswith("-") or ("=" not in word and not word.startswith("~")):
            raise ConfigError(f"{word} is neither a flag nor KEY=VALUE; kvbench frontier --help lists what there is")
    own = {name: value for name, value in (word.split("=", 1) for word in words if "=" in word) if name in _OWN}
    overrides = [word for word in words if word.split("=", 1)[0] not in _OWN]
    quality, margin = asked(own)
    ladder = asked_ladder(own.get("ladder"), tokens="budget=tokens" in overrides)
    policies, fulls = _grids(overrides, quality, ladder, flags.config_dir)
    return _search(_plan(own, quality, margin, ladder, policies), policies, fulls)


def _grids(
    overrides: list[str], quality: str, ladder: tuple[float, ...], config_dir: str | None
) -> tuple[list[Composed], list[Composed]]:
    """Return each policy's cell at the largest budget and the full cache's, all checked. Raises: ConfigError."""
    from kvbench.cli.sweep import SUPERVISED, make_importable
    from kvbench.config.compose import compose_grid
    from kvbench.frontier.search import cell_of

    make_importable([config_dir] if config_dir else [])
    setting = "tokens" if "budget=tokens" in overrides else "fraction"
    if any(word.startswith(("budget.fraction", "budget.tokens", "+experiment", "experiment")) for word in overrides):
        raise ConfigError("the search chooses the budget; give ladder=A,B,C instead of budgets or an experiment")
    if not any(word.startswith("policy=") for word in overrides):
        raise ConfigError("no policy is given; add policy=h2o,elastic")
    named = {word.split("=", 1)[0].lstrip("+~") for word in overrides}
    extra = [] if "task" in named else task_words(quality)
    extra += [] if "sweep" in named else ["sweep=frontier"]
    top = int(ladder[-1]) if setting == "tokens" else ladder[-1]
    policies = compose_grid([*overrides, *extra, f"budget.{setting}={top}"], multirun=True, config_dir=config_dir)
    others = [word for word in overrides if not re.match(r"[+~]*policy[.=@]", word)]
    fulls = compose_grid([*others, *extra, "policy=full"], multirun=True, config_dir=config_dir)
    for composed in [*policies, *fulls]:
        if str(composed.choices["hydra/launcher"]) != SUPERVISED:
            raise ConfigError("hydra/launcher must be supervised here: a search decides after every look")
        cell_of(composed)
    if any(composed.choices["policy"] == "full" for composed in policies):
        raise ConfigError("policy=full has no budget to search; it is measured by itself")
    return policies, fulls


def _plan(
    own: dict[str, str], quality: str, margin: float, ladder: tuple[float, ...], policies: list[Composed]
) -> Plan:
    from kvbench.config.build import results_folder
    from kvbench.frontier.search import Plan, cell_of, default_name

    cells = [cell_of(composed) for composed in policies]
    setting = "tokens" if cells[0].settings["budget"]["fraction"] is None else "fraction"
    name = own.get("name", default_name(quality, margin, ladder, [cell.settings for cell in cells]))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", name):
        raise ConfigError(f"name is {name!r}; it must be a file name of letters, digits, '.', '_' and '-'")
    return Plan(
        name=name, measure=quality, margin=margin, ladder=ladder, budget_setting=setting,
        results=results_folder(policies[0].config),
    )  # fmt: skip


def _search(plan: Plan, policies: list[Composed], fulls: list[Composed]) -> int:
    from kvbench.frontier.search import search_all
    from kvbench.frontier.table import print_frontier, save_frontier

    quiet_libraries()
    _warn_of_few(plan, fulls[0])
    try:
        frontier = search_all(plan, policies, fulls, _run)
    except _Stopped as stopped:
        print("kvbench: stopped; finished cells are kept, the same command goes on", file=sys.stderr)
        return stopped.code
    print_frontier(frontier)
    print(f"frontier: {save_frontier(plan.results, frontier)}")
    return 0


def _run(grid: Sequence[Composed]) -> None:
    """Run the cells that have no record yet, as a sweep does."""
    from kvbench.cli.sweep import open_sweep
    from kvbench.sweep.sweep import StopRequest

    sweep = open_sweep(grid)
    with StopRequest().watching() as stop:
        sweep.run(stop)
    if stop.number is not None:
        raise _Stopped(stop.exit_code)


def _warn_of_few(plan: Plan, full: Composed) -> None:
    """Say before anything runs that a score of so few samples will hardly be shown to stay inside the margin."""
    from kvbench.frontier.search import cell_of

    if measure(plan.measure).unit not in ("score", "fraction"):
        return
    num = len({example.cluster for example in cell_of(full).dataset.examples()})
    needed = smallest_sample(plan.margin, look_confidence(len(plan.ladder)))
    if num < needed:
        looks = most_looks(len(plan.ladder))
        shown = f"note: {num} samples hardly show a margin of {plan.margin:g} in {looks} looks"
        print(f"{shown}, even where nothing differs; {needed} do (dataset.num_samples={needed})")
