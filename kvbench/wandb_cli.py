"""`kvbench wandb sync`: send the records of any sweep to Weights & Biases, at any time.

kvbench wandb sync results --sweep default --project kvbench
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvbench.errors import ConfigError, close_matches
from kvbench.installed import installed_version
from kvbench.parser import Parser
from kvbench.results.record import read_cell
from kvbench.results.redaction import redact, redacted_body
from kvbench.results.store import RecordStore
from kvbench.sinks.console import say
from kvbench.sinks.wandb.content import cell_digest, cell_run, summary_digest, summary_id
from kvbench.sinks.wandb.run import (
    MODES,
    Online,
    Place,
    RunSpec,
    check_installed,
    check_online,
    check_project,
    quiet_setup,
    resolve_mode,
)
from kvbench.sinks.wandb.sync import Job, Outcome, cells_of_sweep, send_runs

_MODES = tuple(mode for mode in MODES if mode != "disabled")
_LONGEST_S = 600.0
_SHOWN = 5  # failures, which are mostly all of one kind


def wandb_command(arguments: Sequence[str]) -> int:
    """Run one subcommand and return its exit code: 1 if a run could not be sent. Raises: ConfigError."""
    args = _parser().parse_args(list(arguments))
    if args.mode not in _MODES:
        raise ConfigError(f"--mode is {args.mode!r}; {close_matches(args.mode, _MODES)}")
    if not 0 < args.timeout <= _LONGEST_S:
        raise ConfigError(f"--timeout is {args.timeout:g}; it must lie in (0, {_LONGEST_S:g}] seconds")
    check_project(args.project)
    check_installed("records are to be sent to Weights & Biases")
    if args.mode == "online":
        check_online("--mode", "--mode auto")
    return _sync(args)


def _parser() -> Parser:
    parser = Parser(prog="kvbench wandb", description="Send records to Weights & Biases.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    text = "send each cell that was not sent yet as one run, and each sweep as one more"
    sync = commands.add_parser("sync", help=text, description=f"{text[0].upper()}{text[1:]}.")
    sync.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results folder")
    sync.add_argument("--sweep", help="only the cells of this sweep")
    sync.add_argument("--project", default="kvbench", help="W&B project (default: kvbench)")
    sync.add_argument("--entity", help="W&B team or user (default: that of the account)")
    sync.add_argument("--mode", default="auto", help="auto (online with a key, else offline), online, offline")
    sync.add_argument("--to", type=Path, metavar="DIR", help="folder for wandb's files (default: the results folder)")
    sync.add_argument("--timeout", type=float, default=30.0, metavar="S", help="limit for the start and end of a run")
    return parser


def _sync(args: argparse.Namespace) -> int:
    place = Place(project=args.project, entity=args.entity, folder=args.to or args.folder, timeout_s=args.timeout)
    jobs = _jobs(args.folder, args.sweep, place.folder)
    mode, reason = resolve_mode(args.mode)
    if mode == "disabled":
        raise ConfigError("WANDB_MODE is 'disabled', so nothing would be sent; unset it, or give --mode")
    with tqdm(total=len(jobs), desc="wandb", unit=" runs", disable=None, leave=False) as bar:
        outcome = send_runs(jobs, place, mode, bar.update)
    _say(outcome, place, mode, reason)
    return 1 if outcome.failures else 0


def _jobs(folder: Path, sweep: str | None, to: Path) -> list[Job]:
    """Return a job per cell, and one per sweep of more than one cell, each sweep's own after its cells."""
    from kvbench.report.load import load_results

    loaded = load_results(folder, sweep=sweep)
    for problem in loaded.problems:
        say(f"problem: {problem.path}: {problem.message}")
    sweeps: dict[str, list[str]] = {}
    for cell in loaded.records:
        if _path(folder, cell.key).exists():  # one that was moved is among the problems
            sweeps.setdefault(cell.sweep, []).append(cell.key)
    if not sweeps:
        raise ConfigError("no record is left to send; kvbench results list shows what there is")
    return [job for name, keys in sorted(sweeps.items()) for job in _sweep_jobs(folder, name, keys, to)]


def _sweep_jobs(folder: Path, sweep: str, keys: list[str], to: Path) -> Iterator[Job]:
    # Read again when its turn comes: the bodies of a large sweep need not be held together.
    known = {key: cell_digest(_body(folder, key)) for key in keys}
    yield from (Job(id=key[:16], digest=known[key], what="cell", make=partial(_cell, folder, key)) for key in keys)
    keys = cells_of_sweep(folder, sweep, keys, lambda key: _path(folder, key).exists())
    if len(keys) > 1:
        from kvbench.wandb_summary import summary_of

        digests = [known.get(key) or cell_digest(_body(folder, key)) for key in keys]
        digest = summary_digest(digests, installed_version())
        make = partial(summary_of, folder, sweep, keys, to=to)
        yield Job(id=summary_id(sweep, keys), digest=digest, what="summary", make=make)


def _cell(folder: Path, key: str) -> RunSpec:
    return cell_run(_body(folder, key))


def _body(folder: Path, key: str) -> dict[str, Any]:
    return redacted_body(read_cell(_path(folder, key).parent).body)


def _path(folder: Path, key: str) -> Path:
    return RecordStore(folder).record_file(key)


def _say(outcome: Outcome, place: Place, mode: Online, reason: str) -> None:
    """Print what was sent where, and how to go on if something is left to do."""
    counts = [f"{count} {what if count == 1 else _plural(what)}" for what, count in outcome.sent.items()]
    folder = (place.folder / "wandb").resolve()
    where = f"sent to {_address(place)}" if mode == "online" else f"kept offline ({reason}) in {folder}"
    there = f"{outcome.num_there} there already" if outcome.num_there else ""
    sent = f"{' and '.join(counts)} {where}" if counts else "" if there else f"nothing {where}"
    say(f"wandb: {'; '.join(part for part in (sent, there) if part)}")
    if mode == "offline":
        say(f"wandb: upload them with: wandb sync {shlex.quote(str(folder))}/offline-run-*")
    for failure in outcome.failures[:_SHOWN]:
        say(f"wandb: failed: {redact(failure)}")
    if outcome.failures:
        say(f"wandb: {len(outcome.failures)} failed, {outcome.num_left} not tried; the same command goes on with them")


def _plural(what: str) -> str:
    return "summaries" if what == "summary" else f"{what}s"


def _address(place: Place) -> str:
    parts = (quiet_setup().rstrip("/"), place.entity, place.project)
    return " ".join(part for part in parts if part)
