"""The command line: check the whole grid, run it, print the table, write the report.

    kvbench                                            the default sweep
    kvbench policy=h2o budget.fraction=0.3             one cell
    kvbench -m policy=h2o,elastic budget.fraction=0.1,0.3
    kvbench report results                             the report again, from records alone

Exit codes: 0 all cells ok, 1 some cell failed, 2 wrong configuration, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kvbench.errors import ConfigError, KvbenchError
from kvbench.help_text import help_text
from kvbench.redaction import redact

if TYPE_CHECKING:
    from kvbench.runs.cell import Cell
    from kvbench.runs.sweep import Sweep

DEFAULT_SWEEP = ["+experiment=default"]
_HYDRA_ONLY = (
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--hydra-help",
    "--package",
    "-p",
    "--shell-completion",
    "-sc",
    "--resolve",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run kvbench with `arguments`, by default those of the process, and exit."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Return the exit code of one invocation."""
    if any(word in ("--help", "-h") for word in arguments):
        print(help_text())
        return 0
    if "--version" in arguments:
        print(_version())
        return 0
    try:
        if arguments[:1] == ["report"]:
            return _report(arguments[1:])
        if any(word.split("=")[0] in _HYDRA_ONLY for word in arguments):
            return _hand_to_hydra(arguments, lambda config: None)
        return _sweep(arguments or DEFAULT_SWEEP)
    except KvbenchError as error:
        print(f"kvbench: {redact(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvbench: interrupted; finished cells are kept, the same command goes on", file=sys.stderr)
        return 130


def _sweep(arguments: list[str]) -> int:
    from kvbench.compose import compose_grid

    words, overrides = _split(arguments)
    _make_importable(words.config_dir)
    grid = compose_grid(overrides, multirun=words.multirun, config_dir=words.config_dir)
    _quiet_libraries()
    from kvbench.config import build_cell, build_sinks, check_shared, is_forced, results_folder
    from kvbench.runs.sweep import Sweep

    check_shared(grid)
    cells = {cell.key: cell for cell in map(build_cell, grid)}
    first = grid[0].config
    sweep = Sweep(
        name=str(first.sweep),
        results=results_folder(first),
        cells=cells,
        sinks=build_sinks(first),
        force=is_forced(first),
    )
    try:
        sweep.open()
        if not sweep.is_complete:
            flags = [word for word in arguments if word not in overrides]  # Hydra wants them first
            _hand_to_hydra([*flags, *overrides], lambda config: sweep.run(_key_of(config)))
    finally:
        sweep.close()
    _show(sweep, cells, results_folder(first))
    return 1 if sweep.num_failed else 0


def _key_of(config: Any) -> str:
    """Build the cell of a job again, from what Hydra composed for it."""
    from hydra.core.hydra_config import HydraConfig

    from kvbench.compose import Composed
    from kvbench.config import build_cell

    choices = dict(HydraConfig.get().runtime.choices)
    return build_cell(Composed(config=config, choices=choices)).key


def _show(sweep: Sweep, cells: dict[str, Cell], results: Path) -> None:
    from kvbench.report.build import build_report
    from kvbench.report.load import load_results
    from kvbench.report.tables import print_tables

    print_tables(load_results(results, keys=set(cells)))
    paths = build_report(results)
    if sweep.num_failed:
        print(f"{sweep.num_failed} of {len(cells)} cells failed; their records say why")
    print(f"report: {paths.page}")
    print(f"tables: {', '.join(str(path) for path in paths.tables)}")


def _report(arguments: list[str]) -> int:
    from kvbench.report.build import build_report
    from kvbench.report.load import load_results
    from kvbench.report.tables import print_tables

    parser = _Parser(prog="kvbench report", description="Build table, figures and page from records.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results folder")
    parser.add_argument("--sweep", help="only the cells of this sweep")
    args = parser.parse_args(arguments)
    print_tables(load_results(args.folder, sweep=args.sweep))
    print(f"report: {build_report(args.folder, sweep=args.sweep).page}")
    return 0


def _split(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take Hydra's own flags apart from the overrides."""
    parser = _Parser(prog="kvbench", add_help=False, allow_abbrev=False)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=os.path.abspath)
    words, overrides = parser.parse_known_args(arguments)
    for word in overrides:
        if word.startswith("-"):
            raise ConfigError(f"{word} is no flag; kvbench --help lists flags and settings")
    return words, overrides


class _Parser(argparse.ArgumentParser):
    """One line instead of a usage and an exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; kvbench --help lists flags and settings")


def _make_importable(config_dir: str | None) -> None:
    """Let `_target_: mine.Mine` be found beside the user's configs or in the working folder.

    They go last on the path, so that no file of theirs can shadow a library.
    """
    if config_dir is not None:
        sys.path += [path for path in (str(Path.cwd()), str(Path(config_dir).parent)) if path not in sys.path]


def _hand_to_hydra(arguments: list[str], job: Any) -> int:
    import hydra

    sys.argv = [sys.argv[0], *arguments]
    errors: list[KvbenchError] = []

    def kvbench_cell(config: Any) -> None:
        # Hydra would print a traceback and end the process; what stops a sweep is told in one line instead.
        try:
            if not errors:
                job(config)
        except KvbenchError as error:
            errors.append(error)

    hydra.main(version_base="1.3", config_path="pkg://kvbench.conf", config_name="config")(kvbench_cell)()
    if errors:
        raise errors[0]
    return 0


def _quiet_libraries() -> None:
    """Keep notices about optional packages out of the progress bars; errors still show."""
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # a class that is not found is told in one line
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _version() -> str:
    from importlib.metadata import version

    return f"kvbench {version('kvbench')}"
