"""The planned batches of a data set, and one prefill of each for all cells and tasks that share it.

Only the part in use is alive: its prompt state holds the uncompressed prompt of every layer. What is
computed once for all cells of a group (a self-check, the full cache's distributions) is kept by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kvbench.cache import Policy
from kvbench.datasets.base import Example
from kvbench.models.inputs import PromptBatch, by_question_length, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.tasks.decode import CacheSetting, Decoding

if TYPE_CHECKING:
    from kvbench.cache.counts import OnPlan
    from kvbench.cache.recording import PromptRecorder


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """Examples of one batch; the last `num_question_tokens` of each prompt follow as a second chunk."""

    examples: Sequence[Example]
    num_question_tokens: int


class Part:
    """One planned batch. `policies` None: nothing is shared, every decoding runs its own prefill."""

    def __init__(self, loaded: LoadedModel, planned: Planned, number: int, policies: Sequence[Policy] | None) -> None:
        self.number = number
        self.examples = planned.examples
        self.batch: PromptBatch = prompt_batch(
            loaded, planned.examples, num_question_tokens=planned.num_question_tokens
        )
        self._loaded = loaded
        self._policies = policies
        self._kept: dict[Hashable, Any] = {}

    @property
    def shares(self) -> bool:
        """Whether other cells use this part too."""
        return self._policies is not None

    @torch.inference_mode()
    def decoding(self, setting: CacheSetting, reserve_tokens: int, *, on_plan: OnPlan | None = None) -> Decoding:
        """Return the batch after its prompt, under `setting`; the numbers are the same shared or not."""
        loaded, batch = self._loaded, self.batch
        if self._policies is None:
            return setting.decoding(loaded, batch, reserve_tokens, on_plan=on_plan)
        from kvbench.cache.recording import cache_after  # needs transformers

        recorder, logits = self.once("prompt", self._record)
        cache = cache_after(recorder.prompt, setting.cache(loaded, batch, reserve_tokens, on_plan=on_plan))
        return setting.decoding_with(loaded, batch, cache, prompt_logits=logits)

    def _record(self) -> tuple[PromptRecorder, torch.Tensor]:
        assert self._policies is not None
        from kvbench.cache.recording import PromptRecorder

        recorder = PromptRecorder(self._loaded.model, self._policies)
        return recorder, Decoding(self._loaded, replace(self.batch, question_ids=None), recorder).logits

    def once(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """Return what `compute` gave first; computed again each time where nothing is shared."""
        if self._policies is None:
            return compute()
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]


class Prompts:
    """All planned batches; membership depends on the list of examples only.

    Where the question is hidden, only examples whose questions have equally many tokens share a batch.
    share: the policies of all cells that share the prompts; None when nothing is shared.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        batch_size: int,
        *,
        share: Sequence[Policy] | None = None,
        query_visible: bool = True,
    ) -> None:
        self._loaded = loaded
        groups = {0: examples} if query_visible else by_question_length(loaded, examples)
        self._parts = [
            Planned(examples=group[start : start + batch_size], num_question_tokens=length)
            for length, group in groups.items()
            for start in range(0, len(group), batch_size)
        ]
        self._policies = share
        self._part: Part | None = None
        self._kept: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def part(self, number: int) -> Part:
        """Return the batch `number`; the part returned before is let go."""
        if self._part is None or self._part.number != number:
            self._part = None
            self._part = Part(self._loaded, self._parts[number], number, self._policies)
        return self._part

    def once(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """Return what `compute` gave first, for all parts, tasks and cells that share these prompts."""
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    def forget(self) -> None:
        """Let the part in use go, with everything that is kept for it."""
        self._part = None
