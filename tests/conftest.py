"""Tiny models for every test, and every policy there is; one thread, because the tensors are tiny."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import covering
from tests.covering import HARD, HARDER, POSITIONS, YAMLS, beyond_the_first, outside_the_cover


def pytest_configure(config: pytest.Config) -> None:
    """Set up torch, triton and hypothesis where tests run; the process that only hands them out imports none."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    covering.exhaustive = "not long" not in config.option.markexpr
    gc.disable()  # until all is imported and collected: nothing of it is waste
    import torch
    from absl.logging import get_absl_handler
    from hypothesis import HealthCheck, settings

    # Hydra closes every handler there is, and that of absl, which rouge_score brings, closes the stream that it found
    # as standard error: pytest's.
    get_absl_handler().python_handler.stream = sys.__stderr__
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")
    # The contract runs every yaml on prompts of plain tokens, those too that read pictures or the question.
    config.addinivalue_line("filterwarnings", "ignore:.*so the prompt is taken for one that has none:UserWarning")
    torch.set_num_threads(1)
    compose_once()
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before anything else is
        mend_interpreter()


def compose_once() -> None:
    """Let Hydra keep what it composed of the package's yamls: it takes a tenth of a second, and tests ask alike."""
    import pickle

    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.utils import JobRuntime

    compose: Any = ConfigLoaderImpl._load_configuration_impl
    composed: dict[Any, bytes] = {}

    def kept(loader: Any, config_name: Any, overrides: list[str], *given: Any, **named: Any) -> Any:
        sources = tuple((source.provider, source.path) for source in loader.config_search_path.get_path())
        is_own = any("file:" in str(path) for _, path in sources) or any("searchpath" in word for word in overrides)
        if is_own or not named.keys() <= {"run_mode", "from_shell", "validate_sweep_overrides"}:  # Hydra 1.4 has more
            return compose(loader, config_name, overrides, *given, **named)
        how = (*given, *sorted(named.items()), JobRuntime.instance().get("name"))
        key = (sources, config_name, tuple(overrides), how)
        if key not in composed:
            composed[key] = pickle.dumps(compose(loader, config_name, overrides, *given, **named))
        config = pickle.loads(composed[key])
        config.hydra.runtime.cwd = str(Path.cwd())
        return config

    ConfigLoaderImpl._load_configuration_impl = kept


def mend_interpreter() -> None:
    """Let the interpreter of triton 3.6 loop up to a scalar, which numpy 2.4 and later refuse; 3.7 has it so."""
    from importlib import metadata

    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return
    if not version.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patched = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = with_index


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to `make test-all` what a cover of a product does without, and out of that what a larger one does."""
    left = outside_the_cover(items)
    if covering.exhaustive:
        beyond, by_default = outside_the_cover(items, whole=True), {*items} - {*left}
        needless = {item for item in beyond if item not in by_default or item.get_closest_marker("long")}
        config.hook.pytest_deselected(items=list(needless))
        items[:] = [item for item in items if item not in needless]
    for item in (*left, *beyond_the_first(items)):
        item.add_marker(pytest.mark.long)


def pytest_collection_finish() -> None:
    """Leave what is imported now out of every later collection, that at the end too: each took half a second."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # or triton's library tells at exit of all that it finds alive
    gc.enable()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Do the same after each file: whoever measures memory collects, and would look through all that others left."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _short_looks_at_the_machine() -> None:
    """Let a timed task look at the machine's speed more briefly than a measurement does, which takes half a second."""
    import torch

    from kvbench.tasks import speed as clock

    if not torch.cuda.is_available():
        clock._LAST_MS, clock._CPU_BYTES = 15.0, 2**22


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A Llama with 4 query and 2 KV heads, switched to kvbench's attention."""
    from tests.tiny_models import tiny_model

    return tiny_model("llama_gqa")


@pytest.fixture(scope="session")
def tiny_llava() -> Any:
    """A LLaVA of a CLIP tower and the Llama, its text part switched to kvbench's attention."""
    from tests.tiny_models import tiny_model

    return tiny_model("llava")


@pytest.fixture(scope="session")
def bundled() -> Any:
    """The bundled model, loaded once."""
    from kvbench.models.loader import load_model
    from kvbench.models.spec import ModelSpec

    return load_model(ModelSpec(checkpoint="bundled"), "cpu")


@pytest.fixture(scope="session")
def shelf() -> Any:
    """A shelf that is shared, as a sweep shares it."""
    from kvbench.sweep.group import ModelShelf

    return ModelShelf()


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A results folder of a default sweep, 13 cells of 32 samples; tests must not write into it."""
    from tests.report.synthetic import write_sweep

    return write_sweep(tmp_path_factory.mktemp("results"))


@pytest.fixture(
    params=[*YAMLS, *HARD, *(pytest.param(name, marks=pytest.mark.long) for name in HARDER)],
    ids=lambda param: param if isinstance(param, str) else param.stem,
)
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each yaml of conf/policy, and one policy made to be hard on the base class, with parts too.

    One that reads an artefact learns it of each model in this process.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from tests.calibrating import in_process
    from tests.contract import middle_first

    if isinstance(request.param, str):
        return middle_first(request.param)
    return in_process(monkeypatch, instantiate(OmegaConf.load(request.param), _convert_="object"))


@pytest.fixture(params=POSITIONS)
def positions(request: pytest.FixtureRequest) -> Any:
    """Each position mode; for a policy that keeps the last queries as they were rotated, `original` in their place."""
    from kvbench.cache.policy import keeps_ring

    if request.param == "original" or "policy" not in request.fixturenames:
        return request.param
    if keeps_ring(request.getfixturevalue("policy")):
        return "original" if not covering.exhaustive else pytest.skip("keeps a ring: positions=original only")
    return request.param
