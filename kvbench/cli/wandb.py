"""`kvbench wandb sync`: send the records of any sweep to Weights & Biases, at any time.

kvbench wandb sync results --sweep default --project kvbench
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from kvbench.cli.parser import Parser
from kvbench.errors import ConfigError, check_known
from kvbench.results.redaction import redact
from kvbench.sinks.console import say
from kvbench.sinks.wandb.run import (
    MODES,
    Online,
    Place,
    check_installed,
    check_online,
    check_project,
    quiet_setup,
    resolve_mode,
)
from kvbench.sinks.wandb.sync import Outcome, jobs_of, send_runs

_MODES = tuple(mode for mode in MODES if mode != "disabled")
_LONGEST_S = 600.0
_SHOWN = 5  # failures, which are mostly all of one kind
_PLURALS = {"cell": "cells", "summary": "summaries"}


def wandb_command(arguments: Sequence[str]) -> int:
    """Run one subcommand and return its exit code: 1 if a run could not be sent. Raises: ConfigError."""
    args = _parser().parse_args(list(arguments))
    check_known("--mode", args.mode, _MODES)
    if not 0 < args.timeout <= _LONGEST_S:
        raise ConfigError(f"--timeout is {args.timeout:g}; it must lie in (0, {_LONGEST_S:g}] seconds")
    check_project(args.project)
    check_installed("records are to be sent to Weights & Biases")
    if args.mode == "online":
        check_online("--mode", "--mode auto")
    place = Place(project=args.project, entity=args.entity, folder=args.to or args.folder, timeout_s=args.timeout)
    jobs = jobs_of(args.folder, args.sweep, place.folder)
    mode, reason = resolve_mode(args.mode)
    if mode == "disabled":
        raise ConfigError("WANDB_MODE is 'disabled', so nothing would be sent; unset it, or give --mode")
    with tqdm(total=len(jobs), desc="wandb", unit=" runs", disable=None, leave=False) as bar:
        outcome = send_runs(jobs, place, mode, bar.update)
    _say(outcome, place, mode, reason)
    return 1 if outcome.failures else 0


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


def _say(outcome: Outcome, place: Place, mode: Online, reason: str) -> None:
    """Print what was sent where, and how to go on if something is left to do."""
    counts = [f"{count} {what if count == 1 else _PLURALS[what]}" for what, count in outcome.sent.items()]
    address = " ".join(part for part in (quiet_setup().rstrip("/"), place.entity, place.project) if part)
    where = f"sent to {address}" if mode == "online" else f"kept offline ({reason}) in {place.files}"
    there = f"{outcome.num_there} there already" if outcome.num_there else ""
    sent = f"{' and '.join(counts)} {where}" if counts else "" if there else f"nothing {where}"
    say(f"wandb: {'; '.join(part for part in (sent, there) if part)}")
    if mode == "offline":
        say(f"wandb: upload them with: {place.upload_command}")
    for failure in outcome.failures[:_SHOWN]:
        say(f"wandb: failed: {redact(failure)}")
    if outcome.failures:
        say(f"wandb: {len(outcome.failures)} failed, {outcome.num_left} not tried; the same command goes on with them")
