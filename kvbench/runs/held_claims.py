"""The claims that this process holds, kept alive while their cells run."""

from __future__ import annotations

import time
from collections.abc import Iterable

from kvbench.results.claims import Claim, Claims

_BEATS_PER_LEASE = 5


class HeldClaims:
    """Takes, beats and releases the claims of a sweep."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._held: dict[str, Claim] = {}
        self._beaten_s = time.monotonic()

    def take(self, keys: Iterable[str], most: int | None) -> list[str]:
        """Take what nobody else works on, `most` at once; return every key that is held now."""
        for key in keys:
            if most is not None and len(self._held) >= most:
                break
            claim = self._claims.take(key) if key not in self._held else None
            if claim is not None:
                self._held[key] = claim
        return list(self._held)

    def due_s(self) -> float | None:
        """Return the seconds until `beat` has something to do; None if nothing is held."""
        if not self._held:
            return None
        return max(0.0, self._beaten_s + self._claims.lease_s / _BEATS_PER_LEASE - time.monotonic())

    def beat(self) -> None:
        """Show others that this process lives; cheap enough to be called all the time."""
        if self.due_s() == 0.0:
            self._beaten_s = time.monotonic()
            for claim in self._held.values():
                claim.beat()

    def release(self, keys: Iterable[str]) -> None:
        """Let cells go that have ended, or that are left to others."""
        for key in list(keys):
            claim = self._held.pop(key, None)
            if claim is not None:
                claim.release()

    def release_all(self) -> None:
        """Let everything go."""
        self.release(list(self._held))
