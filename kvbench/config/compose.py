"""From a command line to composed configurations, with one-line errors; imports no torch.

The whole grid of a plain sweep is composed by Hydra before anything runs, so that a wrong name or key stops it at
once, with the reason and close matches. A sweeper that chooses while it runs (Optuna, Ax) has no grid: then what all
of its jobs have in common is composed, and each batch again where it is launched.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, OverrideType, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from kvbench.config.checks import check_no_secret_override
from kvbench.errors import ConfigError, close_matches, did_you_mean, near_names

if TYPE_CHECKING:
    from hydra_plugins.kvbench_shards import Listing

CONFIG_MODULE = "kvbench.conf"
CONFIG_NAME = "config"
LEFT_OUT = "leave_out"
SUPERVISED = "supervised"
_GRID, _LAWS, SHARDS = "basic", "laws", "shards"  # the sweepers that know all their jobs before the first one runs
_EXTRA = ("joblib", "submitit_local", "submitit_slurm", "optuna")
_OVERRIDDEN = re.compile(r"Could not override '([^']+)'")
_GROUPS = ("model", "dataset", "policy", "budget", "task", "weights", "workload", "sink", "autopsy")
_GROUP_CHOICE = re.compile(rf"({'|'.join(_GROUPS)})=[\w-]+")
_EXPERIMENT = re.compile(r"\+experiment=[\w-]+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(%?)")
_MOST_NAMES = 3


@dataclass(frozen=True, kw_only=True)
class Composed:
    """One composed cell: the settings without Hydra's own, and the name chosen in each group."""

    config: DictConfig
    choices: dict[str, str | None]
    multirun: bool = False

    @property
    def is_search(self) -> bool:
        """Whether a sweeper chooses cells while it runs, so that this holds only what they have in common."""
        return self.multirun and self.choices.get("hydra/sweeper") not in (_GRID, _LAWS, SHARDS)

    @property
    def may_be_left_out(self) -> bool:
        """Whether a sweep goes on without this cell where it cannot run; raises nothing for a wrong word."""
        return self.config.get("refused") == LEFT_OUT and self.choices.get("policy") != "full"

    @functools.cached_property
    def spec(self) -> dict[str, Any]:
        """Plain data for another process, made once; interpolations stay as they are written."""
        return {"config": OmegaConf.to_container(self.config, resolve=False), "choices": self.choices}

    def resolved(self) -> dict[str, Any]:
        """Return all settings with their interpolations; `???` where one is not given. Raises: ConfigError."""
        try:
            settings: Any = OmegaConf.to_container(self.config, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(" ".join(str(error).split())) from error
        return dict(settings)


def compose_grid(
    overrides: Sequence[str], *, multirun: bool, config_dir: str | None, config_name: str = CONFIG_NAME
) -> list[Composed]:
    """Return every cell that `overrides` ask for, in Hydra's order. Raises: ConfigError, one line."""
    check_no_secret_override(overrides)
    with _searching(config_dir, config_name), told_in_one_line(overrides):
        alike = Alike(lambda words: without_hydra(_composed(words), multirun=multirun), _loader())
        return [_cell(alike, _parsed(words)) for words in _cells(overrides, multirun)]


def listed(overrides: Sequence[str], *, config_dir: str | None, config_name: str = CONFIG_NAME) -> Listing | None:
    """Return which share of its cells a sweep in shards runs, None for another sweep. Raises: ConfigError, one line."""
    with _searching(config_dir, config_name), told_in_one_line(overrides):
        hydra = _hydra(_parsed(overrides))
        return _listing(hydra, overrides) if hydra.runtime.choices.get("hydra/sweeper") == SHARDS else None


def check_overrides(
    overrides: Sequence[str], *, config_dir: str | None, config_name: str = CONFIG_NAME
) -> dict[str, str]:
    """Compose the overrides and return what an experiment sweeps over. Raises: ConfigError, one line."""
    compose_grid(overrides, multirun=False, config_dir=config_dir, config_name=config_name)
    with _searching(config_dir, config_name):
        return _sweep_params(_hydra(_parsed(overrides)))


def copied(config: DictConfig) -> DictConfig:
    """Return a copy that shares nothing. OmegaConf's own takes five times as long, most of a large sweep's start."""
    copy: DictConfig = pickle.loads(pickle.dumps(config))
    return copy


def without_hydra(config: DictConfig, *, multirun: bool = False) -> Composed:
    """Return the cell of what Hydra composed, whose own settings are taken out."""
    multirun, choices = multirun or config.hydra.mode == RunMode.MULTIRUN, _choices(config)
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    return Composed(config=config, choices=choices, multirun=multirun)


def job_spec(job: DictConfig) -> dict[str, Any]:
    """Return the `spec` of what `without_hydra` makes of a job, which stays as it is."""
    nodes = ((key, node) for key, node in job.items_ex(resolve=False) if key != "hydra")
    plain = {
        key: OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node for key, node in nodes
    }
    return {"config": plain, "choices": _choices(job)}


def _choices(config: DictConfig) -> dict[str, str | None]:
    return {str(name): value for name, value in config.hydra.runtime.choices.items()}


@contextlib.contextmanager
def told_in_one_line(overrides: Sequence[str]) -> Iterator[None]:
    """Raise ConfigError, one line, for what Hydra or a sweeper says of `overrides`; they raise plain errors too."""
    try:
        yield
    except MissingConfigException as error:
        raise ConfigError(_unknown_choice(error)) from error
    except (HydraException, OmegaConfBaseException, ValueError, RuntimeError) as error:
        raise ConfigError(_one_line(error, overrides)) from error


_own_folder: ContextVar[str | None] = ContextVar("_own_folder", default=None)
_primary: ContextVar[str] = ContextVar("_primary", default=CONFIG_NAME)
_known: ContextVar[dict[tuple[str, ...], DictConfig] | None] = ContextVar("_known", default=None)


class _OwnFolder(SearchPathPlugin):
    """Lets `compose` find what `--config-dir` names, in the same place as Hydra's own command line does."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folder = _own_folder.get()
        if folder is not None:
            search_path.append("command-line", f"file://{Path(folder).absolute()}")


@contextlib.contextmanager
def _searching(config_dir: str | None, config_name: str) -> Iterator[None]:
    """Look for configurations in kvbench's package, then in `config_dir`; the whole one is called `config_name`."""
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir} is no folder; give the one that holds policy/mine.yaml")
    Plugins.instance().register(_OwnFolder)
    before = _own_folder.set(config_dir), _primary.set(config_name), _known.set({})
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            yield
    finally:
        _own_folder.reset(before[0])
        _primary.reset(before[1])
        _known.reset(before[2])


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _cells(overrides: Sequence[str], multirun: bool) -> Iterator[list[str]]:
    parsed = _parsed(overrides)
    for o in parsed:
        if o.key_or_group in _GROUPS and (o.is_delete() or not _is_choice(o.value())):
            told = f"{o.input_line} chooses no {o.key_or_group}"
            raise ConfigError(f"{told}; {_size_meant(o.key_or_group, str(o.input_line).partition('=')[2])}")
    hydra = _hydra(parsed)
    if not multirun and hydra.mode != RunMode.MULTIRUN:
        yield list(overrides)
        return
    if hydra.runtime.choices.get("hydra/sweeper") == _LAWS:
        from hydra_plugins.kvbench_laws import law_jobs

        yield from law_jobs(parsed)
        return
    if hydra.runtime.choices.get("hydra/sweeper") == SHARDS:
        yield from _listing(hydra, overrides).jobs
        return
    if hydra.runtime.choices.get("hydra/sweeper") != _GRID:
        yield [str(o.input_line) for o in parsed if not o.is_sweep_override()]
        return
    words: dict[str, list[str]] = {}
    for o in _swept(hydra, overrides):
        key = o.get_key_element()
        swept = o.sweep_string_iterator() if o.is_sweep_override() else [o.get_value_element_as_str()]
        words[key] = [f"{key}={value}" for value in swept]
    yield from map(list, itertools.product(*words.values()))


def _swept(hydra: Any, overrides: Sequence[str]) -> list[Override]:
    """Return what an experiment sweeps over, then what was given, of which the last of a key counts."""
    found = _parsed([*(f"{name}={values}" for name, values in _sweep_params(hydra).items()), *overrides])
    for override in found:
        _check_swept(override)
    return found


def _listing(hydra: Any, overrides: Sequence[str]) -> Listing:
    from hydra_plugins.kvbench_shards import listing

    return listing(_swept(hydra, overrides), hydra.sweeper)


def _check_swept(override: Override) -> None:
    """Raise ConfigError for a sweep without values, with which the grid would be empty, or with endlessly many."""
    if not override.is_sweep_override():
        return
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line} has no end of values, so only a search can choose some; add hydra/sweeper=optuna, "
            "or give the values one by one"
        )
    if any(True for _ in override.sweep_iterator()):
        return
    known = _loader().get_group_options(override.key_or_group) if isinstance(override.value(), Glob) else []
    names = f"; {override.key_or_group} has {', '.join(known)}" if known else ""
    raise ConfigError(f"{override.input_line} stands for no value at all, so there is no cell to run{names}")


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parsed: list[Override] = OverridesParser.create(config_loader=_loader()).parse_overrides(list(overrides))
    return parsed


def _hydra(parsed: Sequence[Override]) -> Any:
    """Return Hydra's own settings under the overrides that have one value."""
    values, rest = _split_values([o for o in parsed if not o.is_sweep_override()], _loader())
    config = _composed([str(o.input_line) for o in rest])  # as most cells are, so that it is composed once for both
    _set_values(config, values)
    return config.hydra


def _sweep_params(hydra: Any) -> dict[str, str]:
    """Return what an experiment sweeps over by itself."""
    return {str(name): str(values) for name, values in (hydra.sweeper.get("params") or {}).items()}


def _size_meant(group: str, text: str) -> str:
    """Return how to go on after `group=text`, which is no name: a size of the budget has a setting of its own."""
    numbers = [_SIZE.fullmatch(part) for part in text.split(",")] if group == "budget" else [None]
    sizes = [float(one[1]) / (100 if one[2] else 1) for one in numbers if one is not None]
    if len(sizes) < len(numbers) or not all(sizes):
        return "give a name, kvbench --help lists them"
    kind = "budget.fraction" if max(sizes) <= 1 else "budget=tokens budget.tokens"
    return did_you_mean([f"{kind}={','.join(f'{size:g}' for size in sizes)}"])


def _is_choice(value: Any) -> bool:
    """Whether a group may be given this: a name, several names, or something to sweep over."""
    if isinstance(value, ChoiceSweep):
        return all(_is_choice(item) for item in value.list)
    if isinstance(value, list):
        return all(isinstance(item, str | QuotedString) for item in value)
    return not isinstance(value, int | float | dict | None)


def _composed(words: list[str]) -> Any:
    known = _known.get()
    if known is None:  # nothing is searched, so a yaml may change behind what was kept
        return compose(_primary.get(), overrides=words, return_hydra_config=True)
    if tuple(words) not in known:
        known[tuple(words)] = compose(_primary.get(), overrides=words, return_hydra_config=True)
    return copied(known[tuple(words)])


class Alike:
    """What jobs that choose alike have in common, composed once for all of them by `compose` from words.

    Hydra reads every yaml again for each job, which takes longer than all the rest of a large sweep's start.
    """

    def __init__(self, compose: Callable[[list[str]], Any], loader: ConfigLoader) -> None:
        self._compose, self._loader = compose, loader
        self._known: dict[tuple[str, ...], Any] = {}

    def of(self, overrides: Sequence[Override]) -> tuple[Any, list[Override]]:
        """Return a copy that shares nothing with another, and the single values that are still to be set in it."""
        values, rest = _split_values(overrides, self._loader)
        words = tuple(str(override.input_line) for override in rest)
        if words not in self._known:
            self._known[words] = self._compose(list(words))
        return copied(self._known[words]), values


def _cell(alike: Alike, overrides: Sequence[Override]) -> Composed:
    cell: Composed
    cell, values = alike.of(overrides)
    OmegaConf.set_struct(cell.config, True)
    _set_values(cell.config, values)
    OmegaConf.set_struct(cell.config, False)
    return cell


class SharingLoader:
    """Hydra's loader of configurations, but jobs of a sweep that choose alike are composed once for all.

    A sweeper composes every job to check it, and throws it away; a launcher `take`s that one. What comes out is what
    Hydra makes, its own notes about the job included. sweep: the configuration of the whole sweep.
    """

    def __init__(self, loader: ConfigLoader, sweep: DictConfig) -> None:
        self._loader = loader
        self._alike = Alike(lambda words: loader.load_sweep_config(sweep, words), loader)
        self._checked: dict[tuple[str, ...], DictConfig] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Return the job of these words, which `take` may give once more."""
        job = self._checked[tuple(sweep_overrides)] = self._job(sweep_overrides)
        return job

    def take(self, words: Sequence[str]) -> DictConfig:
        """Return the job of these words as its own: one that was checked, or a new one."""
        checked = self._checked.pop(tuple(words), None)
        return self._job(words) if checked is None else checked

    def _job(self, words: Sequence[str]) -> DictConfig:
        parsed = OverridesParser.create(config_loader=self._loader).parse_overrides(list(words))
        job: DictConfig
        job, values = self._alike.of(parsed)
        _set_values(job, values)
        words = [str(o.input_line) for o in parsed if not o.is_hydra_override()]
        form = job.hydra.job.config.override_dirname
        named = sorted(str(o.input_line) for o in parsed if _is_named(o, form.exclude_keys))
        with read_write(job.hydra), open_dict(job.hydra):
            job.hydra.overrides.task = words
            if not OmegaConf.is_interpolation(job.hydra.job, "override_dirname"):  # Hydra 1.4 makes it when asked
                job.hydra.job.override_dirname = form.item_sep.join(named).replace("=", form.kv_sep)
        return job


def _is_named(override: Override, excluded: Collection[str]) -> bool:
    return not override.is_hydra_override() and override.key_or_group not in excluded


def _set_values(config: DictConfig, values: Iterable[Override]) -> None:
    for override in values:
        try:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except (ConfigAttributeError, ConfigKeyError) as error:
            raise ConfigCompositionException(f"Could not override '{override.key_or_group}'.") from error
        except OmegaConfBaseException as error:
            raise ConfigCompositionException(f"Error merging override {override.input_line}") from error


def _split_values(overrides: Sequence[Override], loader: ConfigLoader) -> tuple[list[Override], list[Override]]:
    """Return the overrides that change one value, as `budget.fraction=0.1` or `seed=3` do, and the others.

    The others choose, add or delete, or are Hydra's own. Where one of them concerns the same key as a value, the
    order counts, and all are left together.
    """
    values = [o for o in overrides if _changes_a_value(o, loader)]
    rest = [o for o in overrides if o not in values]
    for other in (o.key_or_group for o in rest):
        for key in (o.key_or_group for o in values):
            if f"{other}.".startswith(f"{key}.") or ("." in other and f"{key}.".startswith(f"{other}.")):
                return [], list(overrides)
    return values, rest


def _changes_a_value(override: Override, loader: ConfigLoader) -> bool:
    key = override.key_or_group
    plain = override.type == OverrideType.CHANGE and override.package is None and "/" not in key and "@" not in key
    return plain and not override.is_hydra_override() and ("." in key or not _is_group(loader, key))


@functools.lru_cache(maxsize=64)
def _is_group(loader: ConfigLoader, name: str) -> bool:
    return bool(loader.get_group_options(name))


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if group in ("hydra/launcher", "hydra/sweeper") and name in _EXTRA:
        return f"{group} is {name!r}, which is not installed; python -m pip install 'kvbench[sweep]'"
    if str(error).startswith("Cannot find primary config"):
        return f"--config-name is {name!r}, but no folder has {name}.yaml; add --config-dir DIR, which holds it"
    if not group or not error.options:
        return " ".join(str(error).split())
    if group == "budget" and _SIZE.fullmatch(name):
        return f"budget={name} chooses no budget; {_size_meant(group, name)}"
    own = next(iter(sorted(Path().glob(f"*/{group}/{name}.yaml"))), None)
    if own is not None and own.parents[len(Path(group).parts)].name != _own_folder.get():
        return f"{group} is {name!r}, which kvbench does not have; {own} is there: add --config-dir {own.parts[0]}"
    return f"{group} is {name!r}; {close_matches(name, error.options)}"


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """Say which key is unknown, with close matches; else the library's lines in one."""
    if isinstance(error, OverrideParseException):
        reason = next((line for line in str(error).splitlines() if "override" not in line), "")
        return f"{error.override} cannot be read as KEY=VALUE ({reason})"
    unknown = _OVERRIDDEN.search(str(error))
    if unknown is None:
        return " ".join(str(error).split())
    if unknown[1] == "experiment":
        return "an experiment is added to the settings, not changed; write +experiment=NAME"
    is_open = GlobalHydra.instance().is_initialized()  # within `_searching`, so that a folder of one's own counts
    with contextlib.nullcontext() if is_open else initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        return f"{unknown[1]} is no setting{_what_is_meant(unknown[1], overrides)}"


def _what_is_meant(key: str, overrides: Sequence[str]) -> str:
    """Return how to go on: a setting of what was chosen in the key's group, else of another choice, else all there are.

    What stands before the first dot is the same in all settings of a group, so only the rest is compared.
    """
    group, _, rest = key.partition(".")
    if group not in _GROUPS or not rest:
        known = _settings([word for word in overrides if _GROUP_CHOICE.fullmatch(word)])
        near = near_names(key, {*known, *_GROUPS})
        if not near and (own := [name for name in known if name.startswith(f"{group}.")]):
            return f"; {group} has {', '.join(own)}"
        return f"; {did_you_mean(near)}" if near else "; kvbench --help lists settings, kvbench --cfg job prints them"
    names = _chosen(group, overrides)
    own = sorted({rest for name in names for rest in _rests(group, name)})
    if near := near_names(rest, own):
        return f"; {did_you_mean([f'{group}.{name}' for name in near])}"
    having: dict[str, list[str]] = {}
    for other in _loader().get_group_options(group):
        for name in near_names(rest, _written(group, other))[:1]:
            having.setdefault(name, []).append(other)
    told = f" of {group}={','.join(names)}, which has {', '.join(f'{group}.{name}' for name in own) or 'none'}"
    for name in near_names(rest, having)[:1]:
        others = sorted(having[name], key=len)[:_MOST_NAMES]
        return f"{told}; did you mean '{group}.{name}' of {group}={' or '.join(others)}?"
    return told


def _chosen(group: str, overrides: Sequence[str]) -> list[str]:
    """Return the names chosen in a group: those given, else those an experiment sweeps over, else the default."""
    given = [word.partition("=")[2] for word in overrides if word.startswith(f"{group}=")]
    composed = _composed([word for word in overrides if _EXPERIMENT.fullmatch(word)])
    swept = _sweep_params(composed.hydra).get(group)
    names = given[-1] if given else swept or str(composed.hydra.runtime.choices[group])
    known = _loader().get_group_options(group)
    return [name for name in names.strip("[]").split(",") if name in known]


def _rests(group: str, name: str) -> list[str]:
    """Return the settings of one choice in a group, without the group's name."""
    keys = _settings([f"{group}={name}"])
    return [key.removeprefix(f"{group}.") for key in keys if key.startswith(f"{group}.")]


def _written(group: str, name: str) -> list[str]:
    """Return the settings that the yaml of a choice itself holds: composing every choice of a group takes seconds."""
    loader: Any = _loader()
    found = loader.repository.load_config(f"{group}/{name}")
    return [] if found is None else list(_flat_keys(found.config))


def _settings(choices: list[str]) -> list[str]:
    """Return every key that can be set with these group choices, or without where they are wrong too."""
    try:
        return list(_flat_keys(without_hydra(_composed(choices)).config))
    except (HydraException, OmegaConfBaseException):
        return list(_flat_keys(without_hydra(_composed([])).config))


def _flat_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for name, value in config.items_ex(resolve=False):
        if isinstance(value, DictConfig):
            yield from _flat_keys(value, f"{prefix}{name}.")
        elif name != "_target_":
            yield f"{prefix}{name}"
