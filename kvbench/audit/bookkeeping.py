"""A5: the key recomputed from the stored settings, and labels that say what the settings say.

R1: the accepted record is one of the attempts beside it, and the one that counts.

R13: no two cells hold the same answers and likelihoods to the last digit.

Two settings that do the same thing give equal rows too. Cells in which nothing was evicted are left out, and so
are equal policies in equal caches; what remains is worth a second look even if it is honest.

A8: what the numbers were measured on is written down, and agrees with the settings.

What the labels of a record must say, given its settings and the labels of the cells beside it.

No key covers labels, and tables show nothing else. A name that kvbench itself gives means its own class; of other
names only equal settings under different ones can be told.

R2: the status agrees with what the record holds.

R3: no sample is left out silently: expected = scored + left out, in every row of every task.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from kvbench.audit.budgets import ENTRIES, steps_taken
from kvbench.audit.evidence import Cell, Check, Group, Peers, class_of, rule_of, targets
from kvbench.measures import MAX_TURNS
from kvbench.results.files import canonical_json
from kvbench.results.record import MEASURED, cell_key
from kvbench.stats.latency import FEWEST_LAUNCHES, noise_reason


def _seal_problems(cell: Cell, peers: Peers) -> Iterator[str]:
    same = [attempt for attempt in cell.attempts if attempt["attempt"] == cell.body["attempt"]]
    if not same:
        yield "record.json is none of the attempts beside it"
    elif same[0] != cell.body:
        yield f"record.json differs from its attempt {cell.body['attempt'][:8]}"
    elif cell.body["status"] not in MEASURED and any(attempt["status"] in MEASURED for attempt in cell.attempts):
        yield f"a record with status {cell.body['status']} stands where a measured attempt lies beside it"


def _notes(cell: Cell, peers: Peers) -> Iterator[str]:
    good = sum(attempt["status"] in MEASURED for attempt in cell.attempts)
    if good > 1:
        yield f"measured {good} times; the record is one of them"


SEAL_CHECK = Check(
    id="R1",
    title="every file is sealed; the record is the attempt that counts",
    meaning="a file was changed, damaged, put there or taken away after the run",
    applies=lambda cell, peers: True,
    problems=_seal_problems,
    notes=_notes,
)


_COMPARED = ("nll_sum", "kl_sum", "text", "turn1_text", "released_nll_sum")


def _copies_problems(cell: Cell, peers: Peers) -> Iterator[str]:
    twins = [other for other in _by_content(peers)[_content(cell)] if other is not cell]
    if twins:
        yield f"its answers and likelihoods are those of {twins[0].name} to the last digit"


@lru_cache(maxsize=8)
def _by_content(peers: Peers) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in peers.usable:
        if _evicts(cell):
            found.setdefault(_content(cell), []).append(cell)
    return found


def _content(cell: Cell) -> str:
    rows = [{name: row.get(name) for name in ("id", *_COMPARED)} for row in cell.samples]
    return hashlib.sha256(canonical_json(sorted(rows, key=lambda row: str(row["id"]))).encode()).hexdigest()


def _evicts(cell: Cell) -> bool:
    share = cell.value("realised_budget_fraction")
    return bool(cell.setting("budget")) and bool(cell.samples) and (share is None or share < 1)


COPIES_CHECK = Check(
    id="R13",
    title="no cell's samples are another cell's",
    meaning="samples were copied from another policy or budget, or two settings do the same thing",
    applies=lambda cell, peers: cell.usable and _evicts(cell),
    problems=_copies_problems,
)


_NEEDED = ("python", "system", "machine", "device", "cpu_model", "num_threads", "torch", "transformers", "kvbench")
_NEEDED_ON_A_GPU = ("gpu", "gpu_memory_bytes", "cuda")
_MACHINE = ("system", "machine", "cpu_model", "gpu", "num_threads")


def _environment_problems(cell: Cell, peers: Peers) -> Iterator[str]:
    found = cell.body["environment"]
    on_a_gpu = str(cell.setting("device")) == "cuda"
    missing = [name for name in (*_NEEDED, *(_NEEDED_ON_A_GPU if on_a_gpu else ())) if found.get(name) is None]
    if missing:
        yield f"the environment lacks {', '.join(missing)}"
    versions = cell.setting("versions")
    for name, version in versions.items() if isinstance(versions, dict) else ():
        if found.get(name) is not None and found[name] != version:
            yield f"the environment says {name} {found[name]}, the settings {version}"
    device = str(found.get("device") or "").split(":")[0]
    if device and cell.setting("device") not in (None, device):
        yield f"the environment says device {found['device']}, the settings {cell.setting('device')}"


def _environment_notes(cell: Cell, peers: Peers) -> Iterator[str]:
    first = peers.usable[0]
    differs = [n for n in _MACHINE if cell.body["environment"].get(n) != first.body["environment"].get(n)]
    if differs and "tpot_ms" in cell.body["measurements"]:
        yield f"was timed where {', '.join(differs)} differ from those of {first.name}: compare no times between them"
    commit = cell.body["environment"].get("git_commit")
    if isinstance(commit, str) and commit.endswith("-dirty"):
        yield "was measured by code with changes that no commit holds"


ENVIRONMENT_CHECK = Check(
    id="A8",
    title="the environment is complete",
    meaning="nobody can tell what the numbers were measured on, or repeat them",
    applies=lambda cell, peers: cell.usable,
    problems=_environment_problems,
    notes=_environment_notes,
)


_GROUPS: tuple[Group, ...] = ("policy", "dataset")
_RULE = ("evicts_at", "budget_rounds")


def label_problems(cell: Cell, peers: Peers) -> Iterator[str]:
    """Yield a sentence for each label that settings or peers contradict."""
    labels = cell.body["labels"]
    for name, meant in _of_settings(cell).items():
        if labels.get(name) != meant:
            yield f"is labelled {name} {labels.get(name)}, its settings say {meant}"
    for name, meant in rule_of(cell).items():
        if name in labels and labels[name] != meant:
            yield f"is labelled {name} {labels[name]}, but its policy has {meant}"
    yield from _bundled(cell)
    yield from _policy(cell, peers)
    yield from _beside_others(cell, peers)


def _of_settings(cell: Cell) -> Mapping[str, Any]:
    budget = cell.setting("budget") or {}
    limits = {f"budget_{name}": budget.get(name) for name in ("fraction", "tokens")}
    return {"positions": cell.setting("positions"), "budget": _budget(budget), **limits}


def _budget(budget: Mapping[str, Any]) -> str:
    if not budget:
        return "-"
    if budget.get("tokens") is not None:
        return f"{budget['tokens']} tokens"
    return f"{100 * (budget.get('fraction') or 0):g} % of {budget.get('of')}"


def _bundled(cell: Cell) -> Iterator[str]:
    for group in _GROUPS:
        label, target = cell.body["labels"].get(group), class_of(cell.setting(group))
        meant = targets(group).get(str(label))
        if meant is not None and target != meant:
            yield f"is labelled {group} {label}, which is {meant}, but its settings say {target}"


def _policy(cell: Cell, peers: Peers) -> Iterator[str]:
    label, target = cell.body["labels"].get("policy"), class_of(cell.setting("policy"))
    found = Counter(
        class_of(other.setting("policy")) for other in peers.cells if label == other.body["labels"].get("policy")
    )
    if found[target] < max(found.values()):
        yield f"is labelled {label}, its settings say {target}, and most cells of that label another class"


def _beside_others(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare names of model and data set with those of all peers, the time of eviction with those of equal code."""
    for name in ("model", "dataset"):
        yield from _differs(cell, name, peers.cells)
    alike = [other for other in peers.cells if _code(other) == _code(cell) and other.setting("budget")]
    if cell.setting("budget"):
        yield from _differs(cell, "evicts_at", alike)


def _differs(cell: Cell, name: str, others: list[Cell] | tuple[Cell, ...]) -> Iterator[str]:
    told = Counter(str(other.body["labels"][name]) for other in others if name in other.body["labels"])
    label = cell.body["labels"].get(name)
    if name in cell.body["labels"] and str(label) != (usual := told.most_common(1)[0][0]):
        yield f"is labelled {name} {label}, and cells of the same settings {usual}"


def _code(cell: Cell) -> tuple[Any, Any]:
    return class_of(cell.setting("policy")), cell.setting("policy", "source")


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    computed = cell_key(cell.settings, cell.body["schema"])
    if computed != cell.body["key"]:
        yield f"the settings give the key {computed[:8]}, the record says {cell.body['key'][:8]}"
    if cell.folder != cell.body["key"][:16]:
        yield f"lies in the folder {cell.folder}, its key begins with {cell.body['key'][:16]}"
    yield from label_problems(cell, peers)


KEY_CHECK = Check(
    id="A5",
    title="the key follows from the settings, the labels too",
    meaning="settings, key or labels were changed: the numbers belong to another setting than the one shown",
    applies=lambda cell, peers: True,
    problems=_problems,
)


# What each task gives in every cell that did not fail; generation that takes a step gives its entries too.
GIVEN_BY = {
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
_OF_SAMPLES = tuple(name for task, names in GIVEN_BY.items() if task not in _COSTS for name in names)
_WITHOUT_NOISE = (None, "abba_v1", "abba_v2")  # older protocols of speed, and none


def _status_problems(cell: Cell, peers: Peers) -> Iterator[str]:
    status, error, phase = (cell.body[name] for name in ("status", "error", "phase"))
    if not cell.usable:
        if not isinstance(error, dict) or not error.get("type"):
            yield f"status is {status}, and no error says why"
        return
    if error is not None:
        yield f"status is {status}, but the record holds the error {error.get('type')}"
    if phase is not None:
        yield f"status is {status}, but the record says that it ended in {phase}"
    yield from _noise(cell, status)
    for name in _asked_for(cell):
        if name not in cell.body["measurements"] or (name not in _OF_SAMPLES and cell.value(name) is None):
            yield f"status is {status}, but {name} was asked for and is not there"
            return


def _asked_for(cell: Cell) -> Iterator[str]:
    for task, names in GIVEN_BY.items():
        if cell.task(task) is not None:
            yield from names
    if steps_taken(cell):
        yield from ENTRIES
    if (cell.task("Speed") or {}).get("protocol") not in _WITHOUT_NOISE:
        yield "reference_drift_fraction"
        if len(cell.curve("launches_ms", 4)) >= FEWEST_LAUNCHES:
            yield "tpot_spread_fraction"


def _noise(cell: Cell, status: str) -> Iterator[str]:
    """Say where status and noise gate disagree; older records hold nothing of the gate, and none of them is noisy."""
    values = [
        cell.value(name) for name in ("tpot_spread_fraction", "reference_drift_fraction", "foreign_gpu_processes")
    ]
    reason = noise_reason(values[0], values[1], None if values[2] is None else int(values[2]))
    if (status == "noisy") != bool(reason):
        yield f"status is {status}, but {reason or 'the machine was quiet while the cell was timed'}"


STATUS_CHECK = Check(
    id="R2",
    title="the status agrees with the content",
    meaning="a cell that failed is shown as if it had not, or the other way round",
    applies=lambda cell, peers: True,
    problems=_status_problems,
)


_FIELDS = {
    "Perplexity": ("nll_sum", "num_scored_tokens"),
    "PerplexityReleased": ("released_nll_sum", "released_num_scored_tokens"),
    "Generation": ("text", "full_text", "num_new_tokens"),
    "Fidelity": ("kl_sum", "num_agreeing_tokens", "num_compared_tokens"),
    "MultiTurn": (),  # as many as the conversation has turns
}


def _counts_problems(cell: Cell, peers: Peers) -> Iterator[str]:
    twice = [name for name, count in Counter(str(row.get("id")) for row in cell.samples).items() if count > 1]
    if twice:
        yield f"the sample {twice[0]} is there {Counter(str(r.get('id')) for r in cell.samples)[twice[0]]} times"
    scored = len(cell.samples)
    for task, fields in _FIELDS.items():
        if cell.task(task) is None:
            continue
        for row in cell.samples:
            turns = _turn_fields(cell, peers, row) if task == "MultiTurn" else ()
            if lacking := [name for name in (*fields, *turns) if row.get(name) is None]:
                yield f"{row.get('id')} lacks {lacking[0]}, which {task} gives for every sample"
                break
    left_out, most = len(cell.body.get("skipped_items") or ()), _most(peers)
    if scored + left_out < most:
        yield f"{scored} samples scored and {left_out} left out, of {most} that there are"
    counted, items = cell.number("num_skipped_items", "value"), cell.number("num_skipped_items", "n")
    if counted is not None and items is not None and items != counted + scored:
        yield f"{items:g} items in the data set, but {scored} scored and {counted:g} left out"


def _turn_fields(cell: Cell, peers: Peers, row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of every turn that some cell of the same task answered in this conversation, one at least."""
    asked, identity = cell.task("MultiTurn"), str(row.get("id"))
    rows = [other.rows.get(identity, {}) for other in peers.usable if other.task("MultiTurn") == asked]
    said = (turn for turn in range(2, MAX_TURNS + 1) if any(f"turn{turn}_text" in one for one in rows))
    for turn in (1, *said):
        yield from (f"turn{turn}_text", f"turn{turn}_full_text")


def _most(peers: Peers) -> int:
    return max(len(other.samples) + len(other.body.get("skipped_items") or ()) for other in peers.usable)


def _counts_notes(cell: Cell, peers: Peers) -> Iterator[str]:
    asked, scored = cell.setting("dataset", "num_samples"), len(cell.samples)
    left_out = len(cell.body.get("skipped_items") or ())
    if isinstance(asked, int) and scored + left_out == _most(peers) < asked:
        yield f"{scored} samples of {asked} asked for, in every cell: is the data set smaller?"
    if cell.value("num_skipped_items"):
        yield f"{cell.value('num_skipped_items'):g} items were left out"


COUNTS_CHECK = Check(
    id="R3",
    title="every sample asked for is scored or said to be left out",
    meaning="samples, for instance the worst ones, were dropped",
    applies=lambda cell, peers: cell.usable and any(cell.task(task) is not None for task in _FIELDS),
    problems=_counts_problems,
    notes=_counts_notes,
)
