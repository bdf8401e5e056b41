"""What W&B runs show: of one cell its settings, numbers, curves and samples, of a sweep its tables and figures.

    write_run(cell_run(body), place, "offline")
    write_run(summary_of(Path("results"), "demo", keys), place, "offline")

A cell's run is made from its record alone. The run of a sweep is made from what the report makes of its records:
every number, how cells compare to the full cache, which policy is best, the figures; and it holds the records.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import installed_version
from kvbench.measures import MEASURES, budget_words, measure
from kvbench.results.files import canonical_json, replace_file
from kvbench.results.record import MEASURED, encode_record, read_cell
from kvbench.results.redaction import hide_known, redacted_body
from kvbench.results.store import RecordStore
from kvbench.sinks.wandb.run import RunSpec

if TYPE_CHECKING:
    import wandb

    from kvbench.report.compare import Comparison
    from kvbench.report.load import Group, Results

    _Compared = list[tuple[Group, list[Comparison]]]


_LATENCY_UNITS = ("ms", "tokens/s", "bytes/s", "prompts")
_LATENCY_ENDINGS = ("_ratio_to_full", "roof_share_fraction")
_MEMORY_UNITS = ("bytes", "entries")
_MEMORY_ENDINGS = ("realised_budget_fraction", "peak_over_bound_ratio")
_NAMED = {"model": "models", "dataset": "datasets", "policy": "policies"}
_ENDINGS = {"": "value", "_low": "low", "_high": "high"}
_SHOWN = 3  # one more whenever a run comes to show its record otherwise, so that it is sent again
# Curve of a record: its prefix here, and its columns, of which the first is the horizontal axis.
_CURVES = {
    "entries": ("entries", ("seen_tokens", "mean", "max")),
    "launches_ms": ("launches", ("launch", "ttft_ms", "tpot_ms", "full_ttft_ms", "full_tpot_ms")),
    "capacity_tries": ("capacity", ("try", "of_full_cache", "num_prompts", "fits")),
}
_COUNTED = ("launches_ms", "capacity_tries")  # their axis is their order

_ARTIFACT_TYPE = "kvbench-records"
_MOST_FAILING = 4  # samples of a cell whose answers the summary shows
_MOST_PICTURES = 8  # of samples that fail, of a model and data set
_SUMMARY_SHOWN = 3  # one more whenever a summary comes to show the same records otherwise
_CELL_COLUMNS = ("key", "model", "dataset", "policy", "budget", "positions", "status")
_COMPARED_COLUMNS = (
    *("value", "low", "high", "verdict", "margin", "p_holm", "minimum_detectable", "num_samples", "num_clusters"),
    *("more_samples", "primary", "method", "reason"),
)
# The measures that become keys of the summary; a key per measure and cell of a large sweep would be too many for W&B.
_SUMMARISED = (
    *("ppl", "rougeL_vs_full", "rougeL_vs_reference", "kl_to_full", "objects_recalled_fraction"),
    *("needles_recalled_fraction", "answers_right_fraction", "exact_fraction"),
    *("tpot_ratio_to_full", "ttft_ratio_to_full", "throughput_ratio_to_full"),
)


def measure_group(name: str) -> str:
    """Return the first part of a measurement's key: quality, latency or memory."""
    unit = MEASURES[name].unit if name in MEASURES else ""
    if unit in _LATENCY_UNITS or name.endswith(_LATENCY_ENDINGS):
        return "latency"
    if name == "num_skipped_items":
        return "quality"
    return "memory" if unit in _MEMORY_UNITS or name.endswith(_MEMORY_ENDINGS) else "quality"


def summary_numbers(body: dict[str, Any]) -> dict[str, float]:
    """Return the measurements as flat summary keys: quality/ppl, quality/ppl_low, latency/tpot_ms, ..."""
    return {
        f"{measure_group(name)}/{name}{ending}": entry[part]
        for name, entry in body["measurements"].items()
        for ending, part in _ENDINGS.items()
        if entry.get(part) is not None
    }


def run_config(body: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a cell as nested groups, each with its name: config.policy.name can be grouped by."""
    cell, labels = body["cell"], body["labels"]
    settings = {part: found if isinstance(found := cell.get(part), dict) else {} for part in (*_NAMED, "budget")}
    limits = {part: labels.get(f"budget_{part}") for part in ("fraction", "tokens")}
    nested = {
        **{part: {"name": labels[part], **settings[part]} for part in _NAMED},
        "budget": {**settings["budget"], "name": budget_words(labels["budget"]), **limits},
        "positions": labels.get("positions"),
    }
    return {**cell, **nested, "key": body["key"], "sweep": body["sweep"], "environment": body["environment"]}


def cell_run(body: dict[str, Any], *, group: str = "") -> RunSpec:
    """Return the run of a record's body, in `group` (by default the sweep of the record)."""
    labels = body["labels"]
    return RunSpec(
        id=body["key"][:16],
        digest=cell_digest(body),
        name=f"{labels['policy']}@{budget_words(labels['budget'])}",
        group=group or body["sweep"],
        job_type="cell",
        # Runs are filtered by them; wandb refuses empty tags and tags over 64 letters.
        tags=sorted({str(name)[:64] for name in [*map(labels.get, _NAMED), _storage(body), body["status"]] if name}),
        config=run_config(body),
        fill=lambda run: _fill_cell(run, body),
        exit_code=0 if body["status"] in MEASURED else 1,
    )


def _storage(body: dict[str, Any]) -> str:
    """Return how the cache's entries are stored: by a format of their own, else in the model's type."""
    cell: dict[str, Any] = body["cell"]
    own, model = cell.get("storage"), cell.get("model")
    name = own.get("name") if isinstance(own, dict) else own
    kind = name or (model.get("dtype") if isinstance(model, dict) else None)
    return f"storage {kind}" if kind else ""


def cell_digest(body: dict[str, Any]) -> str:
    """Return the SHA-256 of what the run of `body` is made from."""
    return hashlib.sha256(f"{_SHOWN}\n{canonical_json(body)}".encode()).hexdigest()


def _fill_cell(run: wandb.Run, body: dict[str, Any]) -> None:
    for name, (prefix, (axis, *lines)) in _CURVES.items():
        # Their last values would stand among the measurements.
        run.define_metric(axis, hidden=True, summary="none")
        run.define_metric(f"{prefix}/*", step_metric=axis, summary="none")
        for number, row in enumerate(body["curves"].get(name, []), 1):
            at, *values = [number, *row] if name in _COUNTED else row
            run.log({axis: at, **{f"{prefix}/{line}": value for line, value in zip(lines, values, strict=False)}})
    if samples := body["samples"]:
        columns = list(dict.fromkeys(name for sample in samples for name in sample))
        run.log({"samples": _table(columns, [[sample.get(name) for name in columns] for sample in samples])})
    run.summary.update({"status": body["status"], "duration_s": body["duration_s"], **summary_numbers(body)})


def _table(columns: list[str], rows: list[list[Any]]) -> wandb.Table:
    """Return a W&B table; a column may hold text, numbers and nothing side by side."""
    import wandb

    return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)


def summary_id(sweep: str, keys: Sequence[str]) -> str:
    """Return the id of the summary run of these cells: the same cells under the same name are the same run."""
    return hashlib.sha256("\n".join([sweep, *sorted(keys)]).encode()).hexdigest()[:16]


def summary_digest(cell_digests: Iterable[str], version: str) -> str:
    """Return what changes when the summary of these cells does; `version` is that of the code which makes it."""
    return hashlib.sha256("\n".join([str(_SUMMARY_SHOWN), version, *sorted(cell_digests)]).encode()).hexdigest()


def summary_of(folder: Path, sweep: str, keys: Collection[str], *, to: Path | None = None) -> RunSpec:
    """Return the summary run, without secrets, of the records with a key in `keys` in the results folder `folder`.

    to: the folder of wandb's files, by default the same.
    """
    from kvbench.report.compare import group_comparisons
    from kvbench.report.figures.draw import draw_pngs
    from kvbench.report.load import load_results

    results = load_results(folder, keys=set(keys))
    # Of what was observed once nothing can be said; the table of cells has the numbers.
    compared = [
        (group, [one for one in group_comparisons(group) if one.low is not None or one.verdict == "not comparable"])
        for group in results.groups
    ]
    stored = [read_cell(RecordStore(folder).cell_folder(cell.key)).body for cell in results.records]
    bodies, shown = [redacted_body(body) for body in stored], hide_known(sweep)
    # A table's key has no slash: W&B would give its artifact a new name, and so a new one, at each upload.
    tables = {
        **{"leaderboard": _leaderboard(results), "failing": _failing(results)},
        **{"cells": _cells(results), "verdicts": _verdicts(compared), "best": _best(compared)},
    }
    figures, numbers, pictures = draw_pngs(results), dict(_to_full(compared)), list(_failing_pictures(results))

    def fill(run: wandb.Run) -> None:
        import wandb
        from PIL import Image

        clean = redacted_body({name: rows for name, (_, rows) in tables.items()})
        media: dict[str, Any] = {name: _table(tables[name][0], rows) for name, rows in clean.items() if rows}
        for png in figures:
            media[f"figures/{png.name}"] = wandb.Image(Image.open(io.BytesIO(png.data)), caption=png.caption)
        if pictures:
            captions = redacted_body({"captions": [caption for caption, _ in pictures]})["captions"]
            media["failing_pictures"] = [
                wandb.Image(Image.open(io.BytesIO(data)), caption=caption)
                for caption, (_, data) in zip(captions, pictures, strict=True)
            ]
        run.log(media)
        run.log_artifact(_records(sweep, folder, to or folder, stored, bodies))
        statuses = [body["status"] for body in bodies]
        counts = {f"num_cells/{status}": statuses.count(status) for status in sorted(set(statuses))}
        run.summary.update({**counts, **redacted_body(numbers)})

    names = {many: sorted({str(body["labels"].get(one)) for body in bodies}) for one, many in _NAMED.items()}
    return RunSpec(
        id=summary_id(sweep, [body["key"] for body in bodies]),
        digest=summary_digest(map(cell_digest, bodies), installed_version()),
        name=f"summary of {shown}",
        group=shown,
        job_type="summary",
        tags=["summary"],
        config={"sweep": shown, "num_cells": len(bodies), **names},  # what the cells have in common
        fill=fill,
    )


def _cells(results: Results) -> tuple[list[str], list[list[Any]]]:
    """Return a row per cell: labels, status, and every number with its interval, under the keys of the cells' runs."""
    places = {
        f"{measure_group(name)}/{name}{ending}": (name, part)
        for name in MEASURES
        for ending, part in _ENDINGS.items()
        if any(getattr(cell.estimate(name), part, None) is not None for cell in results.records)
    }
    rows = []
    for group in results.groups:
        for cell in group.cells:
            labels = [cell.key[:16], cell.model, cell.dataset, group.series_label(cell)]
            numbers = [getattr(cell.estimate(name), part, None) for name, part in places.values()]
            rows.append([*labels, cell.budget, cell.positions, cell.status, *numbers])
    return [*_CELL_COLUMNS, *places], rows


def _verdicts(compared: _Compared) -> tuple[list[str], list[list[Any]]]:
    """Return a row per comparison, those with the full cache and those between policies at one budget."""
    rows = [
        [
            *(group.title, measure(one.measure).label, group.series_label(one.first), one.first.budget),
            group.series_label(one.second),
            *(getattr(one, name) for name in _COMPARED_COLUMNS),
        ]
        for group, some in compared
        for one in some
    ]
    return ["group", "measure", "policy", "budget", "against", *_COMPARED_COLUMNS], rows


def _best(compared: _Compared) -> tuple[list[str], list[list[Any]]]:
    """Return a row per budget and measure: the policy of the best value, and whether the next one is worse."""
    from kvbench.report.standing import best_policies

    columns = ["group", "budget", "measure", "policy", "value", "low", "high", "next policy", "verdict against it"]
    rows = []
    for group, some in compared:
        for best in best_policies(group, some):
            labels = (group.title, best.budget, measure(best.measure).label, group.series_label(best.cell))
            found = (best.estimate.value, best.estimate.low, best.estimate.high)
            rows.append([*labels, *found, group.series_label(best.runner_up), best.verdict])
    return columns, rows


def _leaderboard(results: Results) -> tuple[list[str], list[list[Any]]]:
    """Return the places of every group and budget in its leading measure, as the page's first screen has them."""
    from kvbench.report.first_screen import board_measures, leaderboard
    from kvbench.report.standing import judge

    columns = ["group", "budget", "measure", "rank", "policy", "value", "low", "high", "share of full"]
    columns += ["kv_stored_bytes", "tpot_ms", "against the next", "failing samples"]
    rows: list[list[Any]] = []
    for group in results.groups:
        judged = judge(group, leading_alone=True)
        for budget, name in ((budget, name) for budget in group.by_budget for name in board_measures(judged)[:1]):
            for place in leaderboard(judged, budget, name):
                own, stored, step = place.quality, place.stored, place.step
                labels = [group.title, budget, measure(name).label, place.rank, place.policy]
                numbers = [own and own.value, own and own.low, own and own.high, place.share]
                costs = [stored and stored.value, step and step.value]
                rows.append([*labels, *numbers, *costs, place.word, place.num_collapsed])
    return columns, rows


def _failing(results: Results) -> tuple[list[str], list[list[Any]]]:
    """Return the samples that lose most under every cell, with what was asked and answered."""
    from kvbench.autopsy.page import asked_of
    from kvbench.report.compare import leading_quality
    from kvbench.report.standing import losses_of

    columns = ["group", "policy", "budget", "sample", "loss", "question", "full cache", "answer", "reference"]
    rows, asked = [], asked_of(results)
    for group in results.groups:
        name, known = leading_quality(group), asked.get(group.title, {})
        for cell in group.budgeted if name else ():
            samples = {str(one.get("id")): one for one in cell.samples}
            for loss in [one for one in losses_of(group, cell, name or "") if one.collapsed][:_MOST_FAILING]:
                question, *told = map(samples[loss.sample].get, ("question", "full_text", "text", "reference"))
                question = question or known.get(loss.sample, ("", ""))[0] or None
                labels = (group.title, group.series_label(cell), cell.budget)
                rows.append([*labels, loss.sample, loss.loss, question, *told])
    return columns, rows


def _failing_pictures(results: Results) -> Iterator[tuple[str, bytes]]:
    """Yield caption and file of the pictures on which most is lost at the headline's budget, the worst first.

    They are the small ones that an autopsy keeps beside the full cache's record (`autopsy=few`); without it, none.
    """
    from kvbench.autopsy.page import asked_of
    from kvbench.report.compare import declared_budget, leading_quality
    from kvbench.report.standing import losses_of

    asked = asked_of(results)
    for group in results.groups:
        name, known = leading_quality(group), asked.get(group.title, {})
        found: dict[str, list[tuple[float, str]]] = {}
        for cell in group.by_budget.get(declared_budget(group) or "", ()) if name else ():
            for loss in losses_of(group, cell, name or ""):
                if loss.collapsed and known.get(loss.sample, ("", ""))[1]:
                    found.setdefault(loss.sample, []).append((-loss.loss, group.series_label(cell)))
        worst = sorted(found, key=lambda sample: (-len(found[sample]), min(found[sample]), sample))
        for sample in worst[:_MOST_PICTURES]:
            question, source = known[sample]
            who = ", ".join(label for _, label in sorted(found[sample])[:_MOST_FAILING])
            more = f" and {len(found[sample]) - _MOST_FAILING} more" if len(found[sample]) > _MOST_FAILING else ""
            caption = f"{group.title}, {sample}: fails at {declared_budget(group)} under {who}{more}. {question}"
            yield caption.strip(), base64.b64decode(source.partition(",")[2])


def _to_full(compared: _Compared) -> Iterator[tuple[str, float | str]]:
    """Yield flat summary keys: to_full/<policy>@<budget>/quality/ppl, ..._low, ..._high, ..._verdict."""
    for group, some in compared:
        for one in some:
            if not one.second.is_full or one.measure not in _SUMMARISED:
                continue
            cell = f"{group.series_label(one.first)}@{one.first.budget}"
            # W&B reads a dot in a key as a step into a group.
            start = (f"to_full/{group.title}/{cell}" if len(compared) > 1 else f"to_full/{cell}").replace(".", "_")
            for ending, part in (_ENDINGS | {"_verdict": "verdict"}).items():
                if (found := getattr(one, part)) is not None:
                    yield f"{start}/{measure_group(one.measure)}/{one.measure}{ending}", found


def _records(
    sweep: str, folder: Path, to: Path, stored: Sequence[dict[str, Any]], bodies: Sequence[dict[str, Any]]
) -> wandb.Artifact:
    """Return the records as one artifact: the same records have the same digest, and so make no new version."""
    import wandb

    safe = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in sweep)[:64]
    artifact = wandb.Artifact(f"records-{safe}-{hashlib.sha256(sweep.encode()).hexdigest()[:8]}", _ARTIFACT_TYPE)
    for original, body in sorted(zip(stored, bodies, strict=True), key=lambda pair: str(pair[1]["key"])):
        name = f"cells/{body['key'][:16]}/record.json"
        attempt = folder / f"cells/{body['key'][:16]}/attempt-{body['attempt']}.json"
        path = attempt if attempt.is_file() else folder / name
        if body != original:  # a secret in it became known only later
            path = to / "wandb" / "redacted" / f"{body['key'][:16]}.json"
            replace_file(path, encode_record(body))
        # Records never change, so they need no second copy in wandb's own folders.
        artifact.add_file(str(path.resolve()), name=name, policy="immutable", skip_cache=True)
    return artifact
