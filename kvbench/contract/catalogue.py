"""What there is to know of every policy, read from its yaml, its class and its parts; nothing is listed twice.

The first comment of a yaml says what the policy keeps and where it comes from; what it reads, when it cuts and what its
parts are, the class and the settings say. One function makes the table of every page that shows it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kvbench.cache import Needs, Policy, ScorePolicy, When
from kvbench.cache.policy import check_parts, needs_of, steps_between_cuts, total_of
from kvbench.config.build import build
from kvbench.config.compose import compose_grid
from kvbench.errors import ConfigError, check_known

_PAPER = re.compile(r"\d{4}\.\d{5}|(?:[A-Z]\w+ et al\., )?[A-Z]{3,} \d{4}")
_CODE = re.compile(r"(?:github\.com/)?([\w./-]+ at [0-9a-f]{7,40})")
_RELEASED = re.compile(r"released|'s? code|its code|script|kvpress")
_BLOCK = re.compile(r"(<!-- policies: (\w+) -->\n).*?(<!-- end of policies -->)", re.DOTALL)
_CUTS = {When.BOTH: "prompt and decode", When.PREFILL: "prompt", When.DECODE: "decode"}
PAGES = ("README.md", "docs/policies.md")


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """One line of the list.

    what: the yaml's own first sentence. sources: arXiv numbers, or the code that is followed; empty for what nobody
    published. score, allocation, merge, rhythm: its parts; `own plan`: it is no score policy. cuts: when
    entries go. total: whether the budget is used exactly, never exceeded, or an outcome. status: `as described`,
    `as released`, `baseline`, or `your own` for a yaml of another folder.
    """

    name: str
    what: str
    sources: tuple[str, ...]
    score: str
    allocation: str
    merge: str
    rhythm: str
    needs: tuple[str, ...]
    cuts: str
    total: str
    positions: str
    status: str


def catalogue(config_dir: str | None = None) -> list[PolicyFacts]:
    """Return the facts of every policy, by name; those of `config_dir`/policy too. Raises: ConfigError, one line."""
    return [facts_of(name, config_dir) for name in policy_names(config_dir)]


def policy_names(config_dir: str | None = None) -> list[str]:
    """Return the names of all policies there are."""
    return sorted({*_yamls(_shipped()), *(_yamls(Path(config_dir) / "policy") if config_dir else ())})


def policy_named(name: str, config_dir: str | None = None) -> Policy:
    """Return a policy with the settings of its yaml. Raises: ConfigError, one line."""
    check_known("policy", name, policy_names(config_dir))
    node: Any = OmegaConf.create(_text(name, config_dir))
    if "_target_" not in node or "defaults" in node:  # it is put together from other yamls
        node = compose_grid([f"policy={name}"], multirun=False, config_dir=config_dir)[0].config.policy
    found: Policy = build(node, "policy", is_a=Policy)
    check_parts(found, found.native_positions)
    return found


def policy_in_module(path: Path) -> Policy:
    """Return the one policy of a module, its settings as the class has them. Raises: ConfigError, one line."""
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if module.__file__ is None or Path(module.__file__).resolve() != path.resolve():
        raise ConfigError(f"{path} has the name of another module, {module.__file__}; give it another one")
    kinds = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, Policy)]
    own = [kind for kind in kinds if kind.__module__ == module.__name__]
    if len(own) != 1:
        names = ", ".join(kind.__name__ for kind in own) or "none"
        raise ConfigError(f"{path} has {len(own)} policy classes ({names}); give the yaml that names one of them")
    try:
        return own[0]()
    except TypeError as error:
        raise ConfigError(f"{own[0].__name__} has settings without a default ({error}); give its yaml") from error


def facts_of(name: str, config_dir: str | None = None) -> PolicyFacts:
    """Return the facts of one policy. Raises: ConfigError for an unknown name or a yaml without a first comment."""
    policy, text = policy_named(name, config_dir), _text(name, config_dir)
    comment = " ".join(line[1:].strip() for line in text.splitlines()[:1] if line.startswith("# "))
    if not comment and _is_shipped(name):
        raise ConfigError(f"conf/policy/{name}.yaml begins with no comment; say what the policy keeps, and its source")
    told = _sentences(policy)
    what = comment or told.partition("\n")[0]
    sources = _found(_PAPER, comment) or _found(_PAPER, told)
    released = bool(_RELEASED.search(comment)) or ".released." in type(policy).__module__
    if released:
        sources += tuple(code for code in _found(_CODE, comment) or _found(_CODE, told) if code not in sources)
    status = "as released" if released else "as described" if sources else "baseline"
    is_score = isinstance(policy, ScorePolicy)
    return PolicyFacts(
        name=name,
        what=what,
        sources=sources,
        score=type(policy).__name__ if is_score else "own plan" if policy.bounded else "keeps all",
        allocation=_part(policy, "allocation") or "uniform",
        merge=_part(policy, "merge") or ("own" if "merge_into=" in inspect.getsource(type(policy)) else "drop"),
        rhythm=_rhythm(policy),
        needs=tuple(need.name for need in Needs if need in needs_of(policy) and need.name is not None),
        cuts=_CUTS[policy.when] if policy.bounded else "never",
        total=total_of(policy).replace("_", "-") if policy.bounded else "everything",
        positions=policy.native_positions,
        status=status if _is_shipped(name) else "your own",
    )


def reads(policy: Policy, need: str) -> bool:
    """Return whether a policy or one of its parts declares a need of that name."""
    return Needs[need] in needs_of(policy)


def _shipped() -> Traversable:
    return files("kvbench.conf") / "policy"


def _yamls(folder: Traversable | Path) -> dict[str, Traversable | Path]:
    if not folder.is_dir():
        return {}
    return {one.name.removesuffix(".yaml"): one for one in folder.iterdir() if one.name.endswith(".yaml")}


@cache
def _is_shipped(name: str) -> bool:
    return name in _yamls(_shipped())


def _text(name: str, config_dir: str | None) -> str:
    found = {**(_yamls(Path(config_dir) / "policy") if config_dir else {}), **_yamls(_shipped())}
    return found[name].read_text(encoding="utf-8")


def _sentences(policy: Policy) -> str:
    """Return the docstring of the class."""
    return (type(policy).__doc__ or "").strip()


def _found(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(pattern.findall(text)))


def _part(policy: Policy, name: str) -> str:
    """Return the module of a part, which is its yaml's name as a rule; "" where it is none."""
    part = getattr(policy, name, None) if isinstance(policy, ScorePolicy) else None
    if part is None:
        return ""
    own = [yaml for yaml, file in _yamls(_shipped() / name).items() if f".{type(part).__name__}\n" in file.read_text()]
    return own[0] if own else type(part).__name__


def _rhythm(policy: Policy) -> str:
    steps = steps_between_cuts(policy)
    return "" if steps is None else "each token" if steps == 1 else f"every {steps} tokens"


def table(facts: Sequence[PolicyFacts]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the whole list; what is the common case is left empty."""
    heads = ["policy", "source", "score", "allocation", "merge", "cuts", "reads", "total", "status"]
    rows = [
        [
            one.name,
            ", ".join(one.sources),
            one.score,
            "" if one.allocation == "uniform" else one.allocation,
            "" if one.merge == "drop" else one.merge,
            one.cuts if one.rhythm in ("", "each token") else f"{one.cuts}, {one.rhythm}",
            ", ".join(one.needs).lower(),
            one.total,
            one.status,
        ]
        for one in facts
    ]
    return heads, rows


def full_markdown(facts: Sequence[PolicyFacts]) -> Iterator[str]:
    """Yield the lines of the whole list as a Markdown table."""
    heads, rows = table(facts)
    told = [re.sub(r"^[^:]*arXiv[^:]*: ", "", one.what) for one in facts]
    named = ([f"`{row[0]}`", *row[1:], what.rstrip(".")] for row, what in zip(rows, told, strict=True))
    yield from _markdown([*heads, "what stays"], named)


def short_markdown(facts: Sequence[PolicyFacts]) -> Iterator[str]:
    """Yield the lines of a short list: a row for each kind, names with their papers."""
    kinds: dict[str, list[str]] = {
        "baselines": [],
        "a score, at prompt and decode": [],
        "a score, at the prompt only": [],
        "an allocation of its own": [],
        "a merge of its own": [],
        "what published code does": [],
        "your own": [],
    }
    for one in facts:
        first = next((source for source in one.sources if _PAPER.fullmatch(source)), "")
        paper = first if first[:1].isdigit() or not first else f"({first})"
        kinds[_kind(one)].append(f"`{one.name}` {paper}".strip())
    yield from _markdown(
        ["kind", "policies, with their papers on arXiv"], [[k, ", ".join(v)] for k, v in kinds.items() if v]
    )


def _kind(one: PolicyFacts) -> str:
    if one.status == "your own":
        return one.status
    if one.status != "as described":
        return "baselines" if one.status == "baseline" else "what published code does"
    if one.merge != "drop":
        return "a merge of its own"
    if one.allocation != "uniform":
        return "an allocation of its own"
    return "a score, at the prompt only" if one.cuts == "prompt" else "a score, at prompt and decode"


def _markdown(heads: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join(['---'] * len(heads))}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def filled_page(text: str, facts: Sequence[PolicyFacts]) -> str:
    """Return a page with what stands between `<!-- policies: short -->` (or `full`) and its end made anew."""
    made = {"short": short_markdown, "full": full_markdown}

    def block(found: re.Match[str]) -> str:
        check_known("the list of policies", found[2], made)
        return "".join((found[1], *(line + "\n" for line in made[found[2]](facts)), found[3]))

    return _BLOCK.sub(block, text)
