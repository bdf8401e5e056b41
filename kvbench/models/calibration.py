"""Calibration: a model is given a data set, and a policy learns from its queries and keys what it then always reads.

Where the artefact lies if nobody says where, whether one belongs to a model and a policy, and how it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvbench.cache import Calibrated, Layout, Needs, Policy
from kvbench.cache.artefact import SUFFIX, ArtefactFile, artefact_bytes, checked_layers, named_tensors, read_artefact
from kvbench.datasets.base import Example
from kvbench.errors import ConfigError
from kvbench.models.gguf import cache_folder
from kvbench.models.inputs import prompt_batch, repeat_instruction
from kvbench.models.loader import LoadedModel
from kvbench.models.spec import ModelSpec

_DIGITS = 16


def artefact_path(policy: Calibrated, model: ModelSpec, maker: Mapping[str, str]) -> Path:
    """Return where the artefact of `policy` for `model` lies if nobody says where.

    maker: the policy's class by name (`policy`) and the hash of its source (`source`), which `stored_artefact` checks.
    """
    name = re.sub(r"[^\w.-]+", "-", f"{type(policy).__name__}-{maker['source']}")
    place = re.sub(r"[^\w.-]+", "-", model.fingerprint())[-5 * _DIGITS :]
    return cache_folder() / "artefacts" / name / f"{place}{SUFFIX}"


def stored_artefact(path: Path, model: ModelSpec, maker: Mapping[str, str], command: str) -> ArtefactFile:
    """Return the file at `path`. Raises: ConfigError, one line, unless it is of `model` and `maker`.

    command: what makes it.
    """
    kind = maker["policy"].rpartition(":")[2]
    if not path.is_file():
        raise ConfigError(f"{kind} needs an artefact, and {path} is not there; run `{command}`")
    stored = read_artefact(path)
    found, asked = stored.about.get("model"), model.fingerprint()
    if found != asked:
        raise ConfigError(
            f"the artefact {path} is of the model {stored.about.get('model_name')!s:.60} ({found!s:.60}), and this "
            f"one, {model.checkpoint_name}, is {asked:.60}; run `{command}`, or give policy.artefact of this model"
        )
    for name, value in maker.items():
        if stored.about.get(name) != value:
            raise ConfigError(
                f"the artefact {path} was made by {stored.about.get('policy')!s:.60} of source "
                f"{stored.about.get('source')!s:.60}, and {kind} is now of source {maker['source']}; run `{command}`"
            )
    return stored


def as_learner(policy: Policy, name: str) -> Calibrated:
    """Return `policy`, called `name`, if it reads an artefact. Raises: ConfigError."""
    if not isinstance(policy, Calibrated):
        raise ConfigError(
            f"policy={name} reads no artefact, so there is nothing to calibrate; it needs a policy whose yaml has the "
            "setting artefact, such as q_filters"
        )
    return policy


def artefact_content(layers: Sequence[Mapping[str, Tensor]], about: Mapping[str, Any]) -> bytes:
    """Return the bytes of the file that holds what was learnt, and what it says of itself."""
    return artefact_bytes(layers, about)


@torch.inference_mode()
def learnt(
    loaded: LoadedModel,
    policy: Calibrated,
    examples: Sequence[Example],
    batch_size: int,
    *,
    on_batch: Callable[[int], None] = lambda num_done: None,
) -> list[Mapping[str, Tensor]]:
    """Return the tensors of each layer that `policy` learns from the prompts of `examples`.

    on_batch: told after each batch how many examples are done. Raises: ConfigError for what the policy gave, DataError
    and ModelSupportError as a prompt does.
    """
    from kvbench.cache.attention import cache_argument  # needs transformers
    from kvbench.cache.recording import CalibrationCache
    from kvbench.cache.second_pass import read_again

    if Needs.REPEATED in policy.learns_from and any(example.load_image is not None for example in examples):
        raise ConfigError(
            f"{type(policy).__name__} learns from prompts that are repeated in words, and the data set shows pictures; "
            "calibrate it on text"
        )
    sums: list[dict[str, Tensor]] = [{} for _ in range(Layout.of(loaded.model).num_layers)]
    for start in range(0, len(examples), batch_size):
        batch = prompt_batch(loaded, examples[start : start + batch_size])
        cache = CalibrationCache(loaded.model, policy)
        argument = cache_argument(loaded.model, cache)
        loaded.model(**batch.tensors, position_ids=batch.position_ids, **argument, use_cache=True, logits_to_keep=1)
        if cache.awaits_second_pass:
            read_again(
                loaded.model,
                cache,
                batch.tensors["input_ids"],
                batch.tensors["attention_mask"],
                last_position=batch.last_position_ids,
                instruction=repeat_instruction(loaded),
            )
        for total, layer in zip(sums, cache.gathered, strict=True):
            for name, one in layer.items():
                total[name] = one if name not in total else policy.together(total[name], one)
        on_batch(min(start + batch_size, len(examples)))
    layers = [policy.learn(total) for total in sums]
    checked_layers(policy, named_tensors(layers), Layout.of(loaded.model), f"what {type(policy).__name__} learnt")
    return layers
