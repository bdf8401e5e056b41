"""`kvbench calibrate`: let a policy learn of a model, from the prompts of a data set, what it reads at every run.

kvbench calibrate q_filters model=smollm2-135m dataset=wikitext2 dataset.path=FILE
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvbench import installed_version
from kvbench.cli import Parser
from kvbench.errors import ConfigError
from kvbench.results.files import write_out

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
