"""What code a plug-in is, as a part of a cell's key: a record never outlives the code that made it.

A plug-in is named by its class, never by where that lies, so a module may be moved. Code counts as it decides:
comments, docstrings, layout and the order of imports do not. What kvbench itself does around a policy is covered by
`CACHE_SEMANTICS` and by a task's `protocol`, what a data set holds by its fingerprint.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from kvbench.errors import ConfigError

_OWN = "kvbench"
_POLICIES = "kvbench.policies"  # of kvbench's own modules only these are hashed
_DIGITS = 16
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

    Followed are the user's own modules, wherever they lie, and kvbench's policies; not other packages. Where a
    module lies and what it is called does not count. Raises: ConfigError if there is no source to be read.
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
        return [type(node).__name__, {name: self._shape(value, package) for name, value in sorted(shown.items())}]

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
