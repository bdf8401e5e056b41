"""What of a plug-in's code is in a key: all that decides, in every module of the user's own, and nothing else."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import kvbench.cache.policy
import kvbench.cache.selection
import kvbench.config.build
from kvbench.config.build import class_name, source_of
from kvbench.errors import ConfigError

REPO = Path(__file__).parents[2]
MINE = '''"""A policy."""

import math
from dataclasses import dataclass

import mixin
from helper import newest, oldest
from kvbench.cache import ScorePolicy, View

BEYOND = 3


def shifted(view):
    return view.position + BEYOND


class Local:
    def twice(self, view):
        return 2 * shifted(view)


@dataclass(frozen=True, kw_only=True)
class Mine(mixin.Scored, Local, ScorePolicy):
    """Keep the newest."""

    share: float = 0.5

    def score(self, view: View):
        from late import weight

        return newest(self.twice(view), math.pi) * weight  # larger = keep
'''
FILES = {
    "mine.py": MINE,
    "helper.py": "from deep import SCALE\n\ndef newest(x, y):\n    return SCALE * x\n\ndef oldest(x):\n    return -x\n",
    "deep.py": "import helper\n\nSCALE = 2.0\n",
    "mixin.py": "class Scored:\n    def bonus(self):\n        return 1\n",
    "late.py": "weight = 1.0\n",
    "called.py": "weight = 1.0\n",  # by no statement
}
Write = Callable[..., type[object]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Return a function that writes FILES, changed, into a new folder, and loads a class from there."""
    before = set(sys.modules)

    def forget() -> None:
        for module in set(sys.modules) - before:
            del sys.modules[module]

    def load(
        changes: dict[str, tuple[str, str]] | None = None, *, folder: str = "", name: str = "Mine"
    ) -> type[object]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        place = root / folder
        place.mkdir(parents=True)
        for file, text in FILES.items():
            old, new = (changes or {}).get(file, ("", ""))
            assert old in text
            (place / file).write_text(text.replace(old, new) if old else text, encoding="utf-8")
        package = folder.replace("/", ".")
        forget()
        monkeypatch.syspath_prepend(str(root))
        monkeypatch.syspath_prepend(str(place))
        importlib.invalidate_caches()
        kind: type[object] = getattr(importlib.import_module(f"{package}.mine" if package else "mine"), name)
        return kind

    yield load
    forget()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("mine.py", "BEYOND = 3", "BEYOND = 4"),
        ("mine.py", "view.position + BEYOND", "view.position - BEYOND"),
        ("mine.py", "2 * shifted", "3 * shifted"),
        ("mine.py", "return newest(", "return oldest("),
        ("mine.py", "from helper import newest, oldest", "from helper import newest as oldest, oldest as newest"),
        ("mine.py", "share: float = 0.5", "share: float = 0.25"),
        ("mine.py", "import math", "import cmath as math"),
        ("mixin.py", "return 1", "return 2"),
        ("helper.py", "SCALE * x", "SCALE + x"),
        ("deep.py", "2.0", "2.5"),
        ("late.py", "1.0", "1.5"),
    ],
)
def test_what_decides_changes_the_source(write: Write, file: str, old: str, new: str) -> None:
    assert source_of(write()) != source_of(write({file: (old, new)}))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("mine.py", '"""A policy."""', '"""The best policy there is."""'),
        ("mine.py", '    """Keep the newest."""\n', ""),
        ("mine.py", "  # larger = keep", ""),
        ("mine.py", "return view.position + BEYOND", "return (\n        view.position\n        + BEYOND\n    )"),
        ("mine.py", "import math\nfrom dataclasses import dataclass", "from dataclasses import dataclass\nimport math"),
        ("mine.py", "from helper import newest, oldest", "from helper import oldest\nfrom helper import newest"),
        ("mine.py", "share: float = 0.5", 'share: float = 0.5\n    """Of the budget."""\n'),
        ("helper.py", "def newest(x, y):\n", "# Of all\ndef newest(x, y):\n    '''Return it.'''\n"),
        ("mixin.py", "return 1", "pass\n        return 1"),
    ],
)
def test_comments_docstrings_and_layout_do_not(write: Write, file: str, old: str, new: str) -> None:
    assert source_of(write()) == source_of(write({file: (old, new)}))


@pytest.mark.parametrize(
    "line",
    [
        "import importlib; found = importlib.import_module('called')",
        "from importlib import import_module; found = import_module(name='called')",
        "found = __import__('called')",
    ],
)
def test_a_module_that_a_call_imports_counts_too(write: Write, line: str) -> None:
    calls = {"mine.py": ("BEYOND = 3", f"{line}\nBEYOND = found.weight")}
    source = source_of(write(calls))
    assert source == source_of(write({**calls, "called.py": ("weight", "weight  ")}))
    assert source != source_of(write({**calls, "called.py": ("1.0", "1.5")}))


def test_a_class_keeps_name_and_source_when_its_modules_move(write: Write) -> None:
    here = write()
    source = source_of(here)
    there = write(folder="elsewhere/deeper")
    assert (here.__module__, there.__module__) == ("mine", "elsewhere.deeper.mine")
    assert class_name(here) == class_name(there) == "Mine"
    assert source_of(there) == source


def test_two_classes_of_one_name_have_two_sources(write: Write) -> None:
    one = write()
    source = source_of(one)
    other = write({"mine.py": ("2 * shifted", "5 * shifted")}, folder="other")
    assert class_name(one) == class_name(other)
    assert source_of(other) != source


def test_the_source_is_the_same_in_every_version_of_python(write: Write) -> None:
    """Records outlive an update of Python; a value of 3.11."""
    assert source_of(write()) == "560e5137cffde1c6"


def test_a_class_without_a_file_is_refused_in_one_line() -> None:
    kind = type("Mine", (), {"__module__": "typed_at_a_prompt"})
    with pytest.raises(
        ConfigError, match=r"'typed_at_a_prompt' has no source file; .* put the class in a \.py file"
    ) as told:
        source_of(kind)
    assert "\n" not in str(told.value)


def bundled() -> dict[str, type[object]]:
    """Every policy of kvbench by the path that its yaml names."""
    found = {}
    for path in sorted((REPO / "conf" / "policy").glob("*.yaml")):
        target = yaml.safe_load(path.read_text(encoding="utf-8"))["_target_"]
        module, _, name = target.rpartition(".")
        found[target] = getattr(importlib.import_module(module), name)
    return found


def test_every_policy_of_kvbench_has_a_name_and_a_source_of_its_own() -> None:
    kinds = bundled().values()
    nothing = source_of(type("Nothing", (), {"__module__": "kvbench.cache"}))
    assert (
        len({class_name(kind) for kind in kinds}) == len({source_of(kind) for kind in kinds} - {nothing}) == len(kinds)
    )
    assert all(class_name(kind).startswith("kvbench:") for kind in kinds)


@pytest.mark.parametrize("target", bundled())
def test_moving_modules_of_kvbench_changes_no_name_and_no_source(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's module moves, and so do the modules of the cache that it imports from."""
    before = bundled()[target]
    source = Path(str(sys.modules[before.__module__].__file__)).read_text(encoding="utf-8")
    source = source.replace("kvbench.cache.selection", "kvbench.cache.moved_selection")
    for new, old in (
        ("kvbench.cache.moved_selection", "kvbench.cache.selection"),
        ("kvbench.policies.published.choice", "kvbench.policies.released.choice"),
    ):
        monkeypatch.setitem(sys.modules, new, importlib.import_module(old))
    (tmp_path / "moved.py").write_text(source, encoding="utf-8")
    module = ModuleType("kvbench.policies.published.moved")
    module.__file__ = str(tmp_path / "moved.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    after: type[object] = getattr(module, before.__name__)
    assert after is not before
    assert (class_name(after), source_of(after)) == (class_name(before), source_of(before))


def test_the_cache_is_in_no_source_so_that_a_docstring_in_it_measures_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kind,) = [kind for target, kind in bundled().items() if target.endswith(".H2O")]
    before = source_of(kind)
    (tmp_path / "changed.py").write_text('"""All of it is another text."""\n\nCHANGED = 1\n', encoding="utf-8")
    for module in (kvbench.cache.policy, kvbench.cache.selection):
        monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
    monkeypatch.setattr(kvbench.config.build, "_known", {})
    assert source_of(kind) == before
    monkeypatch.setattr(sys.modules[kind.__module__], "__file__", str(tmp_path / "changed.py"))
    monkeypatch.setattr(kvbench.config.build, "_known", {})
    assert source_of(kind) != before


def test_a_name_that_policies_may_import_is_one_thing_wherever_it_lies() -> None:
    """Of kvbench's modules a source holds names without their place, which may change."""
    places: dict[str, set[str]] = {}
    for path in [*(REPO / "kvbench" / "cache").glob("*.py"), REPO / "kvbench" / "errors.py"]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places.setdefault(node.name, set()).add(path.name)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
