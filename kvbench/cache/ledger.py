"""Counts per row, kept on the host: tokens seen, entries held, entries allowed.

They follow from the lengths of what went in, so deciding whether a step is over budget never waits
for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from kvbench.cache.budget import Budget
from kvbench.cache.policy import Policy
from kvbench.cache.view import When
from kvbench.errors import ModelSupportError


@dataclass(kw_only=True, slots=True)
class Ledger:
    """One layer's counts; every list has one number per row of the batch.

    `held` is the largest count over the heads of the row. `settled_*` are the counts when the last
    chunk of several tokens was settled. `padded_tokens` counts pads too, the same for all rows. `prompt` is what
    came first, or the first `prompt_tokens` with pads if that is more; tokens before `prompt_until_tokens` are
    planned as a prompt, even one by one. most_tokens: how many a row may see, where a position mode holds no further.
    """

    policy: Policy
    budget: Budget
    prompt: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    settled_seen: list[int] = field(default_factory=list)
    settled_held: list[int] = field(default_factory=list)
    padded_tokens: int = 0
    prompt_tokens: int = 0
    prompt_until_tokens: int = 0
    most_tokens: int | None = None

    @property
    def steps_since_settled(self) -> int:
        """Tokens that came one by one after the last chunk."""
        return self.seen[0] - self.settled_seen[0] if self.settled_seen else 0

    def is_decode_step(self, num_tokens: int) -> bool:
        """Return whether `num_tokens` more are a generated token: one, after the prompt, where every row has begun.

        Until then a single token may be a pad, or the last piece of a prompt.
        """
        return (
            num_tokens == 1
            and bool(self.seen)
            and min(self.seen) > 0
            and self.padded_tokens >= self.prompt_until_tokens
        )

    def arrive(self, added: list[int]) -> None:
        """Count `added` new tokens per row, pads left out. Raises: ModelSupportError for more than `most_tokens`."""
        empty = [0] * len(added)
        self.seen = [old + plus for old, plus in zip(self.seen or empty, added, strict=True)]
        self.held = [old + plus for old, plus in zip(self.held or empty, added, strict=True)]
        in_pieces = 0 < self.padded_tokens <= self.prompt_tokens
        before = empty if in_pieces else self.prompt or empty
        self.prompt = [old or seen for old, seen in zip(before, self.seen, strict=True)]
        if self.most_tokens is not None and max(self.seen) > self.most_tokens:
            raise ModelSupportError(
                f"a row has seen {max(self.seen)} tokens, but away from positions=original this model's rotation holds "
                f"up to its training length of {self.most_tokens}; use shorter texts, or positions=original"
            )

    def begin_chunk(self, added: list[int]) -> None:
        """Count a chunk of several tokens; it is planned as a prompt, under the plain budget."""
        self.settled_seen, self.settled_held = [], []
        self.arrive(added)

    def settle(self, held: list[int]) -> None:
        """Note what a chunk left behind."""
        self.held, self.settled_held, self.settled_seen = list(held), list(held), list(self.seen)

    def evicted(self) -> None:
        """Note that every row over its budget lost one entry."""
        self.held = [min(h, max(a, h - 1)) for h, a in zip(self.held, self.allowed(), strict=True)]

    def replay(self) -> None:
        """Count a decode step that the device did by itself: the token that arrived, and the victim."""
        self.padded_tokens += 1
        self.arrive([1] * len(self.seen))
        self.evicted()

    def over(self) -> bool:
        """Return whether any row holds more than it may."""
        return any(h > a for h, a in zip(self.held, self.allowed(), strict=True))

    def allowed(self, *, ahead_tokens: int = 0) -> list[int]:
        """Return the entries each row may hold once `ahead_tokens` more tokens were seen.

        A policy that cuts only the prompt lets generated tokens stay; one that cuts only at decode
        keeps what the prompt left.
        """
        if not self.policy.bounded:
            return [seen + ahead_tokens for seen in self.seen]
        entries = self._entries([seen + ahead_tokens for seen in self.seen])
        if not self.settled_seen or self.policy.when is When.BOTH:
            return entries
        return [self._after_settling(row, self.seen[row] + ahead_tokens, entries[row]) for row in range(len(entries))]

    def allowed_after_prompt(self) -> list[int]:
        """Return the entries each row was allowed when it had seen its first prompt."""
        return self._entries(self.prompt) if self.policy.bounded else list(self.prompt)

    def _entries(self, seen: list[int]) -> list[int]:
        released = self.policy.counts_as_released
        return [_entries(self.budget, one, prompt, released) for one, prompt in zip(seen, self.prompt, strict=True)]

    def _after_settling(self, row: int, seen: int, entries: int) -> int:
        if seen > self.settled_seen[row] and When.DECODE not in self.policy.when:
            return self.settled_held[row] + seen - self.settled_seen[row]
        if seen > self.settled_seen[row] and When.PREFILL not in self.policy.when:
            return max(entries, self.settled_held[row])
        return entries


@lru_cache(maxsize=4096)
def _entries(budget: Budget, seen_tokens: int, prompt_tokens: int, released: bool) -> int:
    """Ask once for what every layer of a step asks for again."""
    count = budget.entries_as_released if released else budget.entries
    return count(seen_tokens=seen_tokens, prompt_tokens=prompt_tokens)
