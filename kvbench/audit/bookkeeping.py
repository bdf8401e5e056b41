"""A5, A8, R1, R2, R3, R13: whether what stands around the numbers of a record fits them, and the cells beside it.

No key covers labels, and tables show nothing else, so they are compared with the settings.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from kvbench.audit.budgets import ENTRIES, steps_taken
from kvbench.audit.evidence import Cell, Group, Note, Peers, any_cell, check, class_of, rule_of, targets, usual
from kvbench.measures import MAX_TURNS
from kvbench.results.files import canonical_json
from kvbench.results.record import MACHINE, MEASURED, cell_key, is_uncommitted
from kvbench.stats.paired import FEWEST_LAUNCHES, noise_reason

_GROUPS: tuple[Group, ...] = ("policy", "dataset")
_NEEDED = ("python", "system", "machine", "device", "cpu_model", "num_threads", "torch", "transformers", "kvbench")
_NEEDED_ON_A_GPU = ("gpu", "gpu_memory_bytes", "cuda")
# What each task gives in every cell that did not fail; generation that takes a step gives its entries too.
_GIVEN_BY = {
    "Perplexity": ("ppl",),
    "PerplexityReleased": ("ppl_released",),
    "Generation": ("rougeL_vs_full", "length_ratio"),
    "Fidelity": ("kl_to_full", "top1_agreement_fraction"),
    "MultiTurn": ("turn1_rougeL_vs_full", "turn1_length_ratio", "turn1_realised_budget_fraction"),
    "Speed": (
        *("ttft_ms", "tpot_ms", "full_ttft_ms", "full_tpot_ms", "throughput_tokens_per_s"),
        *("ttft_ratio_to_full", "tpot_ratio_to_full", "throughput_ratio_to_full"),
    ),
    "Memory": ("peak_memory_bytes", "kv_stored_bytes"),
    "Capacity": ("capacity_prompts",),
}
_COSTS = ("Speed", "Memory", "Capacity")
# What comes from samples is null where nothing was scored, and its own check looks at it.
_OF_SAMPLES = tuple(name for task, names in _GIVEN_BY.items() if task not in _COSTS for name in names)
_WITHOUT_NOISE = (None, "abba_v1", "abba_v2")  # older protocols of speed, and none
_FIELDS = {
    "Perplexity": ("nll_sum", "num_scored_tokens"),
    "PerplexityReleased": ("released_nll_sum", "released_num_scored_tokens"),
    "Generation": ("text", "full_text", "num_new_tokens"),
    "Fidelity": ("kl_sum", "num_agreeing_tokens", "num_compared_tokens"),
    "MultiTurn": (),  # as many as the conversation has turns
}
_COMPARED = ("nll_sum", "kl_sum", "text", "turn1_text", "released_nll_sum")


@check(
    "A5",
    "the key follows from the settings, the labels too",
    "settings, key or labels were changed: the numbers belong to another setting than the one shown",
    any_cell,
)
def key(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compute the key again, and compare every label with the settings and with the cells beside it."""
    computed, stored = cell_key(cell.body["cell"], cell.body["schema"]), cell.body["key"]
    if computed != stored:
        yield f"the settings give the key {computed[:8]}, the record says {stored[:8]}"
    if cell.folder != stored[:16]:
        yield f"lies in the folder {cell.folder}, its key begins with {stored[:16]}"
    budget = cell.setting("budget") or {}
    meant = {"positions": cell.setting("positions"), "budget": _budget_label(budget)}
    for name, value in (meant | {f"budget_{name}": budget.get(name) for name in ("fraction", "tokens")}).items():
        if cell.label(name) != value:
            yield f"is labelled {name} {cell.label(name)}, its settings say {value}"
    for name, value in rule_of(cell).items():
        if name in cell.body["labels"] and cell.label(name) != value:
            yield f"is labelled {name} {cell.label(name)}, but its policy has {value}"
    yield from _names(cell, peers)


def _budget_label(budget: Mapping[str, Any]) -> str:
    if budget.get("tokens") is not None:
        return f"{budget['tokens']} tokens"
    return f"{100 * (budget.get('fraction') or 0):g} % of {budget.get('of')}" if budget else "-"


def _names(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare names: one that kvbench itself gives means its own class, of others equal settings have equal ones."""
    for group in _GROUPS:
        label, target = cell.label(group), class_of(cell.setting(group))
        meant = targets(group).get(str(label))
        if meant is not None and target != meant:
            yield f"is labelled {group} {label}, which is {meant}, but its settings say {target}"
    label, target = cell.label("policy"), class_of(cell.setting("policy"))
    found = Counter(class_of(other.setting("policy")) for other in peers.cells if label == other.label("policy"))
    if found[target] < max(found.values()):
        yield f"is labelled {label}, its settings say {target}, and most cells of that label another class"
    for name in ("model", "dataset"):
        yield from _differs(cell, name, peers.cells)
    if cell.setting("budget"):
        alike = [other for other in peers.cells if other.setting("budget") and _code(other) == _code(cell)]
        yield from _differs(cell, "evicts_at", alike)


def _differs(cell: Cell, name: str, others: Iterable[Cell]) -> Iterator[str]:
    told = usual(str(other.label(name)) for other in others if name in other.body["labels"])
    if name in cell.body["labels"] and str(cell.label(name)) != told:
        yield f"is labelled {name} {cell.label(name)}, and cells of the same settings {told}"


def _code(cell: Cell) -> tuple[Any, Any]:
    return class_of(cell.setting("policy")), cell.setting("policy", "source")


@check("A8", "the environment is complete", "nobody can tell what the numbers were measured on, or repeat them")
def environment(cell: Cell, peers: Peers) -> Iterator[str]:
    """Look for what is missing, and for what the settings say otherwise."""
    found, asked = cell.body["environment"], cell.setting("device")
    needed = (*_NEEDED, *(_NEEDED_ON_A_GPU if str(asked) == "cuda" else ()))
    if missing := [name for name in needed if found.get(name) is None]:
        yield f"the environment lacks {', '.join(missing)}"
    versions = cell.setting("versions")
    for name, version in versions.items() if isinstance(versions, dict) else ():
        if found.get(name) is not None and found[name] != version:
            yield f"the environment says {name} {found[name]}, the settings {version}"
    device = str(found.get("device") or "").split(":")[0]
    if device and asked not in (None, device):
        yield f"the environment says device {found['device']}, the settings {asked}"
    first = peers.usable[0]
    differs = [name for name in MACHINE if found.get(name) != first.body["environment"].get(name)]
    if differs and "tpot_ms" in cell.body["measurements"]:
        yield Note(
            f"was timed where {', '.join(differs)} differ from those of {first.name}: compare no times between them"
        )
    if is_uncommitted(found):
        yield Note("was measured by code with changes that no commit holds")


@check(
    "R1",
    "every file is sealed; the record is the attempt that counts",
    "a file was changed, damaged, put there or taken away after the run",
    any_cell,
)
def seal(cell: Cell, peers: Peers) -> Iterator[str]:
    """Look for the record among the attempts beside it, and for one that counts in its place."""
    same = [attempt for attempt in cell.attempts if attempt["attempt"] == cell.body["attempt"]]
    good = sum(attempt["status"] in MEASURED for attempt in cell.attempts)
    if not same:
        yield "record.json is none of the attempts beside it"
    elif same[0] != cell.body:
        yield f"record.json differs from its attempt {cell.body['attempt'][:8]}"
    elif not cell.usable and good:
        yield f"a record with status {cell.body['status']} stands where a measured attempt lies beside it"
    if good > 1:
        yield Note(f"measured {good} times; the record is one of them")


@check(
    "R2",
    "the status agrees with the content",
    "a cell that failed is shown as if it had not, or the other way round",
    any_cell,
)
def status(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare the status with error, phase, noise and the measurements asked for."""
    said, error, phase = (cell.body[name] for name in ("status", "error", "phase"))
    if not cell.usable:
        if not isinstance(error, dict) or not error.get("type"):
            yield f"status is {said}, and no error says why"
        return
    if error is not None:
        yield f"status is {said}, but the record holds the error {error.get('type')}"
    if phase is not None:
        yield f"status is {said}, but the record says that it ended in {phase}"
    # Older records hold nothing of the noise gate, and none of them is noisy.
    spread, drift, foreign = (
        cell.value(name) for name in ("tpot_spread_fraction", "reference_drift_fraction", "foreign_gpu_processes")
    )
    reason = noise_reason(spread, drift, None if foreign is None else int(foreign))
    if (said == "noisy") != bool(reason):
        yield f"status is {said}, but {reason or 'the machine was quiet while the cell was timed'}"
    for name in _asked_for(cell):
        if name not in cell.body["measurements"] or (name not in _OF_SAMPLES and cell.value(name) is None):
            yield f"status is {said}, but {name} was asked for and is not there"
            return


def _asked_for(cell: Cell) -> Iterator[str]:
    for task, names in _GIVEN_BY.items():
        if cell.task(task) is not None:
            yield from names
    if steps_taken(cell):
        yield from ENTRIES
    if (cell.task("Speed") or {}).get("protocol") not in _WITHOUT_NOISE:
        yield "reference_drift_fraction"
        if len(cell.curve("launches_ms", 4)) >= FEWEST_LAUNCHES:
            yield "tpot_spread_fraction"


@check(
    "R3",
    "every sample asked for is scored or said to be left out",
    "samples, for instance the worst ones, were dropped",
    lambda cell, peers: cell.usable and any(cell.task(task) is not None for task in _FIELDS),
)
def counts(cell: Cell, peers: Peers) -> Iterator[str]:
    """Count samples, those left out, and the fields of each row of every task."""
    scored, left_out = len(cell.samples), cell.num_left_out
    times = Counter(str(row.get("id")) for row in cell.samples)
    if twice := [name for name, count in times.items() if count > 1]:
        yield f"the sample {twice[0]} is there {times[twice[0]]} times"
    for task, fields in _FIELDS.items():
        for row in cell.samples if cell.task(task) is not None else ():
            turns = _turn_fields(cell, peers, row) if task == "MultiTurn" else ()
            if lacking := [name for name in (*fields, *turns) if row.get(name) is None]:
                yield f"{row.get('id')} lacks {lacking[0]}, which {task} gives for every sample"
                break
    most = max(len(other.samples) + other.num_left_out for other in peers.usable)
    if scored + left_out < most:
        yield f"{scored} samples scored and {left_out} left out, of {most} that there are"
    counted, items = (cell.value("num_skipped_items", part) for part in ("value", "n"))
    if counted is not None and items is not None and items != counted + scored:
        yield f"{items:g} items in the data set, but {scored} scored and {counted:g} left out"
    asked = cell.setting("dataset", "num_samples")
    if isinstance(asked, int) and scored + left_out == most < asked:
        yield Note(f"{scored} samples of {asked} asked for, in every cell: is the data set smaller?")
    if counted:
        yield Note(f"{counted:g} items were left out")


def _turn_fields(cell: Cell, peers: Peers, row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of every turn that some cell of the same task answered in this conversation, one at least."""
    asked, identity = cell.task("MultiTurn"), str(row.get("id"))
    rows = [other.rows.get(identity, {}) for other in peers.usable if other.task("MultiTurn") == asked]
    said = (turn for turn in range(2, MAX_TURNS + 1) if any(f"turn{turn}_text" in one for one in rows))
    for turn in (1, *said):
        yield from (f"turn{turn}_text", f"turn{turn}_full_text")


def _evicts(cell: Cell) -> bool:
    share = cell.value("realised_budget_fraction")
    if share is None:  # a perplexity alone tells no entries, but what may hold all that was seen lets nothing go
        keeps_all = (cell.setting("budget", "of"), cell.setting("budget", "fraction")) == ("seen", 1)
    else:
        keeps_all = share >= 1
    return bool(cell.setting("budget")) and bool(cell.samples) and not keeps_all


@check(
    "R13",
    "no cell's samples are another cell's",
    "samples were copied from another policy or budget, or two settings do the same thing",
    lambda cell, peers: cell.usable and _evicts(cell),
)
def copies(cell: Cell, peers: Peers) -> Iterator[str]:
    """Look for a twin among the cells that evict; two settings that do the same thing are worth a second look too."""
    twins = [other for other in _by_content(peers)[_content(cell)] if other is not cell]
    if twins:
        yield f"its answers and likelihoods are those of {twins[0].name} to the last digit"


@lru_cache(maxsize=8)
def _by_content(peers: Peers) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in filter(_evicts, peers.usable):
        found.setdefault(_content(cell), []).append(cell)
    return found


def _content(cell: Cell) -> str:
    rows = [{name: row.get(name) for name in ("id", *_COMPARED)} for row in cell.samples]
    return hashlib.sha256(canonical_json(sorted(rows, key=lambda row: str(row["id"]))).encode()).hexdigest()
