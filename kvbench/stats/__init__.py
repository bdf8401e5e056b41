"""Paired differences, their intervals and what may be said from them: pure functions over arrays."""
