"""Who may import whom, read from the syntax trees; and that a name means one thing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
FILES = sorted(
    str(path.relative_to(REPO))
    for folder in ("kvbench", "policies", "hydra_plugins")
    for path in (REPO / folder).rglob("*.py")
    if (REPO / folder / "policies") not in path.parents
)
# The house, bottom to top: a package, and those before it that it may import, within functions too. A module that lies
# elsewhere than its package has a line of its own. `__init__` is kvbench itself.
MAY_IMPORT = {
    "errors": "",
    "__init__": "errors",
    "measures": "errors",
    "kernels": "",
    "cache": "errors kernels",
    "policies": "errors cache",
    "datasets": "errors",
    "stats": "errors measures",
    "results": "errors measures",
    "models": "errors kernels cache datasets results",
    "bundled": "datasets results",
    "tasks": "errors measures cache datasets stats results models",
    "autopsy": "errors cache datasets results models tasks",
    "sinks": "errors measures results",
    "sweep": "errors measures cache datasets results models tasks autopsy sinks",
    "config": "errors __init__ measures cache datasets results models tasks autopsy sinks sweep",
    "contract": "errors cache datasets stats models tasks config",
    "report": "errors __init__ measures stats results",
    "autopsy.page": "errors results report",  # what the page shows of an autopsy
    # W&B is sent the report's words and figures, and what its page shows of the samples that fail.
    "sinks.wandb": "errors __init__ measures results sinks report autopsy.page",
    "audit": "errors measures stats results tasks",
    "cli": "errors __init__ measures stats results models autopsy sinks sinks.wandb sweep config contract report audit",
    "__main__": "cli",
    "hydra_plugins": "errors __init__ sweep config report cli",
}
# What goes against the table: a module, the package it needs all the same, and why.
ALL_THE_SAME = {
    ("kvbench", "cache"): "the names a user's policy needs, loaded when first used",
    ("kvbench.autopsy.replay", "sweep"): "an autopsy is of a cell: the types alone",
    ("kvbench.report.page", "autopsy.page"): "puts the page together, this section too",
    ("kvbench.sweep.worker", "config"): "a worker is a program of its own: it is told words, and builds its cells",
    ("kvbench.sweep.worker", "cli"): "a worker is a program of its own: it makes libraries quiet as the command does",
}
ONLY_IN = {
    "hydra": ["kvbench/cli/*.py", "kvbench/config/*.py", "hydra_plugins/*.py"],
    "omegaconf": [
        *("kvbench/cli/*.py", "kvbench/config/*.py", "kvbench/sweep/worker.py", "hydra_plugins/*.py"),
        "kvbench/contract/*.py",  # a policy's facts are in its yaml
        "kvbench/report/laws.py",  # a law is a yaml
    ],
    "wandb": ["kvbench/sinks/wandb/*.py"],
    "wandb_workspaces": ["kvbench/sinks/wandb/report.py"],
    "matplotlib": ["kvbench/report/figures/*.py"],
    "triton": ["kvbench/kernels/*.py"],
    "accelerate": ["kvbench/models/*.py"],
    "transformers": ["kvbench/cache/*.py", "kvbench/models/*.py", "kvbench/bundled/*.py", "kvbench/contract/*.py"],
}
A_COMMAND = "a command is called like the package whose door it is"
AS_RELEASED = "the method as described; in released/ what published code does"
# A name that two modules or packages have, and why both are found by it.
ALIKE = {
    "build": "a cell from its configuration; a report from its records",
    "cache": "the package; in it the class that a model is given",
    "cake": "CAKE's score; its division among layers",
    "d2o": "the two parts of one method: how much layers hold, and what becomes of the rest",
    "elastic": AS_RELEASED,
    "files": "rows out of a user's files; how every file of ours is written",
    "frontier": "the command that searches; in results, the file that a search leaves",
    "h2o": AS_RELEASED,
    "policies": A_COMMAND,
    "page": "the page; the autopsy's section of it",
    "released": "the policies; what they do to the cache",
    "report": f"{A_COMMAND}; sinks/wandb/report is W&B's own kind of report",
    "results": A_COMMAND,
    "streaming_llm": AS_RELEASED,
    "sweep": f"{A_COMMAND}; in the package, the sweep itself",
}

CHOICE = "kvbench.policies.released.choice"  # how the released policies choose: no policy itself


def imports(nodes: Iterator[ast.AST] | list[ast.stmt], beside: str = "") -> set[str]:
    """Full names of modules that import statements among `nodes` name, with `from` names appended.

    beside: the package whose modules a relative import means, where there may be one.
    """
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or (node.level == 1 and beside), "relative imports hide the layer"
            package = f"{beside}." if node.level else ""
            found.update(f"{package}{node.module}.{alias.name}" for alias in node.names)
    return found


def tree_of(file: str) -> ast.Module:
    return ast.parse((REPO / file).read_text(encoding="utf-8"))


@cache
def imported_by(file: str) -> frozenset[str]:
    # The text of a released policy is in its key, so it may not say where its neighbour lies.
    beside = "kvbench.policies.released" if file.startswith("policies/released/") else ""
    return frozenset(imports(ast.walk(tree_of(file)), beside))


def module_name(file: str) -> str:
    """`kvbench/cache/slots.py` is kvbench.cache.slots, `policies/h2o.py` kvbench.policies.h2o."""
    parts = Path(file).with_suffix("").parts
    name = ".".join(parts if parts[0] != "policies" else ("kvbench", *parts))
    return name.removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}


def module_of(name: str) -> str:
    """Return the module that an imported name lies in: a class of kvbench.errors is in kvbench.errors."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def part(name: str) -> str:
    """kvbench.cache.slots is part of `cache`, kvbench.errors of `errors`, kvbench of `__init__`."""
    first, *rest = name.split(".")
    if first != "kvbench":
        return first
    own = ".".join(rest[:2])
    return own if own in MAY_IMPORT else rest[0] if rest else "__init__"


def needed_packages(module: str) -> set[str]:
    """Return the packages beside its own that a module imports from."""
    names = {module_of(name) for name in imported_by(MODULES[module]) if name.split(".")[0] == "kvbench"}
    return {part(name) for name in names} - {part(module)}


def test_the_table_lists_every_package_once_and_lower_ones_first() -> None:
    assert {part(module) for module in MODULES} <= set(MAY_IMPORT)
    order = list(MAY_IMPORT)
    for package, lower in MAY_IMPORT.items():
        assert set(lower.split()) <= set(order[: order.index(package)]), package


def test_a_package_imports_only_those_below_it() -> None:
    against = {
        (module, package)
        for module in MODULES
        for package in needed_packages(module) - set(MAY_IMPORT[part(module)].split())
    }
    assert against == set(ALL_THE_SAME)


def test_no_module_needs_itself() -> None:
    """Nor through others: at their heads no two modules import each other, whatever is in between."""
    needs: dict[str, set[str]] = defaultdict(set)
    for module, file in MODULES.items():
        head = imports(tree_of(file).body, module.rpartition(".")[0])
        needs[module] = {module_of(name) for name in head} & set(MODULES) - {module}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for needed in sorted(needs[module]):
                visit(needed, (*way, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


def test_two_modules_of_one_name_have_a_reason() -> None:
    named: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        named[module.rpartition(".")[2]].append(module)
    assert {name for name, modules in named.items() if len(modules) > 1} == set(ALIKE), dict(named)


def test_the_root_holds_what_every_package_may_name() -> None:
    root = {path.name for path in (REPO / "kvbench").glob("*.py")}
    assert root == {"__init__.py", "__main__.py", "errors.py", "measures.py"}


def test_tests_lie_under_what_they_test() -> None:
    """Beside the packages stand only what spans them all: whole products, a GPU, a cluster."""
    packages = {path.name for path in (REPO / "kvbench").iterdir() if path.is_dir()} | {"policies"}
    folders = {path.name for path in (REPO / "tests").iterdir() if any(path.rglob("test_*.py"))}
    assert folders - packages <= {"gpu", "parity", "security", "slurm", "trust"}
    at_the_root = {path.name for path in (REPO / "tests").glob("test_*.py")}
    allowed = {"covering", "docs", "errors", "layers", "measures", "wheel"}
    assert at_the_root <= {f"test_{name}.py" for name in allowed}


def test_a_policy_imports_only_torch_and_the_contract() -> None:
    policies = [file for file in FILES if file.startswith("policies/")]
    assert len(policies) > 10
    for file in policies:
        for name in imported_by(file):
            ours = name.startswith(("kvbench.cache", "kvbench.errors", CHOICE))
            allowed = ours or name.split(".")[0] == "torch"
            assert allowed or name.split(".")[0] in sys.stdlib_module_names, (file, name)


def test_nothing_but_a_yaml_names_a_policy() -> None:
    for file in FILES:
        named = {name for name in imported_by(file) if name.startswith(("kvbench.policies", "policies"))}
        assert all(name.startswith(CHOICE) for name in named), file


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_heavy_package_is_imported_in_its_own_place_only(package: str) -> None:
    users = [f for f in FILES if package in {name.split(".")[0] for name in imported_by(f)}]
    assert [f for f in users if not any(fnmatch(f, pattern) for pattern in ONLY_IN[package])] == []


def test_the_report_reads_only_files() -> None:
    heavy = {"torch", "transformers", "wandb", "hydra"}
    for module, file in MODULES.items():
        if part(module) in ("report", "stats"):
            assert not heavy & {name.split(".")[0] for name in imported_by(file)}, file


def test_the_command_line_answers_without_torch() -> None:
    code = "import sys, kvbench.cli.main; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_help_is_printed_by_a_handful_of_modules_and_no_library() -> None:
    code = (
        "import sys; from kvbench.cli.main import run\n"
        "try: run(['--help'])\n"
        "except SystemExit: pass\n"
        "ours = [name for name in sys.modules if name.partition('.')[0] == 'kvbench']\n"
        "heavy = {'torch', 'transformers', 'hydra', 'omegaconf', 'numpy', 'pandas', 'rich', 'wandb', 'matplotlib'}\n"
        "sys.exit(len(ours) > 10 or bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True).returncode == 0


def test_the_import_reader_sees_every_form() -> None:
    tree = ast.parse("import a.b\ndef f():\n    from c import d\nif x:\n    import e as g")
    assert imports(ast.walk(tree)) == {"a.b", "c.d", "e"}


def test_who_checks_cells_and_starts_workers_reaches_no_module_that_imports_models() -> None:
    """At their heads: transformers' models take longer to import than all the rest, and a worker alone needs them."""
    ways: dict[str, tuple[str, ...]] = {}
    todo = [(name,) for name in ("kvbench.config.build", "kvbench.sweep.sweep", "kvbench.cli.sweep")]
    while todo:
        way = todo.pop()
        if way[-1] in ways:
            continue
        ways[way[-1]] = way
        head = imports(tree_of(MODULES[way[-1]]).body, way[-1].rpartition(".")[0])
        heavy = {name for name in head if name.split(".")[0] in ("transformers", "triton")}
        assert not heavy, f"{' -> '.join(way)} imports {', '.join(sorted(heavy))}"
        todo += [(*way, module) for module in {module_of(name) for name in head} & set(MODULES)]
    assert len(ways) > 40


@pytest.mark.long
def test_the_cells_of_a_sweep_are_checked_without_transformers() -> None:
    code = (
        "import sys; from kvbench.config.compose import compose_grid; from kvbench.config.build import build_cell; "
        "import kvbench.cli.sweep, kvbench.sweep.sweep; "
        "keys = {build_cell(c).key for c in compose_grid(['+experiment=quick'], multirun=False, config_dir=None)}; "
        "heavy = {'transformers', 'scipy', 'wandb', 'matplotlib', 'pandas'} & set(sys.modules); "
        "sys.exit(len(keys) < 2 or bool(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_every_kernel_is_launched_on_the_device_of_its_tensors() -> None:
    launches = 0
    for file in (file for file in FILES if file.startswith("kvbench/kernels/")):
        for function in (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.FunctionDef)):
            decorators = {ast.unparse(one) for one in function.decorator_list}
            grids = [node for node in ast.walk(function) if isinstance(node, ast.Call) and _is_launch(node)]
            if any("jit" in one for one in decorators):
                continue
            launches += len(grids)
            assert not grids or "on_its_device" in decorators, f"{file}: {function.name} launches on the current device"
    assert launches >= 10


def _is_launch(call: ast.Call) -> bool:
    """`kernel[grid](...)`, or a kernel with its grid handed to `_launch`."""
    if isinstance(call.func, ast.Subscript):
        return True
    return ast.unparse(call.func) == "_launch"
