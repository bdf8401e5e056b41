"""`kvbench policies`: every policy with its source, its parts, what it reads and when it cuts.

kvbench policies
kvbench policies snap --json
kvbench policies --config-dir conf
kvbench policies snap --costs       what each takes on this machine, beside the model
kvbench policies --update .         the lists in README.md and docs/policies.md of a checkout
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.cli import Parser
from kvbench.cli.sweep import make_importable, quiet_libraries
from kvbench.errors import ConfigError, KvbenchError, close_matches
from kvbench.measures import format_bytes
from kvbench.results.files import replace_file

if TYPE_CHECKING:
    from kvbench.contract.catalogue import PolicyFacts


def policies_command(arguments: Sequence[str]) -> int:
    """Print the policies that `arguments` ask for and return 0. Raises: ConfigError for a word that none has."""
    parser = Parser(
        prog="kvbench policies",
        description="Every policy: source, parts (score, allocation, merge, rhythm), what it reads, when it cuts, "
        "whether the budget is used exactly, and whether it is as described, as released or a baseline.",
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="only policies with it in their line")
    parser.add_argument("--config-dir", metavar="DIR", help="those of DIR/policy too")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all facts as JSON")
    form.add_argument("--markdown", action="store_true", help="the same table in Markdown")
    form.add_argument("--costs", action="store_true", help="measure what each takes on this machine, as Markdown")
    form.add_argument("--update", metavar="CHECKOUT", type=Path, help="make the lists of its pages anew")
    args = parser.parse_args(list(arguments))
    quiet_libraries()
    make_importable([args.config_dir] if args.config_dir else [])
    from kvbench.contract.catalogue import catalogue, full_markdown

    facts = catalogue(args.config_dir)
    if args.update is not None:
        return _update(args.update, facts)
    found = _having(args.words, facts)
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    elif args.markdown:
        print("\n".join(full_markdown(found)))
    elif args.costs:
        _print_costs([one.name for one in found], args.config_dir)
    else:
        _print_table(found)
    return 0


def _having(words: Sequence[str], facts: Sequence[PolicyFacts]) -> list[PolicyFacts]:
    """Return the policies whose line has each of the words. Raises: ConfigError if none has."""
    lines = {one.name: " ".join(map(str, asdict(one).values())).casefold() for one in facts}
    found = [one for one in facts if all(word.casefold() in lines[one.name] for word in words)]
    if not found:
        raise ConfigError(
            f"no policy has {' and '.join(map(repr, words))} in its line; {close_matches(words[0], lines)}"
        )
    return found


def _print_table(facts: Sequence[PolicyFacts]) -> None:
    from rich.console import Console

    from kvbench.contract.catalogue import table
    from kvbench.report.tables import ruled

    heads, rows = table(facts)
    drawn = ruled("", "an empty cell is the common case: uniform, drop, nothing; what each keeps: --json", 2)
    for head in heads:
        drawn.add_column(head, no_wrap=head == "policy")
    for row in rows:
        drawn.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(drawn)


def _print_costs(names: Sequence[str], config_dir: str | None) -> None:
    """Measure policy after policy on the bundled model, and print a row for each as it comes."""
    from kvbench.contract.catalogue import policy_named
    from kvbench.contract.comparison import BATCH_SIZE, FRACTION, costs, small_model

    loaded = small_model()
    print(f"{BATCH_SIZE} prompts of scenes, bundled model, {FRACTION:.0%} of the tokens seen, CPU\n")
    print(
        "| policy | reads | per prompt, ms | per step, ms | statistics | keys and values |\n|---|---|---|---|---|---|"
    )
    for name in names:
        try:
            found = costs(policy_named(name, config_dir), loaded)
        except KvbenchError as error:
            print(f"| `{name}` | {' '.join(str(error).split())} | | | | |", flush=True)
            continue
        times = f"{found.prompt_ms:.2f} | {found.step_ms:.3f}"
        held = f"{format_bytes(found.statistics_bytes)} | {format_bytes(found.kv_bytes)}"
        print(f"| `{name}` | {', '.join(found.needs).lower()} | {times} | {held} |", flush=True)


def _update(checkout: Path, facts: Sequence[PolicyFacts]) -> int:
    from kvbench.contract.catalogue import PAGES, filled_page

    for page in (checkout / name for name in PAGES):
        if not page.is_file():
            raise ConfigError(f"--update {checkout} is no checkout: it has no {page.relative_to(checkout)}")
        before = page.read_text(encoding="utf-8")
        after = filled_page(before, facts)
        if after != before:
            replace_file(page, after.encode())
        print(f"{page}: {'made anew' if after != before else 'was current'}")
    return 0
