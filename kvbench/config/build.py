"""From a composed configuration to a typed cell: types and ranges are checked, and what makes a cell's key is told.

What code a plug-in is, is a part of the key: a record never outlives the code that made it. A plug-in is named by its
class, never by where that lies, so a module may be moved. Code counts as it decides: comments, docstrings, layout and
the order of imports do not. What kvbench itself does around a policy is covered by `CACHE_SEMANTICS` and by a task's
`protocol`, what a data set holds by its fingerprint. `build_objective` is what a job returns to a sweeper.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import json
import math
import sys
import tokenize
import typing
from collections.abc import Callable, Hashable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from kvbench import installed_version
from kvbench.autopsy import AutopsySettings
from kvbench.cache import CACHE_SEMANTICS, Budget, Calibrated, Needs, Policy, ScorePolicy, When
from kvbench.cache.policy import check_parts, is_divided, is_unset_part, needs_of
from kvbench.cache.positions import POSITION_MODES, PositionMode
from kvbench.cache.released import departures_of
from kvbench.config.checks import (
    check_budget_fits,
    check_installed,
    check_model,
    check_repeats,
    check_settings,
    check_skipped,
    check_text,
    fits,
    hints_of,
    known_config,
    truth,
    type_name,
    typed,
    typed_settings,
)
from kvbench.config.compose import LEFT_OUT, Composed
from kvbench.errors import ConfigError, KvbenchError, check_known, close_matches
from kvbench.measures import FACT_MEASURES, MEASURES, measure_named
from kvbench.models.calibration import artefact_path, stored_artefact
from kvbench.models.spec import ModelSpec, takes_images
from kvbench.sinks import SinkGroup
from kvbench.sweep.cell import (
    BEYOND_CONTEXT,
    BeyondContext,
    Cell,
    check_fit,
    check_foresight,
    check_spans,
    check_windows,
    resolve_devices,
    resolve_engine,
)
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.task import is_timed

_OWN = "kvbench"
_POLICIES = "kvbench.policies"  # of kvbench's own modules only these are hashed
_DIGITS = 16
_MISSING = "???"
_known: WeakKeyDictionary[type[object], str] = WeakKeyDictionary()  # a sweep asks once per cell


def class_name(kind: type[object]) -> str:
    """Return the name by which a class is registered: "kvbench:H2O", or "H2O" for somebody else's.

    No Python name holds a colon, so nobody else's class is taken for kvbench's.
    """
    return f"{_OWN}:{kind.__qualname__}" if is_kvbench(kind.__module__) else kind.__qualname__


def is_kvbench(module: str) -> bool:
    """Whether the module of that name is kvbench's own."""
    return module.partition(".")[0] == _OWN


def source_of(kind: type[object]) -> str:
    """Return the hash of the code that makes a class: its module, those of its bases, and what they import.

    Followed are the user's own modules, wherever they lie, and kvbench's policies; not other packages, nor a name that
    is made up while the code runs, nor a file that the code reads. Where a module lies and what it is called does not
    count. Raises: ConfigError if there is no source to be read.
    """
    if kind not in _known:
        _known[kind] = _source(kind)
    return _known[kind]


def _source(kind: type[object]) -> str:
    found = _Modules(kind.__module__.partition(".")[0])
    names = dict.fromkeys(base.__module__ for base in kind.__mro__)
    is_own = not is_kvbench(kind.__module__)  # then it counts even where it cannot be found, which is refused
    digests = [found.digest(name) for name in names if found.counts(name) or (is_own and name == kind.__module__)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:_DIGITS]


class _Modules:
    """Digests of modules by name, each with those that it imports."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._digests: dict[str, str] = {}

    def counts(self, name: str) -> bool:
        """Whether the module is hashed: the user's own, or one of kvbench's policies."""
        top, file = name.partition(".")[0], _file_of(name)
        if file is None or top in sys.stdlib_module_names or top == "__main__":
            return False
        if top == _OWN:
            return f"{name}.".startswith(f"{_POLICIES}.")
        above = (file.parent if file.name == "__init__.py" else file).parents
        root = above[min(name.count("."), len(above) - 1)]  # the folder on the path that the module was found by
        return top == self._package or not _holds_installed(root)

    def digest(self, name: str) -> str:
        """Return the digest of a module that counts. Raises: ConfigError if it cannot be read."""
        if name not in self._digests:
            self._digests[name] = "@"  # stands for it in modules that import each other
            self._digests[name] = hashlib.sha256(self._content(name)).hexdigest()
        return self._digests[name]

    def _content(self, name: str) -> bytes:
        file = _file_of(name)
        try:
            if file is None or not file.is_file():
                raise ConfigError(
                    f"the module {name!r} has no source file; its source is part of a cell's key, so put the class "
                    "in a .py file"
                )
            if file.suffix != ".py":
                return file.read_bytes()  # a compiled module
            with tokenize.open(file) as text:
                tree = ast.parse(text.read())
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(
                f"the source of module {name!r}, a part of a cell's key, cannot be read: {error}"
            ) from error
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        return json.dumps(self._body(tree.body, package)).encode()

    def _body(self, statements: list[Any], package: str) -> list[Any]:
        """Return statements as data, without docstrings and `pass`, imports that stand together in one order."""
        shapes: list[Any] = []
        imports: list[Any] = []
        for node in statements:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.extend(_imported(node, package))
                continue
            if isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and _is_text(node.value)):
                continue
            shapes += [*map(self._resolved, sorted(imports)), self._shape(node, package)]
            imports = []
        return [*shapes, *map(self._resolved, sorted(imports))]

    def _shape(self, node: Any, package: str) -> Any:
        if isinstance(node, list):
            is_body = bool(node) and isinstance(node[0], ast.stmt)
            return self._body(node, package) if is_body else [self._shape(item, package) for item in node]
        if not isinstance(node, ast.AST):
            return f"{type(node).__name__} {node!r}"
        # By name and without what is empty, so that newer versions of Python, which add fields, give the same.
        fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
        shown = {name: value for name, value in fields.items() if name not in ("ctx", "kind", "type_comment")}
        shape = [type(node).__name__, {name: self._shape(value, package) for name, value in sorted(shown.items())}]
        called = _called_module(node)
        return [*shape, self.digest(called)] if called is not None and self.counts(called) else shape

    def _resolved(self, imported: tuple[str, str, str]) -> list[str]:
        """Return (bound name, module, what of it) with the module's content in the place of a name that may move."""
        bound, module, what = imported
        within = f"{module}.{what}" if what else module
        for name, rest in ((within, ""), (module, what)):
            if self.counts(name):
                return ["import", bound, self.digest(name), rest]
        return ["import", bound, _OWN if is_kvbench(module) else module, what]


def _imported(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(node, ast.Import):
        yield from ((alias.asname or alias.name, alias.name, "") for alias in node.names)
        return
    module = node.module or ""
    if node.level:
        parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
        module = ".".join(part for part in (parent, module) if part)
    yield from ((alias.asname or alias.name, module, alias.name) for alias in node.names)


def _called_module(node: Any) -> str | None:
    """Return the module that `import_module("name")` or `__import__("name")` imports; None for anything else."""
    if not isinstance(node, ast.Call):
        return None
    name = getattr(node.func, "attr", getattr(node.func, "id", None))
    given = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "name")]
    if name not in ("import_module", "__import__") or not given or not _is_text(given[0]):
        return None
    return str(typing.cast(ast.Constant, given[0]).value)


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _file_of(name: str) -> Path | None:
    """Return the file of a module, which is not imported for that; None if there is none or it cannot be told."""
    module = sys.modules.get(name)
    if module is not None:
        origin = getattr(module, "__file__", None)
    else:
        spec = _spec_of(name)
        origin = spec.origin if spec is not None and spec.has_location else None
    return None if origin is None else Path(origin).resolve()


def _spec_of(name: str) -> ModuleSpec | None:
    parent, _, _ = name.rpartition(".")
    try:
        if not parent:
            return importlib.util.find_spec(name)
        known = sys.modules.get(parent)
        above = _spec_of(parent) if known is None else None
        path = getattr(known, "__path__", None) if known is not None else above and above.submodule_search_locations
        return PathFinder.find_spec(name, list(path)) if path else None
    except (ImportError, AttributeError, ValueError):
        return None


@cache
def _holds_installed(folder: Path) -> bool:
    """Whether packages are installed into the folder, so that what lies there is somebody else's code."""
    return folder.name in ("site-packages", "dist-packages") or any(folder.glob("*.dist-info"))


_ANY_CHECKPOINT = "local"  # the configuration that says nothing of its model
_PARTS = ("allocation", "merge")  # groups of configurations within the policy's
_FULL = {"_target_": "kvbench.policies.full.Full"}
_PATH_SETTINGS = ("path", "images", "answers", "ids", "templates", "filler")  # where a file lies changes nothing
_OF_THE_CLASS = {"class", "source", "protocol", "fingerprint"}
_NUMERIC_PACKAGES = ("torch", "transformers")
_EVICTS_AT = {When.BOTH: "prompt and decode", When.PREFILL: "prompt", When.DECODE: "decode"}
_AUTO = "auto"
_SHARED = ("results", "sweep", "force", "sink", "worker", "autopsy", "objective")
# What kvbench's own tasks measure, as patterns of names, each task's own measure first; FACTS are the names for what a
# data set knows to be true. Anybody else's class may have `measures` of the kind.
_MEASURED = {
    "kvbench:Perplexity": ("ppl",),
    "kvbench:PerplexityReleased": ("ppl_released",),
    "kvbench:Fidelity": ("kl_to_full", "top1_agreement_fraction"),
    "kvbench:Generation": ("FACTS", "rougeL_vs_full", "rouge?_vs_*", "realised_budget_fraction", "entries_*"),
    "kvbench:MultiTurn": ("turn1_FACTS", "turn[1-{task.max_turns}]_rouge?_vs_*", "turn[1-{task.max_turns}]_exact*"),
    "kvbench:Speed": ("ttft_ms", "tpot_*ms", "throughput_*", "t*_ratio_to_full", *("policy_ms", "settle_ms", "roof_*")),
    "kvbench:Memory": ("kv_*", "peak_*", "statistics_bytes", "bookkeeping_bytes"),
    "kvbench:Capacity": ("capacity_*",),
}


class Shared:
    """What the cells of one sweep have in common, made once: a data set is read and fingerprinted for all of them.

    It lives as long as the sweep is being built, so that no file can change behind what is kept.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def once(self, what: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` gave when it was first asked for; what it raises is not kept."""
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]

    def build(self, node: Any, name: str, **demands: Any) -> Any:
        """Return what `build` makes of `node`, the same object for equal settings."""
        try:
            settings = repr(OmegaConf.to_container(node, resolve=True))
        except (OmegaConfBaseException, ValueError):  # `build` says what is wrong with it
            return build(node, name, **demands)
        return self.once((name, settings), lambda: build(node, name, **demands))


def build_cells(grid: Sequence[Composed]) -> list[Cell]:
    """Return the cells of one sweep. Raises: as `build_cell`."""
    shared = Shared()
    return [build_cell(composed, shared) for composed in grid]


def build_cell(composed: Composed, shared: Shared | None = None) -> Cell:
    """Return the cell. Raises: ConfigError or DataError in one line, before any model is loaded.

    shared: what other cells of the same sweep have made already.
    """
    config, shared = composed.config, shared or Shared()
    policy: Policy = build(config.policy, "policy", is_a=Policy)
    budget: Budget = build(config.budget, "budget", is_a=Budget)
    asked: ModelSpec = shared.build(config.model, "model", is_a=ModelSpec)
    model, device = shared.once(
        ("devices", id(asked), config.device), lambda: resolve_devices(asked, str(config.device))
    )
    learnt: dict[str, str] = {}
    if isinstance(policy, Calibrated):
        policy, learnt["artefact"] = with_artefact(policy, model, composed)
    dataset = shared.build(config.dataset, "dataset", has=("facts_in",))
    tasks = {str(name): build(node, f"task.{name}", has=("run", "protocol")) for name, node in config.task.items()}
    if not tasks:
        raise ConfigError("no task is left, so nothing would be measured; choose task=all or another one")
    query_visible = truth(config.query_visible, "query_visible")
    beyond_context = _beyond_context(config)
    batch_size, seed = _batch_size(config), _whole(config, "seed", at_least=None)
    engine = resolve_engine(str(config.engine), device, is_spread=model.devices is not None)
    setting = CacheSetting(policy=policy, budget=budget, positions=_positions(config, policy), engine=engine)
    check_parts(policy, setting.positions)
    check_foresight(policy, tasks)
    check_budget_fits(policy, budget)

    def check_combination() -> bool:
        if config.get("laws") is not None and takes_images(model):
            raise ConfigError(
                f"laws are of text models, but model.checkpoint {model.checkpoint} reads pictures; choose a model that "
                "reads text only, such as model=smollm2-135m"
            )
        check_text(model, dataset, tasks)
        check_model(model, dataset, setting.positions, setting.engine)
        check_fit(dataset, model, tasks, query_visible=query_visible)
        if beyond_context == "refuse":
            check_windows(known_config(model), dataset.examples(), tasks)
        return True

    check_repeats(policy, dataset)
    check_skipped(policy, model)
    combination = (id(model), id(dataset), repr(tasks), setting.positions, engine, query_visible, beyond_context)
    shared.once(combination, check_combination)
    if needs_of(policy) & (Needs.PICTURE | Needs.QUESTION):
        check_spans(policy, dataset, model, query_visible=query_visible)
    fingerprint = shared.once(id(dataset), lambda: dataset.fingerprint)
    settings = {
        "model": _model_key(model),
        "dataset": {**plugin_key(dataset, config.dataset, without=_PATH_SETTINGS), "fingerprint": fingerprint},
        "policy": {**plugin_key(policy, config.policy), "source": source_of(type(policy)), **learnt},
        "budget": plugin_key(budget, config.budget) if policy.bounded else None,
        "positions": setting.positions,
        "query_visible": query_visible,
        "engine": setting.engine,
        "task": {name: plugin_key(task, config.task[name]) for name, task in tasks.items()},
        "cache_semantics": CACHE_SEMANTICS,
        "batch_size": batch_size or _AUTO,
        "seed": seed,
        "device": device.split(":")[0],
        "versions": dict(_versions()),
        **({"later_prompts": _LATER_PROMPTS} if _divides_later(policy, tasks, query_visible=query_visible) else {}),
        # Only where it is not refused, which gives numbers that a run which refuses must not take.
        **({} if beyond_context == "refuse" else {"beyond_context": beyond_context}),
    }
    return Cell(
        settings=settings,
        labels=_labels(composed, model, dataset, setting),
        model=model,
        dataset=dataset,
        setting=setting,
        full_policy=shared.once("full", lambda: instantiate(_FULL)),
        tasks=tasks,
        batch_size=batch_size,
        seed=seed,
        device=device,
        query_visible=query_visible,
        beyond_context=beyond_context,
        autopsy=build(config.autopsy, "autopsy", is_a=AutopsySettings),
        shard=config.get("shard"),
    )


# How a budget that layers divide is divided again when more of a prompt comes; 1, which no key names: a layer could be
# given more than it still held, and what it lacked was nobody's.
_LATER_PROMPTS = 2


def _divides_later(policy: Policy, tasks: dict[str, Any], *, query_visible: bool) -> bool:
    """Return whether a later prompt, a hidden question or the next turn, meets a budget that layers divide."""
    asks_again = not query_visible or any(getattr(task, "max_turns", 1) > 1 for task in tasks.values())
    return asks_again and is_divided(policy)


def with_artefact(policy: Calibrated, model: ModelSpec, composed: Composed) -> tuple[Calibrated, str]:
    """Return `policy` with the file that it reads for `model`, and the SHA-256 of that.

    Raises: ConfigError, one line, for a file that is missing, torn, of another model or of another policy.
    """
    maker = {"policy": class_name(type(policy)), "source": source_of(type(policy))}
    path = artefact_path(policy, model, maker) if policy.artefact is None else Path(policy.artefact).expanduser()
    names = {group: composed.choices.get(group) or "NAME" for group in ("policy", "model")}
    command = f"kvbench calibrate {names['policy']} model={names['model']} dataset=NAME"
    stored = stored_artefact(path, model, maker, command)
    return dataclasses.replace(policy, artefact=str(path.absolute())), stored.sha256


def build_objective(
    config: DictConfig, cell: Cell, shared: Shared | None = None, *, is_needed: bool
) -> tuple[str, ...]:
    """Return the measures whose values a job returns; none if nobody needs one and what is measured is not known.

    shared: what other cells of the same sweep have made already, as for `build_cell`.

    Raises: ConfigError for a name that is no measure, that has no better direction, or that no task measures.
    """
    asked = OmegaConf.to_container(config.objective) if OmegaConf.is_list(config.objective) else config.objective
    shared = shared or Shared()
    given = {
        name: shared.once(
            ("measures", type(task), repr(task), id(cell.dataset)), partial(_measured_by, task, cell.dataset, shared)
        )
        for name, task in cell.tasks.items()
    }
    if asked is None:
        first = next(iter(given))
        if given[first] or not is_needed:
            return (given[first] or ())[:1]
        raise ConfigError(f"task.{first} does not declare its `measures`, so the search needs objective=NAME")
    names = asked if isinstance(asked, list) else [asked]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"objective is {asked!r:.80}; it must be the name of a measure, or a list of names")
    known = [name for found in given.values() for name in found or ()]
    names = [measure_named("objective", name) for name in names]
    for name in names:
        if MEASURES[name].better == "none":
            raise ConfigError(f"objective is {name!r}, of which neither less nor more is better; choose another one")
        if name not in known and None not in given.values():
            raise ConfigError(f"objective is {name!r}, which task {', '.join(given)} does not measure here; these are "
                              f"measured: {', '.join(known)}")  # fmt: skip
    return tuple(names)


def _measured_by(task: Any, dataset: Any, shared: Shared | None = None) -> tuple[str, ...] | None:
    """Return what a task measures of which one direction is better, its own measure first; None if it does not say."""
    patterns = _MEASURED.get(class_name(type(task)), getattr(type(task), "measures", None))
    if patterns is None:
        return None
    nouns = (shared or Shared()).once(("facts", id(dataset)), lambda: _fact_nouns(dataset))
    released = ("rougeL_released_vs_full",) if getattr(task, "released_rouge", False) else ()
    patterns = [pattern.format(task=task) for pattern in (*patterns, *released)]
    wanted = [pattern.replace("FACTS", f"{noun}_*") for pattern in patterns for noun in (nouns or ("",))]
    found = (name for pattern in wanted for name in MEASURES if fnmatchcase(name, pattern))
    return tuple(name for name in dict.fromkeys(found) if MEASURES[name].better != "none")


def _fact_nouns(dataset: Any) -> tuple[str, ...]:
    """Return what the measures of what is known to be true begin with, in their order."""
    examples = dataset.examples()
    known: set[str] = {example.fact_noun for example in examples if example.facts is not None}
    known |= {"answers" for example in examples if example.one_answer}
    return tuple(noun for noun in (name.partition("_")[0] for name in FACT_MEASURES) if noun in known)


def build_sinks(config: DictConfig) -> SinkGroup:
    """Return the sinks of the configuration. Raises: ConfigError."""
    return SinkGroup([build(node, f"sink.{name}", has=("record",)) for name, node in config.sink.items()])


def check_shared(grid: Sequence[Composed]) -> None:
    """Raise ConfigError if a value is missing, or the cells differ in what holds for all, or it cannot be used.

    `grid` may be empty: that of the cells that must not be left out is, where full is not among the policies.
    """
    if not grid:
        return
    resolved = [composed.resolved() for composed in grid]
    for composed, settings in zip(grid, resolved, strict=True):
        for name in (*_SHARED, "policy", "budget", "model", "dataset", "task"):
            if name not in settings:
                raise ConfigError(f"{name} was taken out of the settings, but nothing runs without it; leave it in")
        for name in sorted(OmegaConf.missing_keys(composed.config)) if _MISSING in repr(settings) else ():
            raise ConfigError(f"{name} is not given and has no default; add {name}=...")
    for name in _SHARED:
        values = {str(settings[name]) for settings in resolved}
        if len(values) > 1:
            raise ConfigError(f"{name} has {len(values)} values in one sweep; it holds for all cells, give one")
    check_settings(*resolved)


def check_refused(grid: Sequence[Composed]) -> None:
    """Raise ConfigError where it is not said, or in an unknown word, what becomes of a cell that cannot run."""
    for word in {str(composed.config.get("refused")) for composed in grid}:
        check_known("refused", word, ("fail", LEFT_OUT))


def check_nothing_timed(launcher: str, grid: Sequence[Composed]) -> None:
    """Raise ConfigError where `launcher` would let cells be timed beside each other, of which no process could know."""
    tasks = {name: node for composed in grid for name, node in (composed.config.get("task") or {}).items()}
    timed = [str(name) for name, node in tasks.items() if is_timed(build(node, f"task.{name}"))]
    if timed:
        raise ConfigError(
            f"hydra/launcher is {launcher!r}, which runs cells beside each other on this machine, where task "
            f"{', '.join(timed)} would measure all of them at once; choose task=quality, or leave the launcher out, "
            "which times one cell after the other"
        )


def results_folder(config: DictConfig) -> Path:
    """Return the folder of everything that is written."""
    return Path(str(config.results)).expanduser()


def is_forced(config: DictConfig) -> bool:
    """Return whether accepted records are measured again. Raises: ConfigError."""
    return truth(config.force, "force")


def build(node: DictConfig | None, name: str, *, is_a: type[Any] = object, has: tuple[str, ...] = ()) -> Any:
    """Make one plug-in, a class that derives from `is_a` and has every name in `has`.

    Class, keys and types are checked before anything of it runs. Raises: ConfigError, one line.
    """
    if node is None:
        raise ConfigError(f"{name} is null; give its settings, or leave it out with ~{name}")
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{name} is {node!r:.60}; it must be a group of settings with a _target_")
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is not given and has no default; add {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict) or "_target_" not in plain:
        raise ConfigError(f"{name} has no _target_; it must name a class, such as kvbench.policies.h2o.H2O")
    arguments = {str(key): value for key, value in plain.items() if key != "_target_"}
    if not isinstance(plain["_target_"], str) or not all(map(str.isidentifier, plain["_target_"].split("."))):
        raise ConfigError(f"{name}._target_ is {plain['_target_']!r:.80}; it must name a class, as mine.Mine")
    try:
        plugin: type[Any] = get_class(plain["_target_"])
        if not issubclass(plugin, is_a) or not all(hasattr(plugin, attribute) for attribute in has):
            want = f"derive from {is_a.__name__}" if is_a is not object else f"have {' and '.join(has)}"
            raise ConfigError(f"{name}._target_ is {plain['_target_']}; the class must {want}")
        return plugin(**_checked(plugin, arguments, name))
    except KvbenchError:
        raise
    except Exception as error:
        check_installed(error, str(plain["_target_"]), name)
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{name}._target_ is {plain['_target_']}, which cannot be made: {told}") from error


def _checked(plugin: type[Any], arguments: dict[str, Any], name: str) -> dict[str, Any]:
    hints = hints_of(plugin)
    if not dataclasses.is_dataclass(plugin):
        return {key: typed(value, hints.get(key, Any)) for key, value in arguments.items()}
    known = {field.name for field in dataclasses.fields(plugin) if field.init}
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(f"{name}.{key} is no setting of {plugin.__name__}; {close_matches(key, known)}")
        if not fits(value, hints[key]):
            finite = " and finite" if isinstance(value, float) and not math.isfinite(value) else ""
            raise ConfigError(f"{name}.{key} is {value!r:.80}; it must be {type_name(hints[key])}{finite}")
    return {key: _built_part(typed(value, hints[key]), hints[key], f"{name}.{key}") for key, value in arguments.items()}


def _built_part(value: Any, hint: Any, name: str) -> Any:
    """Return a setting that is itself a class with settings, made as `build` makes one; any other as it is."""
    if not (isinstance(value, dict) and "_target_" in value):
        return value
    kinds = [kind for kind in (*typing.get_args(hint), hint) if dataclasses.is_dataclass(kind)]
    return build(OmegaConf.create(value), name, is_a=typing.cast(Any, kinds[0])) if kinds else value


def _batch_size(config: DictConfig) -> int | None:
    """Return the prompts decoded together, None where they are chosen when the model is loaded."""
    if config.batch_size == _AUTO:
        return None
    return _whole(config, "batch_size", at_least=1, or_else=f", or {_AUTO}")


def _whole(config: DictConfig, name: str, *, at_least: int | None, or_else: str = "") -> int:
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or (at_least is not None and value < at_least):
        floor = "" if at_least is None else f" of at least {at_least}"
        raise ConfigError(f"{name} is {value!r}; it must be a whole number{floor}{or_else}")
    if not -(2**63) <= value < 2**63:
        raise ConfigError(f"{name} is {value}; it must fit into 64 bits")
    return value


def _beyond_context(config: DictConfig) -> BeyondContext:
    asked = config.beyond_context
    if asked not in BEYOND_CONTEXT:
        raise ConfigError(f"beyond_context is {asked!r:.60}; {close_matches(str(asked), BEYOND_CONTEXT)}")
    return typing.cast(BeyondContext, asked)


def _positions(config: DictConfig, policy: Policy) -> PositionMode:
    asked = str(config.positions)
    if asked != "native" and asked not in POSITION_MODES:
        raise ConfigError(f"positions is {asked!r}; {close_matches(asked, ('native', *POSITION_MODES))}")
    return policy.native_positions if asked == "native" else typing.cast(PositionMode, asked)


def plugin_key(plugin: Any, node: DictConfig, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a plug-in as it stands in a key: its class by name, what that means, and its settings by value.

    What it means is a `protocol` where the class has one, and the source of a class that is not kvbench's. A part of it
    stands there the same way, with its source; one that is not set is left out.
    """
    given = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    settings = typed_settings(plugin, {name: value for name, value in given.items() if name != "_target_"})
    key: dict[str, Any] = {name: value for name, value in settings.items() if name not in without}
    for part in dataclasses.fields(plugin) if dataclasses.is_dataclass(plugin) else ():
        value = getattr(plugin, part.name, None)
        if is_unset_part(part, value):
            key.pop(part.name, None)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type) and part.name in key:
            key[part.name] |= {"class": class_name(type(value)), "source": source_of(type(value))}
    if taken := sorted(_OF_THE_CLASS & key.keys()):
        raise ConfigError(
            f"{type(plugin).__name__} has a setting {taken[0]!r}, which a key says of the class; rename it"
        )
    if (protocol := getattr(plugin, "protocol", None)) is not None:
        key["protocol"] = protocol
    return key | _class_key(type(plugin))


def _class_key(kind: type[object]) -> dict[str, str]:
    return {"class": class_name(kind)} | ({} if is_kvbench(kind.__module__) else {"source": source_of(kind)})


def _labels(composed: Composed, model: ModelSpec, dataset: Any, setting: CacheSetting) -> dict[str, Any]:
    policy, budget = setting.policy, setting.budget
    names = {group: str(composed.choices[group]) for group in ("model", "dataset", "policy")}
    names["model"] = model.checkpoint_name if names["model"] == _ANY_CHECKPOINT else names["model"]
    names["model"] += " (random weights)" if model.is_random else ""
    names["model"] += f" over {len(model.devices)} GPUs" if model.devices is not None else ""
    parts = [composed.choices.get(f"policy/{part}") for part in _PARTS]
    names["policy"] = "+".join([names["policy"], *(part for part in parts if part is not None)])
    names["policy"] += " (sees the future)" if Needs.FUTURE in needs_of(policy) else ""
    names["dataset"] = getattr(dataset, "label", names["dataset"])
    limits = {"budget_fraction": budget.fraction, "budget_tokens": budget.tokens}
    rounds = "up" if departures_of(policy).counts_as_released and budget.fraction is not None else "down"
    rule = {"evicts_at": _EVICTS_AT[policy.when], "budget_rounds": rounds}
    allocation = policy.allocation if isinstance(policy, ScorePolicy) else None
    if allocation is not None and allocation.total != "exact":
        rule["budget_total"] = allocation.total
    bounded = {"budget": budget.describe(), **limits, **rule}
    unbounded = {"budget": "-", **dict.fromkeys(limits)}
    return {**names, **(bounded if policy.bounded else unbounded), "positions": setting.positions}


@cache
def _versions() -> dict[str, str]:
    return {"kvbench": installed_version(), **{name: version(name) for name in _NUMERIC_PACKAGES}}


@cache
def _model_key(model: ModelSpec) -> dict[str, Any]:
    return model.key() if type(model) is ModelSpec else model.key() | _class_key(type(model))
