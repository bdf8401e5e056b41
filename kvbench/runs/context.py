"""Do the prompts fit into the model's context, with what comes after them.

Beyond it a model is given positions that it never saw, and what it then says is no policy's doing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kvbench.datasets.base import Example
from kvbench.errors import ConfigError, ModelSupportError
from kvbench.models.chat import next_turn_tokens
from kvbench.models.inputs import GivenPrompts, answer_tokens
from kvbench.models.loader import LoadedModel

if TYPE_CHECKING:
    from kvbench.runs.loop import CacheSetting
    from kvbench.runs.task import Task

BeyondContext = Literal["refuse", "allow"]
BEYOND_CONTEXT: tuple[BeyondContext, ...] = ("refuse", "allow")
_MOST_MARKS = 256  # tokens that a template writes around a turn, and a tokenizer around a text, at most
_STRETCHING = ("linear", "dynamic", "yarn")  # rotary kinds whose factor stands for more context than is written


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a model is made for, from the fields of its config; None where it names no limit.

    `max_position_embeddings` of the text part. Where rotary positions are stretched by a factor it is multiplied, for
    yarn from the original length on, as published configurations mean it; llama3 and longrope write the whole length.
    """
    text = config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
    written = text.get("max_position_embeddings")
    if not isinstance(written, int) or written < 1:
        return None
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _STRETCHING:
        return written
    start = (rope.get("original_max_position_embeddings") if kind == "yarn" else None) or written
    return max(written, int(start * float(rope.get("factor") or 1.0)))


@dataclass(frozen=True, kw_only=True)
class ContextUse:
    """What a cell asks of the model's context: the limit, None without one, and which examples go beyond it.

    beyond: tokens needed, by example id, the most over all tasks. refused: those of them where a task reads text.
    """

    limit: int | None
    longest: int
    beyond: Mapping[str, int]
    refused: Mapping[str, int]
    num_examples: int
    digest: str

    def check(self) -> None:
        """Raise ModelSupportError for prompts beyond the context."""
        if not self.refused:
            return
        name = max(self.refused, key=lambda identity: self.refused[identity])
        raise ModelSupportError(
            f"{len(self.refused)} of {self.num_examples} prompts go beyond the model's context of {self.limit} tokens "
            f"({name} needs {self.refused[name]} with its answer); take shorter ones, or set beyond_context=allow to "
            "measure them all the same, which the record then says"
        )

    def as_record(self) -> dict[str, Any]:
        """Return what a record says of its prompts."""
        return {
            "digest": self.digest,
            "longest_tokens": self.longest,
            "context_tokens": self.limit,
            "num_beyond_context": len(self.beyond),
        }

    def measurement(self) -> dict[str, dict[str, Any]]:
        """Return `num_beyond_context` where there is any, else nothing."""
        if not self.beyond:
            return {}
        entry = {"value": len(self.beyond), "low": None, "high": None, "n": self.num_examples, "unit": "prompts"}
        return {"num_beyond_context": {**entry, "method": f"prompt and answer against {self.limit} tokens"}}


def context_use(
    loaded: LoadedModel,
    examples: Sequence[Example],
    given: GivenPrompts,
    setting: CacheSetting,
    tasks: Mapping[str, Task],
) -> ContextUse:
    """Return what `tasks` under `setting` ask of the context.

    Tasks of time and memory count, but nothing is refused for them: what a step costs does not depend on where a
    token stands.
    """
    limit = context_tokens(loaded.model.config.to_dict())
    longest = max(given.num_tokens.values(), default=0)
    beyond: dict[str, int] = {}
    refused: dict[str, int] = {}
    for task in tasks.values() if limit is not None else ():
        assert limit is not None
        reads = getattr(task, "reads_text", True)
        for example in examples if reads else examples[: getattr(task, "batch_size", len(examples))]:
            prompt = given.num_tokens[example.id]
            after = _after_prompt(loaded, example, task, limit - prompt)
            needed = _positions(prompt, prompt + after, setting, compares=hasattr(task, "max_new_tokens"))
            if needed > limit:
                beyond[example.id] = max(needed, beyond.get(example.id, 0))
                if reads:
                    refused[example.id] = max(needed, refused.get(example.id, 0))
    return ContextUse(
        limit=limit, longest=longest, beyond=beyond, refused=refused, num_examples=len(examples), digest=given.digest
    )


def _after_prompt(loaded: LoadedModel, example: Example, task: Any, room: int) -> int:
    """Return how many tokens `task` feeds after the prompt; the last one of an answer is never fed.

    A text has at most as many tokens as bytes. Where that many fit into the `room` they are not counted one by one.
    """
    new = int(getattr(task, "max_new_tokens", getattr(task, "new_tokens", 0)))
    if getattr(task, "needs_follow_ups", False):
        asked = example.follow_ups[: getattr(task, "max_turns", 1) - 1]
        most = sum(new + _MOST_MARKS + len(turn.question.encode(errors="replace")) for turn in asked) + new
        if most <= room:
            return most
        return sum(new + len(next_turn_tokens(loaded, example, 2 + number)) for number in range(len(asked))) + new - 1
    if getattr(task, "needs_reference", False):
        if example.window is not None:
            return example.window.scored_tokens - 1
        most = _MOST_MARKS + len(example.reference.encode(errors="replace"))
        return most if most <= room else len(answer_tokens(loaded, example)) - 1
    return max(0, new - 1)


def _positions(prompt: int, whole: int, setting: CacheSetting, *, compares: bool) -> int:
    """Return the positions used, of a prompt and of all that is fed.

    The prompt always stands at its own positions. After it, ranks in the cache end at what the budget holds, unless the
    answers are compared with the full cache's, which stand at original ones.
    """
    if setting.positions == "original" or not setting.policy.bounded or compares:
        return whole
    held = setting.budget.entries(seen_tokens=whole, prompt_tokens=prompt) + 1
    return max(prompt, min(whole, held))


def check_windows(config: Mapping[str, Any] | None, examples: Sequence[Example], tasks: Mapping[str, Any]) -> None:
    """Raise ConfigError for windows of running text longer than the context; no tokenizer is needed to know that.

    config: the fields of the model's config, None where it is not at hand.
    """
    limit = None if config is None else context_tokens(config)
    longest = max((example.window.prompt_tokens for example in examples if example.window is not None), default=0)
    if limit is not None and longest > limit and any(getattr(task, "reads_text", True) for task in tasks.values()):
        raise ConfigError(
            f"a prompt of {longest} tokens goes beyond the model's context of {limit}; lower dataset.prompt_tokens, "
            "or beyond_context=allow to measure it all the same, which the record then says"
        )
