"""`kvbench audit`: does a results folder hold together? Reads records alone; no torch, no model.

kvbench audit results --json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kvbench import installed_version
from kvbench.cli import Parser
from kvbench.errors import ConfigError
from kvbench.results.files import seal, write_out

_DESCRIPTION = (
    "Check that the records of a folder hold together: sealed, keyed, counted, recomputed, within the budget. "
    "Writes audit.json (sealed) and audit.svg (a badge), and prints the table and a line for a README. "
    "Exit code 0: none failed, 1: one failed, 2: wrong command line or no records. What is not run is counted apart."
)


def audit_command(arguments: Sequence[str]) -> int:
    """Audit the folder that `arguments` name and return the exit code. Raises: ConfigError."""
    parser = Parser(prog="kvbench audit", description=_DESCRIPTION)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results folder")
    parser.add_argument("--sweep", help="only cells of this sweep")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.add_argument("--out", type=Path, help="file to write, its folder is made; FOLDER/audit.json if not given")
    args = parser.parse_args(list(arguments))
    from kvbench.audit.audit import KIND, VERSION, audit, audit_body, badge_line, badge_svg, table_lines

    out: Path = args.out or args.folder / "audit.json"
    if out.suffix != ".json":
        raise ConfigError(f"--out is {str(out)!r}; its name must end in .json, the badge takes .svg beside it")
    result, badge = audit(args.folder, sweep=args.sweep), out.with_suffix(".svg")
    body = audit_body(result, version=installed_version(), sweep=args.sweep)
    write_out(out, seal(KIND, VERSION, body))
    write_out(badge, badge_svg(result).encode())
    if args.json:
        print(json.dumps(body, indent=2, sort_keys=True))
    else:
        for line in table_lines(result):
            print(line)
        print(f"written: {out}, {badge}")
        print(f"for a README: {badge_line(result, badge.as_posix(), out.as_posix())}")
    return 1 if result.failed else 0
