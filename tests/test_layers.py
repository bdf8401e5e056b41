"""Who may import whom, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
FILES = sorted(
    str(path.relative_to(REPO))
    for folder in ("kvbench", "policies")
    for path in (REPO / folder).rglob("*.py")
    if (REPO / folder / "policies") not in path.parents
)
FOUNDATION = {
    "errors",
    "units",
    "durable",
    "sealed",
    "redaction",
    "records",
    "packed",
    "autopsies",
    "frontier_file",
    "installed",
}
COMPOSITION = {
    "audit_cli",
    "cli",
    "frontier_cli",
    "frontier_look",
    "frontier_question",
    "frontier_search",
    "combinations",
    "gate",
    "policy_source",
    "parser",
    "plot_cli",
    "report_cli",
    "results_cli",
    "wandb_cli",
    "wandb_report",
    "wandb_summary",
    "config",
    "compose",
    "launch",
    "quiet",
    "worker",
    "help_text",
    "value_types",
    "__main__",
}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "units": {"errors"},
    "durable": {"errors"},
    "redaction": set(),
    "sealed": {"errors"},
    "records": {"errors", "durable", "sealed"},
    "packed": {"errors"},
    "autopsies": {"errors", "durable", "sealed"},
    "frontier_file": set(),
    "installed": {"errors"},
    "kernels": FOUNDATION,
    "cache": FOUNDATION | {"kernels"},
    "datasets": FOUNDATION | {"cache"},
    "models": FOUNDATION | {"kernels", "cache", "datasets"},
    "metrics": FOUNDATION | {"cache", "datasets", "models"},
    "sinks": FOUNDATION | {"cache", "datasets", "models"},
    "runs": FOUNDATION | {"kernels", "cache", "datasets", "models", "metrics", "sinks", "stats"},
    "stats": {"errors", "units"},
    "report": FOUNDATION | {"stats"},
    "audit": FOUNDATION | {"metrics", "stats"},
    "__init__": {"cache"},
}
ONLY_IN = {
    "hydra": ["kvbench/cli/main.py", "kvbench/config/build.py", "kvbench/config/compose.py", "kvbench/cli/sweep.py"],
    "omegaconf": [
        "kvbench/cli/main.py",
        "kvbench/config/build.py",
        "kvbench/config/compose.py",
        "kvbench/sweep/worker.py",
    ],
    "wandb": ["kvbench/sinks/wandb/*.py"],
    "wandb_workspaces": ["kvbench/sinks/wandb/report.py"],
    "matplotlib": ["kvbench/report/plots*.py"],
    "triton": ["kvbench/kernels/*.py"],
    "transformers": [
        "kvbench/cache/*.py",
        "kvbench/models/*.py",
        "kvbench/tasks/*.py",
        "kvbench/sweep/*.py",
        "kvbench/autopsy/*.py",
        "kvbench/bundled/*.py",
    ],
}


def imports(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """Full names of modules that import statements among `nodes` name, with `from` names appended."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@cache
def imported_by(file: str) -> frozenset[str]:
    return frozenset(imports(ast.walk(ast.parse((REPO / file).read_text(encoding="utf-8")))))


def part(file: str) -> str:
    """`kvbench/cache/slots.py` is part of `cache`, `kvbench/errors.py` of `errors`."""
    return Path(file).parts[1].removesuffix(".py")


def test_a_layer_imports_only_lower_layers() -> None:
    for file in FILES:
        if file.startswith("kvbench/") and part(file) not in COMPOSITION:
            own = {name.split(".")[1] for name in imported_by(file) if name.startswith("kvbench.")}
            assert own <= MAY_IMPORT[part(file)] | {part(file)}, file


def test_a_policy_imports_only_torch_and_the_contract() -> None:
    policies = [file for file in FILES if file.startswith("policies/")]
    assert len(policies) > 10
    for file in policies:
        for name in imported_by(file):
            allowed = name.startswith(("kvbench.cache", "kvbench.errors")) or name.split(".")[0] == "torch"
            assert allowed or name.split(".")[0] in sys.stdlib_module_names, (file, name)


def test_nothing_but_a_yaml_names_a_policy() -> None:
    for file in FILES:
        assert not [name for name in imported_by(file) if name.startswith(("kvbench.policies", "policies"))], file


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_heavy_package_is_imported_in_its_own_place_only(package: str) -> None:
    users = [f for f in FILES if package in {name.split(".")[0] for name in imported_by(f)}]
    assert [f for f in users if not any(fnmatch(f, pattern) for pattern in ONLY_IN[package])] == []


def test_the_report_reads_only_files() -> None:
    heavy = {"torch", "transformers", "wandb", "hydra"}
    for file in FILES:
        if part(file) == "report":
            assert not heavy & {name.split(".")[0] for name in imported_by(file)}, file


def test_the_command_line_answers_without_torch() -> None:
    code = "import sys, kvbench.cli; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_the_import_reader_sees_every_form() -> None:
    tree = ast.parse("import a.b\ndef f():\n    from c import d\nif x:\n    import e as g")
    assert imports(ast.walk(tree)) == {"a.b", "c.d", "e"}


def test_the_cells_of_a_sweep_are_checked_without_transformers() -> None:
    code = (
        "import sys; from kvbench.config.compose import compose_grid; from kvbench.config.build import build_cell; "
        "import kvbench.cli.sweep, kvbench.sweep.sweep; "
        "keys = {build_cell(c).key for c in compose_grid(['+experiment=quick'], multirun=False, config_dir=None)}; "
        "heavy = {'transformers', 'scipy', 'wandb', 'matplotlib', 'pandas'} & set(sys.modules); "
        "sys.exit(len(keys) < 2 or bool(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
