"""How many prompts are decoded together where `batch_size` is `auto`: as many as surely fit, and no more than pay.

Numbers do not depend on it but for rounding, so a key says `auto` and a record how many it was. What a prompt takes is
estimated from the model's config and from what the cells do with it: the recorded prompt that they share, the caches
that are alive at once, statistics, activations and logits. A power of two is taken, so that a little more or less
memory changes nothing, and the prompts are spread evenly, so that few batches are of another shape than the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from kvbench.cache import Needs, Policy, When
from kvbench.cache.policy import needs_of, steps_between_cuts
from kvbench.models.devices import free_bytes as of_the_device
from kvbench.models.loader import LoadedModel
from kvbench.sweep.cell import Cell
from kvbench.tasks.task import BatchTask

_USED_FRACTION = 0.5  # of the free memory: captured steps may keep a quarter, and a vision tower is not in the estimate
_FIXED_BYTES = 2**30  # chunks of logits, blocks of attention, kept logits of the full cache
_MOST_ON_CPU = 32  # from here on a step takes nearly twice the time for twice the prompts
_MOST_ON_GPU = 64  # rows that the kernels of a decode step are made for (kernels.dispatch.MAX_ROWS)
_LARGER = 2  # times as many where every answer goes through the model in chunks, whose kernels know no largest batch


def auto_batch_size(
    loaded: LoadedModel, cells: Sequence[Cell], prompt_tokens: Collection[int], *, free_bytes: int | None = None
) -> int:
    """Return the batch size of `cells`, which share their prompts of so many tokens each.

    free_bytes: memory for all of it, that of the devices if not given.
    """
    if free_bytes is None:  # layers are shared out evenly: the fullest device is the limit
        free_bytes = len(loaded.devices) * min(map(of_the_device, loaded.devices))
    room = (free_bytes * _USED_FRACTION - _FIXED_BYTES) / _prompt_bytes(loaded, cells, max(prompt_tokens, default=1))
    most = _MOST_ON_CPU if loaded.device.type == "cpu" else _MOST_ON_GPU
    if not any(_steps(cell) for cell in cells):
        most *= _LARGER
    size = 1
    while 2 * size <= min(room, most):
        size *= 2
    num_batches = max(1, -(-len(prompt_tokens) // size))
    return max(1, -(-len(prompt_tokens) // num_batches))


def _steps(cell: Cell) -> bool:
    """Whether the quality passes of a cell feed single tokens; otherwise every answer is known and goes in chunks."""
    evicts = steps_between_cuts(cell.setting.policy) is not None
    return any(isinstance(task, BatchTask) and (evicts or task.generates) for task in cell.tasks.values())


def _prompt_bytes(loaded: LoadedModel, cells: Sequence[Cell], prompt: int) -> int:
    """Return what one prompt of `prompt` tokens takes at most, over all layers."""
    config = loaded.model.config.get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    number_bytes = loaded.model.dtype.itemsize
    entry_bytes = 2 * layers * heads * head * number_bytes
    whole = prompt + max((_new_tokens(cell) for cell in cells), default=0)
    held = [_most_entries(cell, prompt, whole) for cell in cells]
    caches = whole + max(held, default=0)  # the full cache's, to compare with; captured steps keep theirs elsewhere
    activations = prompt * (6 * width + 3 * getattr(config, "intermediate_size", 4 * width)) * number_bytes
    statistics = 4 * prompt * layers * heads * _recorded_rows(cell.setting.policy for cell in cells)
    heard = any(Needs.HIDDEN in needs_of(cell.setting.policy) for cell in cells)
    hidden = prompt * layers * width * number_bytes * heard
    logits = 4 * 4 * config.vocab_size
    return int((prompt + caches) * entry_bytes + activations + statistics + hidden + logits)


def _most_entries(cell: Cell, prompt: int, whole: int) -> int:
    policy, budget = cell.setting.policy, cell.setting.budget
    if not policy.bounded:
        return whole
    entries = min(whole, budget.entries(seen_tokens=whole, prompt_tokens=prompt) + 1)
    if When.PREFILL not in policy.when:
        return max(entries, prompt)
    return entries if When.DECODE in policy.when else min(whole, entries + whole - prompt)


def _recorded_rows(policies: Iterable[Policy]) -> int:
    """Return how many rows of attention over the prompt are recorded for all of them, per layer and head."""
    rows: set[tuple[Needs, int, str, bool]] = set()
    for policy in policies:
        needs, counts = needs_of(policy), {Needs.WINDOW: policy.window_tokens, Needs.PROBS: 1, Needs.MASS: 1}
        for need in needs:
            rows.add((need, counts.get(need, policy.window_tokens), policy.reduction, Needs.MASS in needs))
    return sum(count for _, count, _, _ in rows)


def _new_tokens(cell: Cell) -> int:
    asked: list[Any] = [getattr(task, "max_new_tokens", 0) for task in cell.tasks.values()]
    for example in cell.dataset.examples():
        asked.append(
            example.window.scored_tokens if example.window else len(example.reference.encode(errors="replace"))
        )
    return int(max(asked, default=0))
