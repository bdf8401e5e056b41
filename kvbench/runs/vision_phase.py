"""Find where a picture is encoded inside a model's forward, by hooks that are taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

_TOWERS = ("vision_tower", "vision_model", "visual")
_PROJECTOR = "multi_modal_projector"


@contextmanager
def around_vision(model: nn.Module, phase: AbstractContextManager[None]) -> Iterator[None]:
    """Enter `phase` when the vision tower starts and leave it when its projector, or else it, has ended.

    Nothing happens in a model without a tower. `phase` is entered once at most: a prompt's pictures are
    encoded together.
    """
    parts = {name.rpartition(".")[2]: part for name, part in reversed(list(model.named_modules()))}
    tower = next((parts[name] for name in _TOWERS if name in parts), None)
    if tower is None:
        yield
        return
    running = ExitStack()

    def begin(*arguments: Any) -> None:
        running.enter_context(phase)

    def end(*arguments: Any) -> None:
        running.close()

    hooks = [tower.register_forward_pre_hook(begin), parts.get(_PROJECTOR, tower).register_forward_hook(end)]
    try:
        yield
    finally:
        running.close()
        for hook in hooks:
            hook.remove()
