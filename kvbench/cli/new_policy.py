"""`kvbench new-policy`: write a policy's class and its yaml, and say what to run next.

kvbench new-policy mine                              in a checkout: policies/mine.py and conf/policy/mine.yaml
kvbench new-policy mine --like snapkv
kvbench new-policy mine --config-dir conf            mine.py beside conf, and conf/policy/mine.yaml
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from kvbench.cli import Parser, names_in
from kvbench.errors import ConfigError, check_known
from kvbench.results.files import make_folder, write_new

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_CLASS = '''\
"""{title}: say in a line what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class {title}(ScorePolicy):
    """Say what stays, where it comes from (arXiv number, equation), and where this differs from it."""

    needs: ClassVar[Needs] = Needs.NOTHING  # MASS, WINDOW, PROBS, HEAD_ROWS, MOMENTS: docs/policies.md

    num_recent: int = 8

    def score(self, view: View) -> Tensor:
        """Return (B, H, T), larger = keep: here newer is better."""
        return view.position.float()
'''
_YAML = """\
# {title}: say what stays, and its source (arXiv number).
_target_: {target}
num_recent: 8 # newest tokens always kept
"""


def new_policy_command(arguments: Sequence[str]) -> int:
    """Write the two files of a new policy and return 0. Raises: ConfigError, one line, before anything is written."""
    parser = Parser(prog="kvbench new-policy", description="Write a policy's class and yaml, and say what to run next.")
    parser.add_argument("name", metavar="NAME", help="small letters, digits and _, as in policy=NAME")
    parser.add_argument("--like", metavar="POLICY", help="begin with the class and yaml of this one; kvbench policies")
    parser.add_argument("--config-dir", metavar="DIR", help="write DIR/policy/NAME.yaml, and NAME.py beside DIR")
    args = parser.parse_args(list(arguments))
    name: str = args.name
    known = names_in("policy")
    if args.like is not None:
        check_known("--like", args.like, known)
    _check_name(name, known, own=args.config_dir is not None)
    module, yaml, target = _places(name, args.config_dir)
    for path in (module, yaml):
        if path.exists():
            raise ConfigError(f"{path} is there already; choose another name, or remove it first")
    title = "".join(part.capitalize() for part in name.split("_"))
    text, settings = _texts(args.like, title, f"{target}.{title}")
    for folder in (module.parent, yaml.parent):
        make_folder(folder)
    write_new(module, text.encode())
    write_new(yaml, settings.encode())
    flag = f" --config-dir {args.config_dir}" if args.config_dir is not None else ""
    print(f"wrote {module} and {yaml}; say in both what stays and where it comes from, then run")
    print(f"  kvbench check-policy {name}{flag}")
    print(f"  kvbench{flag} -m policy=full,h2o,{name} budget.fraction=0.2,0.5")
    if not flag:
        print(f"  make test, whose contract has {name} in it; kvbench policies --update . for the lists in the pages")
    return 0


def _check_name(name: str, known: Sequence[str], *, own: bool) -> None:
    """Raise ConfigError for a name that no policy may have, or that one has."""
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ConfigError(
            f"the name is {name!r:.60}; it must be a word of small letters, digits and _ that begins with a letter and "
            "is no word of Python's, as h2o or my_policy"
        )
    if name in known:
        raise ConfigError(f"there is a policy {name} already; choose another name, and --like {name} to begin with it")
    if own and find_spec(name) is not None:
        raise ConfigError(f"Python has a module {name} already, which would be found instead; choose another name")


def _places(name: str, config_dir: str | None) -> tuple[Path, Path, str]:
    """Return the files of class and yaml, and the module's name. Raises: ConfigError outside a checkout."""
    if config_dir is not None:
        folder = Path(config_dir)
        existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        if not existing.is_dir():
            raise ConfigError(f"--config-dir is {config_dir}, but {existing} is no folder; give one, as conf")
        beside = folder.parent if folder.name not in ("", "..") else folder.resolve().parent
        return beside / f"{name}.py", folder / "policy" / f"{name}.yaml", name
    conf = Path(str(files("kvbench.conf")))
    checkout = conf.parent
    if not (checkout / "policies" / "__init__.py").is_file() or not (checkout / "pyproject.toml").is_file():
        raise ConfigError(
            "this kvbench is installed without its checkout, so a policy goes into a folder of your own; add "
            f"--config-dir conf, which writes {name}.py and conf/policy/{name}.yaml here"
        )
    return checkout / "policies" / f"{name}.py", conf / "policy" / f"{name}.yaml", f"kvbench.policies.{name}"


def _texts(like: str | None, title: str, target: str) -> tuple[str, str]:
    """Return the text of class and yaml, those of `like` under a new name where one is given."""
    if like is None:
        return _CLASS.format(title=title), _YAML.format(title=title, target=target)
    lines = (files("kvbench.conf") / "policy" / f"{like}.yaml").read_text(encoding="utf-8").splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("_target_: "))
    module, _, kind = lines[first].removeprefix("_target_: ").strip().rpartition(".")
    lines = [f"# {title}: say what stays, and its source (arXiv number). Begun as {like}.", f"_target_: {target}"] + [
        line for index, line in enumerate(lines) if index != first and not line.startswith("# ")
    ]
    relative = f"{module.removeprefix('kvbench.policies.').replace('.', '/')}.py"
    source = (files("kvbench.policies") / relative).read_text(encoding="utf-8")
    return _renamed(source, kind, title, like, module.rpartition(".")[0]), "\n".join(lines) + "\n"


def _renamed(source: str, kind: str, title: str, like: str, package: str) -> str:
    """Return a module with its class renamed, absolute imports, and docstrings that ask for what they should say."""
    tree = ast.parse(source)
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind]
    asked = {
        tree.body[0].lineno: (tree.body[0].end_lineno, f'"""{title}: say in a line what it is."""'),
        found.body[0].lineno: (
            found.body[0].end_lineno,
            '    """Say what stays, where it comes from (arXiv number, equation), and where this differs from it.\n\n'
            f'    Begun as {like}.\n    """',
        ),
    }
    tokens = [
        token._replace(string=title) if token.type == tokenize.NAME and token.string == kind else token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
    ]
    lines = _untokenized(tokens, source)
    for first, (last, text) in sorted(asked.items(), reverse=True):
        lines[first - 1 : last] = text.split("\n")
    return re.sub(r"^from \.(\w+) import", rf"from {package}.\1 import", "\n".join(lines) + "\n", flags=re.MULTILINE)


def _untokenized(tokens: Sequence[tokenize.TokenInfo], source: str) -> list[str]:
    """Return the lines of a source in which some names were replaced; everything else stays where it is."""
    lines = source.splitlines()
    for token in reversed(tokens):
        if token.type == tokenize.NAME:
            (row, start), (_, end) = token.start, token.end
            lines[row - 1] = lines[row - 1][:start] + token.string + lines[row - 1][end:]
    return lines
