"""Seeded mistakes: would the contract alone notice them? Each is planted in the source, and the rules are tried.

    python -m tests.mutants                 all of them; those that were tried on the same sources before are not again
    python -m tests.mutants NAME ...        some

A mistake is a change of a few letters in a file, made while that file is imported in a process of its own; nothing on
the disk is touched. Rules are tried, policy by policy, until one is broken. The first fourteen are mistakes that
harnesses like this one have really had; the others are in what allocations, ragged heads, merges and blocks added.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

REPO = Path(__file__).parents[1]
KEPT = REPO / "runs" / "mutants.json"
TRIED = (
    "middle_first",
    "h2o",
    "elastic",
    "ragged",
    "blocks",
    "divided",
    "pyramidkv",
    "adakv",
    "snapkv",
    "ragged_blocks",
)
SURVIVED = "SURVIVED"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A mistake: in `file` the text `right`, which occurs once, becomes `wrong`."""

    file: str
    right: str
    wrong: str

    def text(self) -> str:
        """Return the file with the mistake. Raises: ValueError where the source is another one by now."""
        source = (REPO / self.file).read_text(encoding="utf-8")
        if source.count(self.right) != 1:
            raise ValueError(f"{self.file} has {source.count(self.right)} times {self.right!r}; plant the mistake anew")
        return source.replace(self.right, self.wrong)


def _in(file: str, right: str, wrong: str) -> Mutant:
    return Mutant(file=f"kvbench/cache/{file}.py", right=right, wrong=wrong)


MUTANTS: dict[str, Mutant] = {
    "an argsort is taken for ranks": _in("selection", "(_inverse(order) < budget", "(order < budget"),
    "one entry too few is kept": _in("selection", "< budget[..., None]) &", "< budget[..., None] - 1) &"),
    "the sinks' offset is missing": _in(
        "selection", "position < first[:, None, None],", "position < first[:, None, None] - 1,"
    ),
    "scores are not moved with their entries": _in(
        "slots",
        '"mass": None if entries.mass is None else entries.mass.gather(2, order)',
        '"mass": None if entries.mass is None else entries.mass.gather(2, order.argsort(dim=-1))',
    ),
    "what is evicted is masked, and stays": _in(
        "layer",
        "self.slots = settle(entries, plan, self._capacity(), memory, faults, in_order=in_order)",
        "self.slots = settle(entries, plan, entries.position.shape[-1] + self.ledger.block_tokens, memory, faults)",
    ),
    "a view keeps the whole storage": _in(
        "slots",
        "entries.values.gather(2, wide), mass",
        "entries.values.gather(2, wide).repeat(1, 1, 2, 1)[:, :, : wide.shape[2]], mass",
    ),
    "the first row decides for the batch": _in(
        "selection", "return (_inverse(order) < budget[..., None])", "return (_inverse(order) < budget[..., None])[:1]"
    ),
    "every layer gets the first one's share": _in(
        "layer", "self._layer_entries(row)[self.setup.layer]", "self._layer_entries(row)[0]"
    ),
    "the state of the last sequence stays": _in(
        "layer",
        "self.slots = self.counts = None\n",
        'self.counts = None\n        self.slots = getattr(self, "slots", None)\n',
    ),
    "a window of none is a window of all": _in(
        "selection", "return sinks, seen - recent", "return sinks, torch.where(recent == 0, 0, seen - recent)"
    ),
    "keys are gathered in another order than their positions": _in(
        "slots",
        "keys, values, mass = moved(entries, plan, order, length)",
        "keys, values, mass = moved(entries, plan, order.sort(-1, descending=True).values, length)",
    ),
    "of equals the older stays": _in(
        "selection",
        "newest_first = position.argsort(dim=-1, descending=True)",
        "newest_first = position.argsort(dim=-1)",
    ),
    "positions drift by one at decode": _in(
        "layer", "slots.write(keys, values, self.counts.seen - 1)", "slots.write(keys, values, self.counts.seen)"
    ),
    "the budget of query heads is given to KV heads": _in(
        "policy",
        "score, entries = ranking(self, view), view.budget\n",
        "score, entries = ranking(self, view), 2 * view.budget\n",
    ),
    "allocation: what rounding leaves is lost": _in(
        "parts", "return whole + ((place < missing) & (rest >= 0)).long()", "return whole"
    ),
    "allocation: a layer's share is forgotten at decode": _in(
        "counts", "return [max(1, uniform + more) for uniform, more in", "return [max(1, uniform) for uniform, more in"
    ),
    "ragged: a head's own share is forgotten at decode": _in(
        "ragged", "return self.length > budget[:, None] + self.spread", "return self.length > budget[:, None]"
    ),
    "ragged: a token goes behind the last one, not into the free slot": _in(
        "ragged", "at = (self.start + self.free).flatten()", "at = (self.start + self.length).flatten()"
    ),
    "merge: the survivor counts twice": _in(
        "slots", "torch.where(joined, total / count", "torch.where(joined, (total + states) / (count + 1)"
    ),
    "rhythm: a block is cut one token late": _in(
        "counts", "return [h - a >= self.block_tokens for", "return [h - a > self.block_tokens for"
    ),
}


def caught_by(mutant: Mutant) -> str:
    """Return which policy breaks which rule with the mistake in this process; `SURVIVED` if none does."""
    _plant(REPO / mutant.file, mutant.text())
    from kvbench.contract.catalogue import policy_named, policy_names
    from kvbench.contract.trial import findings
    from tests.contract import middle_first

    for name in TRIED:
        for finding in findings(policy_named(name) if name in policy_names() else middle_first(name)):
            if finding.outcome == "broken":
                return f"{finding.rule.name} ({name})"
    return SURVIVED


def _plant(file: Path, text: str) -> None:
    """Let the module of `file` be made of `text`."""
    get_code = SourceFileLoader.get_code

    def planted(loader: SourceFileLoader, fullname: str) -> CodeType | None:
        if Path(loader.path).resolve() == file.resolve():
            return compile(text, loader.path, "exec", dont_inherit=True)
        return get_code(loader, fullname)

    SourceFileLoader.get_code = planted  # type: ignore[method-assign]


def in_a_process(mutant: Mutant) -> str:
    """Return what `caught_by` does in a process that has imported libraries only."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        told = SURVIVED
        try:
            told = caught_by(mutant)
        except Exception as error:  # the mistake shows before any rule is tried
            traceback.print_exc()
            told = f"failed to run: {type(error).__name__}"
        os.write(writes, told.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


def source_key(mutant: Mutant) -> str:
    """Return a hash of the mistake and of all that may notice it."""
    found = hashlib.sha256(repr(mutant).encode())
    for folder in ("kvbench/cache", "kvbench/contract", "policies"):
        for path in sorted((REPO / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def main(names: list[str]) -> int:
    """Try the mistakes of these names, all without; return how many survive."""
    import torch
    import transformers  # noqa: F401  so that each process begins with it

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # one rule looks for what is still alive, and need not look through libraries
    kept: dict[str, dict[str, Any]] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for number, name in enumerate(names or MUTANTS, start=1):
        mutant = MUTANTS[name]
        key = source_key(mutant)
        if kept.get(name, {}).get("key") != key:
            start = time.perf_counter()
            told = in_a_process(mutant)
            kept[name] = {"key": key, "caught_by": told, "seconds": round(time.perf_counter() - start, 1)}
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=1))
        print(f"{number:>2} {name}: {kept[name]['caught_by']}", file=sys.stderr, flush=True)
    return print_table({name: kept[name] for name in names or MUTANTS})


def print_table(found: dict[str, dict[str, Any]]) -> int:
    """Print what caught what, and return how many mistakes nothing caught."""
    print("| mistake | in | caught by | s |\n|---|---|---|---|")
    for name, one in found.items():
        print(f"| {name} | `{MUTANTS[name].file}` | {one['caught_by']} | {one['seconds']:.0f} |")
    missed = [name for name, one in found.items() if one["caught_by"] == SURVIVED or "failed" in one["caught_by"]]
    total = sum(one["seconds"] for one in found.values())
    print(f"\n{len(found) - len(missed)} of {len(found)} caught by the contract alone, in {total:.0f} s")
    return len(missed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    sys.exit(min(1, main(parser.parse_args().names)))
