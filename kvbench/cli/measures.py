"""`kvbench measures`: what can be measured, each with its unit, which way is better, and what it means.

kvbench measures
kvbench measures rouge tpot
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from kvbench.cli import Parser
from kvbench.measures import MAX_TURNS, MEASURES, Measure, measure_named

_DESCRIPTION = (
    "What can be measured. Wherever a measure is asked for (--measure, --margin, measure=, objective=) its name, its "
    "label or an unambiguous beginning of either will do."
)
_BETTER = {"higher": "higher is better", "lower": "lower is better", "none": "neither is better"}
_FIRST_TURN = "turn1_"
_TURN = re.compile(r"turn\d+_")


def measures_command(arguments: Sequence[str]) -> int:
    """Print the measures that `arguments` ask for and return 0. Raises: ConfigError for a word that none has."""
    parser = Parser(prog="kvbench measures", description=_DESCRIPTION)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only measures with it in their name or label")
    parser.add_argument("--json", action="store_true", help="names, units, directions and meanings as JSON")
    args = parser.parse_args(list(arguments))
    found = _found(args.words)
    if args.json:
        print(json.dumps([asdict(known) for known in found], indent=2))
        return 0
    for line in _lines(found, has_turns=not args.words):
        print(line)
    return 0


def _found(words: Sequence[str]) -> list[Measure]:
    """Return what has one of the words in its name or label, all without words; of turns only what is asked for."""
    found: dict[str, Measure] = {}
    for word in words or ("",):
        asked = word.casefold()
        having = {name: one for name, one in MEASURES.items() if asked in f"{name} {one.label}".casefold()}
        if not having:
            name = measure_named("the measure", word)
            having = {name: MEASURES[name]}
        own = {name: one for name, one in having.items() if not _TURN.match(name)}
        found |= own or having
    return list(found.values())


def _lines(measures: Sequence[Measure], *, has_turns: bool) -> Iterator[str]:
    width = max(len(known.name) for known in measures)
    for known in measures:
        yield f"{known.name:<{width}}  {known.unit:<10}  {_BETTER[known.better]:<18}  {known.label}"
        yield f"{'':<{width}}  {known.definition}"
    if has_turns:
        names = (name.removeprefix(_FIRST_TURN) for name in MEASURES if name.startswith(_FIRST_TURN))
        yield f"\nof one turn of a conversation, with turn1_ to turn{MAX_TURNS}_ before the name: {', '.join(names)}"
