"""What an author of policies does: lists them, writes a new one, has its contract checked, lets it learn of a model.

kvbench policies snap --json                         source, parts, what is read and when it is cut
kvbench policies snap --costs                        what each takes on this machine, beside the model
kvbench policies --update .                          the lists in README.md and docs/policies.md of a checkout
kvbench new-policy mine --like snapkv                in a checkout: policies/mine.py and conf/policy/mine.yaml
kvbench new-policy mine --config-dir conf            mine.py beside conf, and conf/policy/mine.yaml
kvbench check-policy mine --config-dir conf          the contract, what it costs, where it stands: under a minute
kvbench check-policy conf/policy/mine.yaml --contract-only
kvbench calibrate q_filters model=smollm2-135m dataset=wikitext2 dataset.path=FILE
"""

from __future__ import annotations

import ast
import gc
import io
import json
import keyword
import os
import re
import sys
import tokenize
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kvbench import installed_version
from kvbench.cli import Parser, names_in
from kvbench.cli.sweep import make_importable, quiet_libraries
from kvbench.config.compose import compose_grid
from kvbench.errors import ConfigError, KvbenchError, check_known, close_matches, missing_path
from kvbench.measures import format_bytes
from kvbench.results.files import make_folder, replace_file, write_new, write_out

if TYPE_CHECKING:
    from kvbench.contract.catalogue import PolicyFacts
    from kvbench.contract.trial import Finding


def policies_command(arguments: Sequence[str]) -> int:
    """Print the policies that `arguments` ask for and return 0. Raises: ConfigError for a word that none has."""
    parser = Parser(
        prog="kvbench policies",
        description="Every policy: source, parts (score, allocation, merge, rhythm), what it reads, when it cuts, "
        "whether the budget is used exactly, and whether it is as described, as released or a baseline.",
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="only policies with it in their line")
    parser.add_argument("--config-dir", metavar="DIR", help="those of DIR/policy too")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all facts as JSON")
    form.add_argument("--markdown", action="store_true", help="the same table in Markdown")
    form.add_argument("--costs", action="store_true", help="measure what each takes on this machine, as Markdown")
    form.add_argument("--update", metavar="CHECKOUT", type=Path, help="make the lists of its pages anew")
    args = parser.parse_args(list(arguments))
    quiet_libraries()
    make_importable([args.config_dir] if args.config_dir else [])
    from kvbench.contract.catalogue import catalogue, full_markdown

    facts = catalogue(args.config_dir)
    if args.update is not None:
        return _update(args.update, facts)
    found = _having(args.words, facts)
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    elif args.markdown:
        print("\n".join(full_markdown(found)))
    elif args.costs:
        _print_costs([one.name for one in found], args.config_dir)
    else:
        _print_table(found)
    return 0


def _having(words: Sequence[str], facts: Sequence[PolicyFacts]) -> list[PolicyFacts]:
    """Return the policies whose line has each of the words. Raises: ConfigError if none has."""
    lines = {one.name: " ".join(map(str, asdict(one).values())).casefold() for one in facts}
    found = [one for one in facts if all(word.casefold() in lines[one.name] for word in words)]
    if not found:
        raise ConfigError(
            f"no policy has {' and '.join(map(repr, words))} in its line; {close_matches(words[0], lines)}"
        )
    return found


def _print_table(facts: Sequence[PolicyFacts]) -> None:
    from rich.console import Console

    from kvbench.contract.catalogue import table
    from kvbench.report.tables import ruled

    heads, rows = table(facts)
    drawn = ruled("", "an empty cell is the common case: uniform, drop, nothing; what each keeps: --json", 2)
    for head in heads:
        drawn.add_column(head, no_wrap=head == "policy")
    for row in rows:
        drawn.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(drawn)


def _print_costs(names: Sequence[str], config_dir: str | None) -> None:
    """Measure policy after policy on the bundled model, and print a row for each as it comes."""
    from kvbench.contract.catalogue import policy_named
    from kvbench.contract.trial import BATCH_SIZE, FRACTION, costs, small_model

    loaded = small_model()
    print(f"{BATCH_SIZE} prompts of scenes, bundled model, {FRACTION:.0%} of the tokens seen, CPU\n")
    print(
        "| policy | reads | per prompt, ms | per step, ms | statistics | keys and values |\n|---|---|---|---|---|---|"
    )
    for name in names:
        try:
            found = costs(policy_named(name, config_dir), loaded)
        except KvbenchError as error:
            print(f"| `{name}` | {' '.join(str(error).split())} | | | | |", flush=True)
            continue
        times = f"{found.prompt_ms:.2f} | {found.step_ms:.3f}"
        held = f"{format_bytes(found.statistics_bytes)} | {format_bytes(found.kv_bytes)}"
        print(f"| `{name}` | {', '.join(found.needs).lower()} | {times} | {held} |", flush=True)


def _update(checkout: Path, facts: Sequence[PolicyFacts]) -> int:
    from kvbench.contract.catalogue import PAGES, filled_page

    for page in (checkout / name for name in PAGES):
        if not page.is_file():
            raise ConfigError(f"--update {checkout} is no checkout: it has no {page.relative_to(checkout)}")
        before = page.read_text(encoding="utf-8")
        after = filled_page(before, facts)
        if after != before:
            replace_file(page, after.encode())
        print(f"{page}: {'made anew' if after != before else 'was current'}")
    return 0


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


_OUTCOMES = {"holds": "holds", "broken": "BROKEN", "not asked": "not asked"}


def check_policy_command(arguments: Sequence[str]) -> int:
    """Try a policy and return 0 if every rule holds, 1 if one is broken. Raises: ConfigError."""
    parser = Parser(
        prog="kvbench check-policy",
        description="Try every rule of the contract on one policy, measure what it costs on this machine, and show "
        "where it stands beside full, h2o, snapkv and random on a dozen scenes. Exit code 1 if a rule is broken.",
    )
    parser.add_argument("policy", metavar="NAME|FILE", help="a policy's name, its yaml, or a .py with one policy class")
    parser.add_argument("--config-dir", metavar="DIR", help="look for DIR/policy/NAME.yaml too")
    parser.add_argument("--contract-only", action="store_true", help="rules alone: no costs, no standing")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    args = parser.parse_args(list(arguments))
    quiet_libraries()
    name, policy = _policy(args.policy, args.config_dir)
    from kvbench.contract.catalogue import reads
    from kvbench.contract.trial import findings

    if reads(policy, "FUTURE"):
        raise ConfigError(f"{name} sees the future, which only a task that knows its tokens can tell; nothing is tried")
    import torch

    torch.set_num_threads(1)  # the tensors are tiny: more threads take longer on a machine that does anything else
    gc.collect()
    gc.freeze()  # one rule looks for what is still alive, and need not look through libraries
    found = []
    for finding in findings(policy):
        found.append(finding)
        if not args.json:
            _print_finding(finding)
    broken = [finding for finding in found if finding.outcome == "broken"]
    told: dict[str, Any] = {"policy": name, "holds": not broken, "rules": [_plain(finding) for finding in found]}
    gc.unfreeze()  # the interpreter ends as it would without
    if not args.json:
        print(_summary(name, found))
    if reads(policy, "ARTEFACT"):  # the contract learns one of random tokens, which says nothing of quality
        told["not_measured"] = f"costs and standing need an artefact: kvbench calibrate {name}, then a sweep"
        if not args.json:
            print(told["not_measured"])
    elif not broken and not args.contract_only:
        told |= _measured(name, policy, show=not args.json)
    if args.json:
        print(json.dumps(told, indent=2))
    return 1 if broken else 0


def _policy(asked: str, config_dir: str | None) -> tuple[str, Any]:
    """Return name and policy of a name, a yaml or a module. Raises: ConfigError, one line."""
    path = Path(asked)
    if path.suffix not in (".py", ".yaml") and asked not in names_in("policy", config_dir):
        compose_grid([f"policy={asked}"], multirun=False, config_dir=config_dir)  # says so before torch is loaded
    from kvbench.contract.catalogue import policy_in_module, policy_named

    if path.suffix not in (".py", ".yaml"):
        make_importable([config_dir] if config_dir else [])
        return asked, policy_named(asked, config_dir)
    if not path.is_file():
        raise ConfigError(f"the policy to check is {asked}, but {missing_path(path)}")
    if path.suffix == ".py":
        make_importable([str(path.absolute().parent / "conf")])
        return path.stem, policy_in_module(path)
    folder = path.absolute().parent.parent
    if path.absolute().parent.name != "policy":
        raise ConfigError(f"{asked} does not lie in a folder named policy; put it there, as DIR/policy/{path.name}")
    make_importable([str(folder)])
    return path.stem, policy_named(path.stem, str(folder))


def _print_finding(finding: Finding) -> None:
    rule = finding.rule
    print(f"{_OUTCOMES[finding.outcome]:<9}  {rule.sentence}")
    print(f"{'':<9}  {finding.line if finding.line else f'because {rule.because}'}", flush=True)


def _summary(name: str, found: Sequence[Finding]) -> str:
    counts = {outcome: sum(one.outcome == outcome for one in found) for outcome in _OUTCOMES}
    cases, seconds = sum(one.num_cases for one in found), sum(one.seconds for one in found)
    return (
        f"\n{name}: {counts['holds']} rules hold, {counts['broken']} broken, {counts['not asked']} not asked of it; "
        f"{cases} cases in {seconds:.0f} s. Not tried here: kernels and captured steps, which need a GPU"
    )


def _plain(finding: Finding) -> dict[str, Any]:
    told = {"rule": finding.rule.name, "sentence": finding.rule.sentence, "because": finding.rule.because}
    return {**told, "outcome": finding.outcome, "line": finding.line, "num_cases": finding.num_cases}


def _measured(name: str, policy: Any, *, show: bool) -> dict[str, Any]:
    """Measure costs and standing, print them as they come, and return them as plain data."""
    from kvbench.contract.trial import FRACTION, NUM_SCENES, costs, neighbours, small_model, standing

    loaded = small_model()
    try:
        cost = costs(policy, loaded)
    except KvbenchError as error:  # the scenes are nothing for it, which is no fault
        why = f"costs and standing are not measured: {' '.join(str(error).split())}"
        if show:
            print(f"\n{why}")
        return {"not_measured": why}
    if show:
        print(
            f"\ncosts, {cost.batch_size} prompts of up to {cost.prompt_tokens} tokens at {FRACTION:.0%} of seen, this "
            f"machine: {cost.prompt_ms:.2f} ms per prompt beside the model, {cost.step_ms:.3f} ms per step; reads "
            f"{', '.join(cost.needs).lower() or 'no attention'}; {format_bytes(cost.statistics_bytes)} beside "
            f"{format_bytes(cost.kv_bytes)} of keys and values"
        )
        print(f"\nperplexity of {NUM_SCENES} scenes on the bundled model at {FRACTION:.0%} (lower is better), 95 %:")
    beside = {one: other for one, other in neighbours().items() if one != name}
    stands: dict[str, Any] = {}
    for one, ppl in standing({name: policy, **beside}, loaded):
        stands[one] = ppl if isinstance(ppl, str) else {"ppl": ppl.value, "low": ppl.low, "high": ppl.high, "n": ppl.n}
        if show:
            text = ppl if isinstance(ppl, str) else f"{ppl.value:.3f} [{ppl.low:.3f}, {ppl.high:.3f}]"
            print(f"  {one:<16} {text}", flush=True)
    return {"costs": asdict(cost), "standing": stands}


_DESCRIPTION = """\
Let a policy learn of a model, from the prompts of a data set, what it reads at every run, and write it into one
safetensors file. It is found again by the policy and the model; policy.artefact=FILE names another one."""
_WORDS = """\
KEY=VALUE is any setting of a cell: model=smollm2-135m dataset=wikitext2 dataset.path=FILE dataset.num_samples=48,
policy.NAME of the policy's own, batch_size, device. Calibrate on other text than you measure on."""
_BATCH = 4  # prompts at once with batch_size=auto: everything is added up, so it changes nothing but rounding


def calibrate_command(arguments: Sequence[str]) -> int:
    """Learn, write the file, and return the exit code. Raises: ConfigError, one line, and what the model raises."""
    parser = Parser(prog="kvbench calibrate", description=_DESCRIPTION, epilog=_WORDS, allow_abbrev=False)
    parser.add_argument("policy", metavar="POLICY", help="a policy that reads an artefact: q_filters")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of model, data set and policy")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it; else into the cache folder")
    parser.add_argument("--config-dir", "-cd", type=os.path.abspath, metavar="DIR", help="your own yamls")
    args = parser.parse_args(list(arguments))
    if "=" in args.policy:
        raise ConfigError(f"{args.policy:.60} stands where the policy's name belongs; kvbench calibrate q_filters ...")
    for word in args.words:
        if "=" not in word:
            raise ConfigError(f"{word:.60} cannot be read as KEY=VALUE; kvbench calibrate --help says how")
    print(f"{args.policy} has learnt from {_calibrated(args)}")
    return 0


def _show(bar: Any, num_done: int) -> None:
    bar.update(num_done - bar.n)


def _calibrated(args: Any) -> str:
    """Do it and return what was read and written."""
    from kvbench.cli.sweep import make_importable, quiet_libraries
    from kvbench.config.compose import compose_grid

    make_importable([args.config_dir] if args.config_dir else [])
    words = [f"policy={args.policy}", *args.words]
    (composed,) = compose_grid(words, multirun=False, config_dir=args.config_dir)
    from kvbench.config.build import build, class_name, source_of
    from kvbench.models.calibration import artefact_content, artefact_path, as_learner, learnt
    from kvbench.models.loader import load_model
    from kvbench.models.spec import ModelSpec
    from kvbench.sweep.cell import resolve_devices

    quiet_libraries()
    policy = as_learner(build(composed.config.policy, "policy"), args.policy)
    asked: ModelSpec = build(composed.config.model, "model", is_a=ModelSpec)
    model, device = resolve_devices(asked, str(composed.config.device))
    dataset = build(composed.config.dataset, "dataset", has=("facts_in",))
    maker = {"policy": class_name(type(policy)), "source": source_of(type(policy))}
    path = args.out or artefact_path(policy, model, maker)
    examples, size = dataset.examples(), composed.config.batch_size
    about = {
        **maker,
        "model": model.fingerprint(),
        "model_name": model.checkpoint_name,
        "dtype": model.dtype,
        "dataset": dataset.fingerprint,
        "dataset_name": getattr(dataset, "label", composed.choices["dataset"]),
        "num_prompts": len(examples),
        "versions": {"kvbench": installed_version(), **{name: version(name) for name in ("torch", "transformers")}},
    }
    if not examples:
        raise ConfigError("the data set has no example; nothing would be learnt")
    print(f"{args.policy} learns of {model.checkpoint_name} from {len(examples)} prompts", file=sys.stderr)
    with tqdm(total=len(examples), unit="prompt", leave=False, disable=None) as bar:
        layers = learnt(
            load_model(model, device),
            policy,
            examples,
            size if isinstance(size, int) else _BATCH,
            on_batch=lambda done: _show(bar, done),
        )
    content = artefact_content(layers, about)
    write_out(path, content)
    return f"{len(examples)} prompts of {about['dataset_name']}; {len(content):,} bytes: {path}"
