"""`kvbench why`: one sample of a record answered again with the evidence of its first wrong word kept.

kvbench why 924061a2578e40da scenes-v2/test/3
kvbench why results/published/default-sweep/cells/924061a2578e40da 3 --top 3
kvbench why results/cells/0123456789abcdef/record.json 0 dataset.path=FILE
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.cli import Parser
from kvbench.errors import ConfigError, close_matches, missing_path
from kvbench.measures import FACT_MEASURES, format_value
from kvbench.results.record import MEASURED, RECORD_FILE, read_cell, read_record
from kvbench.results.redaction import printable

if TYPE_CHECKING:
    from kvbench.autopsy.counterfactual import Counterfactual, Evidence, Run
    from kvbench.sweep.cell import Cell

_DESCRIPTION = """\
Answer one sample of a record again and say why its first different word is another one: which patch or word the full
cache attends to most there among what the policy had let go, in which layer and head and when it went, and what the
answer becomes with that entry kept within the same budget (the lowest score goes instead), once there and once in all
layers and heads. Drawn entries kept in the same way stand beside it. Without SAMPLE: the samples that differ.
It refuses, in one line, a record whose answers this machine and code do not give again."""
_EPILOG = """\
example: kvbench why results/published/default-sweep/cells/924061a2578e40da 3
exit codes: 0 explained, or nothing differs; 2 wrong words, or the record is not reproduced. --json counts layers, heads
and tokens from 0, the text from 1."""
_TASK = "generation"
_MOST_LETTERS, _MOST_WIDE = 160, 60
_LIKE_FULL = "rougeL_vs_full"


def why_command(arguments: Sequence[str]) -> int:
    """Explain a sample and return the exit code. Raises: ConfigError, RecordError, MeasureError, each one line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="kvbench why", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=form)
    parser.add_argument("record", metavar="RECORD", help="a cell's folder, its record.json, or the begin of its key")
    parser.add_argument(
        "sample", nargs="?", metavar="SAMPLE", help="a sample's id, the end of it, or its number from 0"
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="what no record holds: dataset.path=FILE")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where a key is looked up (results)")
    parser.add_argument("--top", type=int, default=1, metavar="N", help="so many entries of the evidence (1)")
    parser.add_argument("--controls", type=int, default=3, metavar="N", help="so many drawn entries beside them (3)")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--config-dir", "-cd", type=os.path.abspath, metavar="DIR", help="your own yamls")
    args = parser.parse_intermixed_args(list(arguments))
    words = [word for word in (args.sample, *args.words) if word is not None and "=" in word]
    if strays := [word for word in args.words if "=" not in word]:
        raise ConfigError(f"{strays[0]:.60} cannot be read as KEY=VALUE; kvbench why --help says how")
    for name, least in (("top", 1), ("controls", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be {least} or more")
    body = _record(args.record, args.results)
    _check_answers(body)
    if args.sample is None or "=" in args.sample:
        _show_different(body, as_json=args.json)
        return 0
    row = _row(body, args.sample)
    cell, found = _explained(body, row, words, args)
    if args.json:
        print(json.dumps({"key": body["key"], "cell": cell.name, **asdict(found)}, indent=2))
    else:
        print("\n".join(map(printable, _lines(body, cell, found))))
    return 0


def _record(asked: str, results: Path) -> dict[str, Any]:
    """Return the body that a path or the begin of a key means. Raises: ConfigError, RecordError."""
    path = Path(asked)
    if path.is_file():
        return read_cell(path.parent).body if path.name == RECORD_FILE else read_record(path)
    if (path / RECORD_FILE).is_file():
        return read_cell(path).body
    if (path / "cells").is_dir():
        raise ConfigError(f"{asked} is a results folder; give one of its cells (kvbench results list {asked})")
    if not re.fullmatch(r"[0-9a-f]{1,64}", asked.lower()):
        raise ConfigError(f"RECORD is {asked}, which is no key, and {missing_path(path)}")
    names = sorted(folder.parent.name for folder in (results / "cells").glob(f"*/{RECORD_FILE}"))
    found = [name for name in names if name.startswith(asked.lower()[:16])]
    if len(found) != 1:
        what = (
            f"{len(found)} begin with it; give more digits" if found else f"none has it; {_near(asked, names, results)}"
        )
        raise ConfigError(f"RECORD is the key {asked}, and of the {len(names)} cells in {results} {what}")
    return read_cell(results / "cells" / found[0]).body


def _near(asked: str, names: Sequence[str], results: Path) -> str:
    return close_matches(asked, names) if names else f"give another folder with --results (this is {results})"


def _check_answers(body: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the record holds greedy answers."""
    name, tasks = body["key"][:16], body["cell"].get("task", {})
    if body["status"] not in MEASURED:
        raise ConfigError(f"the cell {name} ended as {body['status']} and holds no answer; choose one that is ok")
    if _TASK not in tasks:
        raise ConfigError(
            f"the cell {name} measured {', '.join(tasks)} and holds no answers; choose one with task=generation"
        )
    if tasks[_TASK].get("temperature") is not None:
        raise ConfigError(
            f"the cell {name} drew its answers (task.generation.temperature={tasks[_TASK]['temperature']}); "
            "kvbench why explains greedy ones"
        )
    if body["labels"]["policy"] == "full":
        raise ConfigError(f"the cell {name} is the full cache's, which lets nothing go; choose a policy's")


def _row(body: Mapping[str, Any], asked: str) -> Mapping[str, Any]:
    """Return the row of the sample that an id, the end of one, or a number means. Raises: ConfigError."""
    rows = [row for row in body["samples"] if "text" in row]
    named = [row for row in rows if row["id"] == asked]
    ending = [row for row in rows if str(row["id"]).endswith(f"/{asked}")]
    if named:
        return dict(named[0])
    if asked.isdecimal():
        if int(asked) < len(rows):
            return dict(rows[int(asked)])
        raise ConfigError(f"SAMPLE is {asked}, and the record has {len(rows)} samples, from 0 to {len(rows) - 1}")
    if len(ending) == 1:
        return dict(ending[0])
    what = f"{len(ending)} ids end with it" if ending else close_matches(asked, [str(row["id"]) for row in rows])
    raise ConfigError(f"SAMPLE is {asked:.80}, which is no id of the record; {what:.300}")


def _explained(
    body: Mapping[str, Any], row: Mapping[str, Any], words: Sequence[str], args: argparse.Namespace
) -> tuple[Cell, Counterfactual]:
    from kvbench.cli.sweep import make_importable, quiet_libraries

    quiet_libraries()
    make_importable([args.config_dir] if args.config_dir else [])
    from kvbench.config.recorded import recorded_cell

    cell = recorded_cell(body, _TASK, words, config_dir=args.config_dir)
    from kvbench.autopsy.counterfactual import Asked, check_pinnable, counterfactual
    from kvbench.models.loader import load_model

    check_pinnable(cell.setting.policy)
    example = next((one for one in cell.dataset.examples() if one.id == row["id"]), None)
    if example is None:
        raise ConfigError(f"the data set has no {row['id']} any more; give the data that was measured")
    asked = Asked(
        loaded=load_model(cell.model, cell.device),
        dataset=cell.dataset,
        example=example,
        setting=cell.setting,
        full_policy=cell.full_policy,
        task=cell.tasks[_TASK],  # type: ignore[arg-type]  # its protocol is the recorded one's
        query_visible=cell.query_visible,
    )
    return cell, counterfactual(
        asked, row, num_evidence=args.top, num_controls=args.controls, where=_measured_on(body["environment"])
    )


def _measured_on(environment: Mapping[str, Any]) -> str:
    device = environment.get("gpu") or environment.get("cpu_model") or environment.get("device")
    return f"by torch {environment.get('torch')} on {device}"


def _show_different(body: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the samples whose answer is not the full cache's."""
    rows = [(number, row) for number, row in enumerate(row for row in body["samples"] if "text" in row)]
    differ = [(number, row) for number, row in rows if row.get("first_divergence_tokens") is not None]
    if as_json:
        names = ("id", "first_divergence_tokens", "text", "full_text", *FACT_MEASURES, _LIKE_FULL)
        print(json.dumps([{"number": n, **{k: row[k] for k in names if k in row}} for n, row in differ], indent=2))
        return
    for number, row in differ:
        scores = ", ".join(f"{name} {format_value(name, row[name])}" for name in _shown(row))
        text = " ".join(row["text"].split())[:_MOST_LETTERS]
        print(printable(f"{number:>4}  {row['id']}  token {row['first_divergence_tokens'] + 1}  {scores}  {text}"))
    print(f"{len(differ)} of {len(rows)} answers differ from the full cache's; kvbench why RECORD SAMPLE explains one")


def _shown(scores: Mapping[str, Any]) -> list[str]:
    return [name for name in (*FACT_MEASURES, _LIKE_FULL) if scores.get(name) is not None]


def _lines(body: Mapping[str, Any], cell: Cell, found: Counterfactual) -> Iterator[str]:
    """Yield what a reader is told."""
    yield f"{cell.name}, {body['labels']['model']}: {found.id}"
    yield f"asked       {_short(found.question)}"
    yield f"full cache  {_short(found.full.text)}"
    yield f"policy      {_short(found.policy.text)}"
    yield f"reference   {_short(found.reference)}"
    if found.at is None:
        same = found.policy.text == found.reference
        yield (
            "The policy's answer is the full cache's, token for token"
            f"{', and the reference' if same else '; what differs from the reference is not the cache'}."
        )
        return
    yield (
        f"The answers part at token {found.at + 1}: the full cache says {_word(found.full)}, the policy "
        f"{_word(found.policy)}."
    )
    if not found.evidence:
        yield "Nothing that the full cache looks at there had gone by then: no kept entry can be the reason."
        return
    yield ""
    yield f"evidence, of {found.num_missing} tokens that some layer or head had let go by then:"
    for number, one in enumerate(found.evidence, start=1):
        yield f"{number:>3}  {one.name}: {_place(one)}"
    yield ""
    yield "with an entry kept, within the same budget:"
    yield from _table([found.full, found.policy, *found.runs, *found.controls], found)
    yield ""
    yield _verdict(found)


def _short(text: str) -> str:
    whole = " ".join(text.split())
    return whole if len(whole) <= _MOST_LETTERS else f"… {whole[-_MOST_LETTERS:]}"


def _cut(kept: str, width: int) -> str:
    """Return what is kept in at most `width` letters, its end, which says where, left as it is."""
    if len(kept) <= width:
        return kept
    what, opens, where = kept.rpartition(" (")
    return f"{what[: width - len(opens + where) - 1]}…{opens}{where}"


def _word(run: Run) -> str:
    if run.token is None:
        return "(elsewhere)"
    return f"\u201c{run.token.strip() or run.token}\u201d" if run.token else "(the end)"


def _place(one: Evidence) -> str:
    how = "with the prompt's cut" if one.left_at == 0 else f"at answer token {one.left_at}"
    rank = f", ranked {one.rank} of {one.num_ranked} where {one.num_kept} stay" if one.rank is not None else ""
    joined = f", merged into {one.joined}" if one.joined is not None else ""
    return (
        f"{one.attention_fraction:.1%} of what the full cache attends to there in layer {one.layer + 1}, head "
        f"{one.head + 1}; it left {how}{rank}{joined}; gone from {one.missing_fraction:.0%} of layers and heads"
    )


def _table(runs: Sequence[Run], found: Counterfactual) -> Iterator[str]:
    said = _word(found.full)
    names = _shown(found.policy.scores)
    width = min(_MOST_WIDE, max(len(run.kept) for run in runs))
    word = max(len("says"), *(len(_word(run)) for run in runs))
    yield f"  {'kept':<{width}}  {'says':<{word}}  p({said})  " + "  ".join(names) + "  answer"
    for run in runs:
        p = "-" if run.probability is None else f"{run.probability:.3f}"
        scores = "  ".join(f"{format_value(one, run.scores[one]):>{len(one)}}" for one in names)
        held = "" if run.is_held else "  (could not be held: sinks and recent tokens take the whole budget)"
        told = f"{_cut(run.kept, width):<{width}}  {_word(run):<{word}}  {p:>{len(said) + 3}}  {scores}"
        yield f"  {told}  {_short(run.text)}{held}"


def _verdict(found: Counterfactual) -> str:
    """Return what the runs say of the evidence, a negative result as plainly as a positive one."""
    back = [run.kept for run in found.runs if run.brings_back]
    drawn = sum(run.brings_back for run in found.controls)
    of = f"; {drawn} of {len(found.controls)} drawn entries, kept everywhere, do so too" if found.controls else ""
    whole = [run.kept for run in found.runs if run.first_divergence_tokens is None]
    if not back:
        held = "" if all(run.is_held for run in found.runs) else ", where it could be held at all"
        return f"Keeping it does not bring the word back{held}{of}."
    rest = f"The whole answer is the full cache's with {'; '.join(whole)}." if whole else (
        "The answer goes on otherwise than the full cache's all the same."
    )  # fmt: skip
    return f"The full cache's word is back with {'; '.join(back)}{of}. {rest}"
