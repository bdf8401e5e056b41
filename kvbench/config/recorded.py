"""From a record back to the cell that it is of: the same settings by value, built anew, and compared with the recorded.

A record names model, data set and policy as the yamls do, and holds every setting that changes the answer, but no path.
What it does not hold is given as on the command line (`dataset.path=FILE`, `model=local model.checkpoint=FOLDER`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from kvbench.config.build import build_cell
from kvbench.config.compose import CONFIG_MODULE, Composed, compose_grid
from kvbench.errors import ConfigError
from kvbench.results.record import BODY_SCHEMA
from kvbench.sweep.cell import Cell

_PARTS = ("allocation", "merge")
_OF_THE_CLASS = ("class", "source", "protocol", "fingerprint", "artefact")
_BY_VALUE = ("positions", "query_visible", "batch_size", "seed")
_COMPARED = ("model", "dataset", "policy", "budget", "positions", "query_visible", "cache_semantics", "beyond_context")
_COSTS_ALONE = ("model.fused", "model.devices")  # which change what a step costs, and no answer
_HUB = re.compile(r"(?P<checkpoint>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")
_MOST_SHOWN, _MOST_LETTERS = 3, 40
_ANY_CHECKPOINT = "local"


def recorded_cell(body: Mapping[str, Any], task: str, words: Sequence[str], *, config_dir: str | None = None) -> Cell:
    """Return the cell of a record, with the task called `task` alone, decoded step by step; `words` are KEY=VALUE.

    The device is the record's if that is a CPU, else a GPU where there is one. Raises: ConfigError, one line, if what
    is built differs from what was recorded in anything that changes an answer.
    """
    if body["schema"] != BODY_SCHEMA:
        raise ConfigError(
            f"the record {body['key'][:16]} has schema {body['schema']}, whose settings name no policy by its source; "
            "measure the cell again"
        )
    recorded, given = body["cell"], {word.split("=", 1)[0].lstrip("+~") for word in words}
    chosen = [word for word in _choices(body, given, config_dir) if word.split("=", 1)[0].lstrip("+") not in given]
    device = "cpu" if recorded["device"] == "cpu" else "auto"
    defaults = [f"task={task}", "engine=eager", *([] if "device" in given else [f"device={device}"])]
    (composed,) = compose_grid([*defaults, *chosen, *words], multirun=False, config_dir=config_dir)
    _set(composed, recorded, task, given)
    cell = build_cell(composed)
    _compare(body, cell, task)
    return cell


def _choices(body: Mapping[str, Any], given: set[str], config_dir: str | None) -> Iterator[str]:
    """Yield the words that choose what the record's labels name. Raises: ConfigError for a name that no yaml has."""
    labels, parts = body["labels"], str(body["labels"]["policy"]).split("+")
    model = re.sub(r" over \d+ GPUs$", "", str(labels["model"]))
    for group, name in (("model", model), ("dataset", str(labels["dataset"])), ("policy", parts[0])):
        if group not in given and not _is_known(group, name, config_dir):
            how = {"model": f"model={_ANY_CHECKPOINT} model.checkpoint=FOLDER"}.get(group, f"{group}=NAME")
            raise ConfigError(
                f"the record's {group} is {name!r}, and no yaml of that name is there; add {how}, or --config-dir DIR "
                f"with DIR/{group}/{name}.yaml"
            )
        yield f"{group}={name}"
    left = [part for part in _PARTS if body["cell"]["policy"].get(part) is not None]
    for name in parts[1:]:
        part = next((part for part in left if _is_known(f"policy/{part}", name, config_dir)), None)
        if part is None:
            raise ConfigError(f"the record's policy has the part {name!r}, and no yaml of that name is there; "
                              "add --config-dir DIR")  # fmt: skip
        left.remove(part)
        yield f"+policy/{part}={name}"


def _is_known(group: str, name: str, config_dir: str | None) -> bool:
    own = Path(config_dir or "") / group / f"{name}.yaml"
    return (files(CONFIG_MODULE) / group / f"{name}.yaml").is_file() or (config_dir is not None and own.is_file())


def _set(composed: Composed, recorded: Mapping[str, Any], task: str, given: set[str]) -> None:
    """Write the recorded settings into the composed ones, but for those that are `given`."""
    config = composed.config
    with open_dict(config):
        for group in ("dataset", "policy", "budget"):
            _take(config[group], recorded[group] or {}, group, given)
        _take(config.task[task], recorded["task"][task], f"task.{task}", given)
        model = {name: recorded["model"].get(name) for name in ("dtype", "prompt")}
        if (hub := _HUB.fullmatch(str(recorded["model"]["fingerprint"]))) is not None:
            model |= hub.groupdict()
        _take(config.model, model, "model", given)
        whole = {name: recorded[name] for name in _BY_VALUE}
        _take(config, whole | {"beyond_context": recorded.get("beyond_context", "refuse")}, "", given)


def _take(node: DictConfig, values: Mapping[str, Any], path: str, given: set[str]) -> None:
    for name, value in values.items():
        place = f"{path}.{name}".lstrip(".")
        if isinstance(value, Mapping) and "class" in value:
            if isinstance(node.get(name), DictConfig):
                _take(node[name], value, place, given)
        elif name not in _OF_THE_CLASS and place not in given:
            node[name] = value


def _compare(body: Mapping[str, Any], cell: Cell, task: str) -> None:
    """Raise ConfigError if the built cell would not answer as the recorded one, naming what differs."""
    recorded = {name: body["cell"].get(name) for name in _COMPARED} | {"task": body["cell"]["task"][task]}
    built = {name: cell.settings.get(name) for name in _COMPARED} | {"task": cell.settings["task"][task]}
    there, here = dict(_leaves(recorded)), dict(_leaves(built))
    differ = [name for name in {**there, **here} if there.get(name) != here.get(name) and name not in _COSTS_ALONE]
    if not differ:
        return
    shown = ", ".join(f"{name} is {_said(there, name)} and here {_said(here, name)}" for name in differ[:_MOST_SHOWN])
    more = f", and {len(differ) - _MOST_SHOWN} more" if len(differ) > _MOST_SHOWN else ""
    commit = body["environment"].get("git_commit")
    remedy = "give what was measured as KEY=VALUE"
    if any(name.endswith((".source", ".protocol")) or name == "cache_semantics" for name in differ):
        remedy = f"the code has changed since: check out {commit or 'what measured it'}, or measure the cell again"
    raise ConfigError(f"the record's {shown}{more}, so another answer would be explained; {remedy}")


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{path}{name}.")
        else:
            yield f"{path}{name}", list(item) if isinstance(item, tuple) else item


def _said(values: Mapping[str, Any], name: str) -> str:
    text = repr(values.get(name)) if name in values else "not set"
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}\u2026"
