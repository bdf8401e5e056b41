"""The command line: check the whole grid, run it, print the table, write the report.

    kvbench                                            the default sweep
    kvbench policy=h2o budget.fraction=0.3             one cell
    kvbench -m policy=h2o,elastic budget.fraction=0.1,0.3
    kvbench report results                             the report again, from records alone

Exit codes: 0 all cells ok, 1 some cell failed, 2 wrong configuration, 130 or 143 stopped by a signal.

What `kvbench --help` prints, made from the configuration folder, without importing Hydra.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from kvbench.cli.parser import Parser
from kvbench.cli.sweep import quiet_libraries
from kvbench.errors import ConfigError, KvbenchError
from kvbench.installed import installed_version
from kvbench.results.redaction import redact

if TYPE_CHECKING:
    from kvbench.sweep.sweep import Sweep


_GROUPS = ("model", "weights", "dataset", "policy", "budget", "task", "workload", "sink", "autopsy", "experiment")
_TEXT = """\
kvbench compares KV-cache policies under one definition of everything.

  kvbench                                     run the default sweep, then print the table and write the report
  kvbench policy=h2o budget.fraction=0.3      run one cell
  kvbench -m policy=h2o,elastic budget.fraction=0.1,0.3
                                              run every combination
  kvbench +experiment=NAME                    run a named sweep
  kvbench report [FOLDER...] [--format F]     build page, figures and tables again from records; report --help
  kvbench audit [FOLDER] [--sweep NAME]       check that the records hold together; exit code 1 if one does not
  kvbench frontier policy=h2o,elastic         smallest budget as good as full; frontier --help
  kvbench plot NAME [FOLDER]                  draw one figure as SVG, PDF or PNG; kvbench plot --list
  kvbench results COMMAND [FOLDER]            list, show, table, csv, parquet, verify, gc; results --help
  kvbench wandb sync [FOLDER]                 send records to Weights & Biases; wandb sync --help

settings (KEY=VALUE):
{groups}
  positions    native, original, in_cache, released
  query_visible  true, false (picture or context is compressed before the question comes)
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
    return _TEXT.format(groups="\n".join(f"  {group:<12} {', '.join(_names(group))}" for group in _GROUPS))


def _names(group: str) -> list[str]:
    folder = files("kvbench.conf") / group
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


# Each takes the words after its name and returns the exit code; imported only when asked for.
SUBCOMMANDS = {
    "audit": "kvbench.cli.audit:audit_command",
    "frontier": "kvbench.cli.frontier:frontier_command",
    "plot": "kvbench.cli.plot:plot_command",
    "report": "kvbench.cli.report:report_command",
    "results": "kvbench.cli.results:results_command",
    "wandb": "kvbench.cli.wandb:wandb_command",
}
_STOPPED = "stopped; finished cells and batches are kept, the same command goes on"
DEFAULT_SWEEP = ["+experiment=default"]
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_SHELLS = ("bash", "fish", "zsh")
_OWN_CONFIG = (
    "is not supported, every cell is made from kvbench's own configuration; put your settings into "
    "DIR/experiment/NAME.yaml and give --config-dir DIR +experiment=NAME"
)
_REFUSED = {  # flags of Hydra's, and why they are none of ours
    ("--config-name", "-cn"): _OWN_CONFIG,
    ("--config-path", "-cp"): _OWN_CONFIG,
    ("--experimental-rerun",): "is not supported; the same command again measures what has no record yet",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run kvbench with `arguments`, by default those of the process, and exit."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Return the exit code of one invocation."""
    try:
        installed_version()
        return _answer(arguments)
    except KvbenchError as error:
        print(f"kvbench: {redact(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"kvbench: {_STOPPED}", file=sys.stderr)
        return 130


def _answer(arguments: list[str]) -> int:
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
    return _sweep(words, overrides)


def _sweep(words: argparse.Namespace, overrides: list[str]) -> int:
    from kvbench.config.compose import compose_grid

    quiet_libraries()
    grid = compose_grid(overrides, multirun=words.multirun, config_dir=words.config_dir)
    from kvbench.cli.sweep import SUPERVISED, make_importable, open_sweep

    make_importable([words.config_dir] if words.config_dir else [])
    launcher = str(grid[0].choices["hydra/launcher"])
    if launcher != SUPERVISED and not grid[0].multirun:
        raise ConfigError(f"hydra/launcher is {launcher!r}, which starts the jobs of a sweep; add -m, or leave it out")
    sweep = open_sweep(grid)
    if sweep.missing and launcher == SUPERVISED:
        code = _supervise(sweep)
        if code:
            print(f"kvbench: {_STOPPED}", file=sys.stderr)
            return code
    elif sweep.missing:
        _hand_to_launcher(sweep, [*_flags(words), *overrides])
    _show(sweep)
    return 1 if sweep.num_failed else 0


def _supervise(sweep: Sweep) -> int:
    """Run what is missing; return 0, or the exit code of a process that was told to stop."""
    from kvbench.sweep.sweep import StopRequest

    with StopRequest().watching() as stop:
        sweep.run(stop)
    return 0 if stop.number is None else stop.exit_code


def _hand_to_launcher(sweep: Sweep, arguments: list[str]) -> None:
    """Let Hydra start one job per cell; what became of them is read from the store, not from Hydra."""
    from kvbench.cli.sweep import run_job

    known = sweep.attempt_ids
    with contextlib.suppress(SystemExit):
        _hand_to_hydra(arguments, run_job)
    sweep.gather(known)


def _show(sweep: Sweep) -> None:
    from kvbench.report.build import refresh_report
    from kvbench.report.load import load_results
    from kvbench.report.tables import print_tables

    results, num_cells = sweep.results, len(sweep.tickets)
    if sweep.num_reused:
        print(
            f"{sweep.num_reused} of {num_cells} cells were done already (records under {results}/cells); "
            "force=true measures again"
        )
    print_tables(load_results(results, keys=set(sweep.tickets)))
    refresh_report(results)
    sweep.summarise(lambda: _wandb_summary(sweep))
    if sweep.num_failed:
        print(f"{sweep.num_failed} of {num_cells} cells failed; their records say why")
    print(f"report: {results / 'report' / 'index.html'}")
    print(f"tables: {results / 'table.csv'}, {results / 'samples.csv'} and both as .parquet")


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
    for word in overrides:
        if word.startswith("-"):
            raise ConfigError(f"{word} is no flag; kvbench --help lists flags and settings")
    _check_together(words)
    return words, overrides


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
    from kvbench.config.compose import check_overrides

    swept: dict[str, str] = {}
    if words.shell_completion:
        commands = [f"{command}={shell}" for command in ("install", "uninstall", "query") for shell in _SHELLS]
        if len(overrides) != 1 or overrides[0] not in commands:
            raise ConfigError(f"--shell-completion needs one of {', '.join(commands)}; it got {' '.join(overrides)!r}")
    elif not words.hydra_help:
        swept = check_overrides(overrides, config_dir=words.config_dir)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            _hand_to_hydra([*_flags(words), *overrides], _nothing)
        except SystemExit as end:
            if end.code:
                reason = str(end.__context__ or said.getvalue())  # Hydra prints a traceback of what it handles
                raise ConfigError(" ".join(reason.split())) from end
    sys.stderr.write(said.getvalue())
    for name, values in swept.items() if words.cfg else ():  # what Hydra shows is one cell of these
        print(f"# swept: {name}={values}")
    return 0


def _hand_to_hydra(arguments: list[str], job: Callable[[Any], Any]) -> None:
    import hydra

    sys.argv = [sys.argv[0], *arguments]
    hydra.main(version_base="1.3", config_path="pkg://kvbench.conf", config_name="config")(job)()


def _nothing(config: Any) -> None:
    """Run nothing: Hydra prints and ends."""
