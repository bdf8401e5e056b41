"""Is a worker too slow with a cell, or silent? Decided from the times its own messages carry."""

from __future__ import annotations

from dataclasses import dataclass, field

_SELDOM_S = 60.0
_BEATS_PER_SILENCE = 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """timeout_s: time that one cell may take in all; silence_s: time without any step. None: no limit."""

    timeout_s: float | None
    silence_s: float | None

    @property
    def beat_every_s(self) -> float:
        """How often a worker has to say that it works: often enough to be believed, and no more than once a minute."""
        return _SELDOM_S if self.silence_s is None else min(_SELDOM_S, self.silence_s / _BEATS_PER_SILENCE)


@dataclass(kw_only=True)
class Watchdog:
    """Follows one worker; times are those of the machine's steady clock, in seconds."""

    limits: Limits
    now_s: float
    spent_s: dict[str, float] = field(default_factory=dict)
    active: tuple[str, str] | None = None
    waits: bool = False

    def __post_init__(self) -> None:
        self._heard_s = self._counted_s = self.now_s

    def hear(self, at_s: float) -> None:
        """Note a message: the time since the last one belongs to the active cell."""
        if self.active is not None:
            key = self.active[0]
            self.spent_s[key] = self.spent_s.get(key, 0.0) + max(0.0, at_s - self._counted_s)
        self._heard_s, self._counted_s = max(at_s, self._heard_s), at_s

    def start(self, key: str, phase: str, at_s: float) -> None:
        """Note that `phase` of the cell `key` begins."""
        self.hear(at_s)
        self.active, self.waits = (key, phase), False

    def end(self, at_s: float) -> None:
        """Note that no cell is active."""
        self.hear(at_s)
        self.active, self.waits = None, False

    def wait(self) -> None:
        """Note that the worker waits for its parent: until `resume` no time is its own."""
        self.waits = True

    def resume(self, now_s: float) -> None:
        """Note that the parent has answered."""
        self.waits = False
        self._heard_s = self._counted_s = now_s

    def deadline_s(self) -> float | None:
        """Return the time after which `complaint` has something to say if nothing more is heard; None for never."""
        if self.waits:
            return None
        times = [] if self.limits.silence_s is None else [self._heard_s + self.limits.silence_s]
        if self.active is not None and self.limits.timeout_s is not None:
            times.append(self._counted_s + self.limits.timeout_s - self.spent_s.get(self.active[0], 0.0))
        return min(times, default=None)

    def complaint(self, now_s: float) -> str | None:
        """Return why the worker must go, or None."""
        if self.waits:
            return None
        silent_s = now_s - self._heard_s
        if self.limits.silence_s is not None and silent_s > self.limits.silence_s:
            return (
                f"no step for {silent_s:.0f} s; the limit is silence_s={self.limits.silence_s:g}; if it was at work, "
                "raise worker.silence_s"
            )
        if self.active is None or self.limits.timeout_s is None:
            return None
        spent_s = self.spent_s.get(self.active[0], 0.0) + now_s - self._counted_s
        if spent_s > self.limits.timeout_s:
            return f"{spent_s:.0f} s in this cell; the limit is timeout_s={self.limits.timeout_s:g}"
        return None
