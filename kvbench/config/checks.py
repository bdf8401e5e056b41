"""What shows only when settings are looked at together, beside the machine, or as values: all before a model is loaded.

Combinations of model, data set and positions, the results folder, and secrets where none may be: nothing is written and
no network used. And of single values: does one from a yaml fit an annotation, which value is it then, and what is the
type called in a message. Two spellings of one value, such as 1 and 1.0, or 0.3 and 0.1 + 0.2, are one setting and one
key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.datasets.base import Dataset
from kvbench.datasets.text import Synthetic
from kvbench.errors import ConfigError, close_matches
from kvbench.models.spec import (
    FAMILIES,
    MOVING_ROTATIONS,
    TEXT_FAMILIES,
    ModelSpec,
    check_folder_code,
    check_weight_files,
    image_tokens,
)
from kvbench.results.redaction import is_secret_name, secret_in

if TYPE_CHECKING:  # torch takes seconds, and a wrong word is told before
    from kvbench.cache import Budget, Policy
    from kvbench.tasks.task import Task

_LONGEST_NAME = 200
_COUNT = re.compile(r"-?\d{1,7}(\.\d*)?")


def check_model(spec: ModelSpec, dataset: Dataset, positions: str, engine: str) -> None:
    """Raise ConfigError if the model cannot do what is asked of it, as far as its config.json is on this machine."""
    if spec.folder is not None and spec.revision is not None and not spec.is_random:
        raise ConfigError(
            f"model.revision is {spec.revision!r}, but model.checkpoint {spec.checkpoint} is a folder, which has no "
            "revisions; leave model.revision out"
        )
    config = known_config(spec)
    if config is None:
        return
    if spec.trust_remote_code and spec.folder is not None:
        check_folder_code(spec.folder)
    _check_family(spec, config)
    if spec.folder is not None and not spec.is_random:
        check_weight_files(spec.folder)
    family = config.get("model_type")
    if family in TEXT_FAMILIES and any(example.load_image is not None for example in dataset.examples()):
        raise ConfigError(
            f"the data set shows pictures, but model.checkpoint {spec.checkpoint} is of family {family!r}, which reads "
            "text only; choose a vision model (model=tiny-llava), or dataset=conversation with a file without images"
        )
    _check_rotation(spec, config, positions, engine)


def known_config(spec: ModelSpec) -> dict[str, Any] | None:
    """Return the model's architecture if it is on this machine: in the settings, its folder, or the hub's cache."""
    if spec.is_random or spec.gguf is not None:
        return spec.known_config()
    path: Any = spec.folder / "config.json" if spec.folder is not None else None
    if path is None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(spec.checkpoint, "config.json", revision=spec.revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}; it must be the JSON object of a model's settings")
    return config


def _check_family(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    family = str(config.get("model_type"))
    if family in FAMILIES or spec.trust_remote_code:
        return
    if "auto_map" in config:
        raise ConfigError(
            f"model.checkpoint {spec.checkpoint} (family {family!r}) needs Python code of its own, which is not run "
            "unasked; read that code, then set model.trust_remote_code=true"
        )
    raise ConfigError(f"model.checkpoint {spec.checkpoint} is of family {family!r}; {close_matches(family, FAMILIES)}")


def _check_rotation(spec: ModelSpec, config: Mapping[str, Any], positions: str, engine: str) -> None:
    for rope in _rotations(config):
        kind, on_axes = rope.get("rope_type", rope.get("type")), "mrope_section" in rope
        moves = kind in MOVING_ROTATIONS
        if positions != "original" and (moves or on_axes):
            raise ConfigError(
                f"positions is {positions!r}, but model.checkpoint {spec.checkpoint} has rotary positions of kind "
                f"{'several axes (M-RoPE)' if on_axes else kind}, which have no rank in the cache; use "
                "positions=original"
            )
        if engine == "graph" and moves:
            raise ConfigError(
                f"engine is 'graph' (what auto takes on a GPU), but model.checkpoint {spec.checkpoint} has rotary "
                f"positions of kind {kind}, whose angles follow the length so far; use engine=eager"
            )


def _rotations(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    for part in (config, text or {}):
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(part.get(name), dict):
                yield part[name]


def check_settings(*cells: Mapping[str, Any]) -> None:
    """Raise ConfigError for a results folder or sweep name that cannot be used, or a secret in any cell's settings.

    `cells`: all settings of each cell, resolved; results and sweep are the same in all of them.
    """
    _check_results_folder(cells[0]["results"])
    _check_sweep_name(cells[0]["sweep"])
    seen: set[str] = set()
    for settings in cells:
        _check_no_secret(settings, seen)


def check_installed(error: Exception, target: str, name: str) -> None:
    """Raise ConfigError if `error` says that the class `target` is not there, or what its module raises or lacks."""
    cause = error.__cause__
    if not isinstance(error, ImportError) or cause is None:
        return
    missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
    module, _, kind = target.rpartition(".")
    told = f"{name}._target_ is {target}, but"
    if missing is None:
        raise ConfigError(
            f"{told} importing it raises {type(cause).__name__}: {' '.join(str(cause).split())}"
        ) from error
    if missing == target:
        found = sys.modules[module]
        known = [one for one, value in vars(found).items() if getattr(value, "__module__", None) == module]
        raise ConfigError(f"{told} {module} has no {kind}; {close_matches(kind, known)}") from error
    if f"{target}.".startswith(f"{missing}."):
        where = "" if "." in missing else f" (your own: {missing}.py, beside the folder of --config-dir or here)"
        raise ConfigError(f"{told} no module {missing} is found{where}") from error
    package = missing.partition(".")[0]
    raise ConfigError(
        f"{name} needs the package {package!r}, which is not installed; python -m pip install {package}"
    ) from error


def _check_results_folder(asked: object) -> None:
    if not isinstance(asked, str) or not asked.strip():
        raise ConfigError(f"results is {asked!r}; it must be the path of a folder")
    try:
        folder = Path(asked).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # a name that is too long
        existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
        usable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"results is {asked[:80]!r}, which is no path ({error!s:.80}); give a folder") from error
    if not usable:
        why = "cannot be written to" if existing.is_dir() else "is not a folder"
        raise ConfigError(f"results is {asked!r}, but {existing} {why}; choose a folder that can be written to")


def _check_sweep_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ConfigError(f"sweep is {str(name)[:60]!r}; it must be a name of 1 to {_LONGEST_NAME} printable letters")


def _check_no_secret(settings: Mapping[str, Any], seen: set[str]) -> None:
    """Look at every value that is not among `seen`, and add it: the cells of a sweep differ in few."""
    for key, value in _leaves(settings, ""):
        text = str(value)
        source = secret_in(text) if text not in seen else None
        seen.add(text)
        if source is not None:
            raise ConfigError(
                f"{key} holds the secret of {source}, and settings are stored and sent; leave it out, libraries "
                "find their keys in the environment by themselves"
            )


def check_no_secret_override(overrides: Sequence[str]) -> None:
    """Raise ConfigError for KEY=VALUE where KEY names a secret: others on this machine can read a command line."""
    for word in overrides:
        key, equals, value = word.partition("=")
        key = key.lstrip("+~")
        is_harmless = value in ("", "null") or _COUNT.fullmatch(value)  # task.generation.max_new_token=5
        if equals and not is_harmless and is_secret_name(key):
            raise ConfigError(
                f"{key} is given on the command line, where others can read it; put secrets into the environment "
                "(WANDB_API_KEY, HF_TOKEN), and take this one as known to others"
            )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def check_budget_fits(policy: Policy, budget: Budget) -> None:
    """Raise ConfigError for an absolute budget that cannot hold what the policy protects."""
    need = policy.smallest_budget_tokens
    if policy.bounded and budget.tokens is not None and budget.tokens < need:
        raise ConfigError(
            f"budget.tokens is {budget.tokens}, but {type(policy).__name__} protects {need} tokens (sinks and recent "
            f"window); give at least {need}, or fewer sinks"
        )


def check_skipped(policy: Policy, model: ModelSpec) -> None:
    """Raise ConfigError for layers to skip that the model does not have, where its config.json is on this machine."""
    from kvbench.cache.parts import skipped_layers

    skip_layers, config = getattr(policy, "skip_layers", ()), known_config(model) or {}
    num_layers = (config.get("text_config") or config).get("num_hidden_layers")
    if skip_layers and isinstance(num_layers, int):
        skipped_layers(skip_layers, num_layers)


def check_repeats(policy: Policy, dataset: Dataset) -> None:
    """Raise ConfigError for pictures under a policy that has the prompt repeated, which is done in words."""
    from kvbench.cache import Needs
    from kvbench.cache.policy import needs_of

    if Needs.REPEATED in needs_of(policy) and any(example.load_image is not None for example in dataset.examples()):
        raise ConfigError(
            f"{type(policy).__name__} has the prompt repeated in a second pass, and the data set shows pictures, which "
            "cannot be repeated in words; choose a text data set, or another policy"
        )


def check_text(model: ModelSpec, dataset: Dataset, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError where a task needs text and there is none, or a picture does not fit the prompt."""
    has_text = getattr(dataset, "has_text", True)
    if model.is_random and has_text:
        raise ConfigError(
            "model.weights is 'random', so there is no tokenizer, but the data set has text; use dataset=synthetic "
            "(weights=random chooses it)"
        )
    readers = [name for name, task in tasks.items() if getattr(task, "reads_text", True)]
    if readers and not has_text:
        why = "random weights say nothing" if model.is_random else "prompts of random tokens have no answers"
        raise ConfigError(f"task {', '.join(readers)} scores text, but {why}; use task=speed or task=memory")
    if isinstance(dataset, Synthetic) and (config := model.known_config()) is not None:
        dataset.check_image_tokens(image_tokens(config))


_DECIMALS = 9  # as a budget is rounded: nobody means 0.30000000000000004
_TYPE_NAMES = {type(None): "null", int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value read from yaml may be given where `hint` is annotated."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin is dict:
        return isinstance(value, dict)
    if origin is tuple and options[1:] == (...,):
        return isinstance(value, list | tuple) and all(fits(item, options[0]) for item in value)
    if hint in (int, float, bool, str):
        allowed = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}[hint]
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))
    if hint is type(None):
        return value is None
    return isinstance(value, str) if hint is Path else True


def typed(value: Any, hint: Any) -> Any:
    """Return a value that fits `hint` as that type: a whole number becomes a float where only floats are meant."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, int) and not isinstance(value, bool):
        wanted = options if origin in (typing.Union, types.UnionType) else (hint,)
        return rounded(float(value)) if float in wanted and int not in wanted else value
    # What a container holds stays as it is unless its type is said: it may be a model's own configuration.
    if isinstance(value, dict) and len(options) == 2 and options[1] is not Any:
        return {name: typed(item, options[1]) for name, item in value.items()}
    if isinstance(value, list | tuple) and options and options[1:] in ((), (...,)):
        return type(value)(typed(item, options[0]) for item in value)
    return value


def rounded(value: float) -> float:
    """Return a setting without the noise of arithmetic: rounded to the budget's 9 decimals, never minus zero.

    A number below 0.1 keeps 9 digits that count, as 9 decimals would change it; one that is not finite stays.
    """
    if not math.isfinite(value):
        return value
    small = 0 if value == 0 else max(0, -math.floor(math.log10(abs(value))) - 1)
    return round(value, _DECIMALS + small) + 0.0


def typed_settings(plugin: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a plug-in by name, all of a dataclass and `given` of any other class, as typed values."""
    values, hints = given, hints_of(type(plugin))
    if dataclasses.is_dataclass(plugin) and not isinstance(plugin, type):
        whole = dataclasses.asdict(plugin)
        values = {field.name: whole[field.name] for field in dataclasses.fields(plugin) if field.init}
    return {name: typed(value, hints.get(name, Any)) for name, value in values.items()}


def hints_of(plugin: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the types of the settings of a class by name; a sweep asks for those of a few classes thousandfold."""
    return _hints_of(typing.cast(Any, plugin))


@functools.cache
def _hints_of(plugin: Any) -> dict[str, Any]:
    return typing.get_type_hints(plugin if dataclasses.is_dataclass(plugin) else plugin.__init__)


def truth(value: Any, name: str) -> bool:
    """Return a setting that is true or false. Raises: ConfigError for anything else."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be true or false")
    return value


def type_name(hint: Any) -> str:
    """Return a type as error messages name it."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in options)
    if typing.get_origin(hint) is dict:
        return "a mapping"
    if typing.get_origin(hint) is tuple:
        return f"a list, of each {type_name(options[0])}"
    if options:
        return " or ".join(type_name(option) for option in options)
    return _TYPE_NAMES.get(hint, str(hint))
