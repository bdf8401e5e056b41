"""What becomes of tokens that a plan merged: they live on as long as the entry does that took them in."""

from __future__ import annotations

import numpy as np

from kvbench.report.autopsy_load import Sample
from kvbench.results.files import Array
from kvbench.results.record import NEVER


def living_on(sample: Sample, step: int) -> Array:
    """(S, H, P) bool: tokens that are gone themselves after `step` answer tokens, but live on in an entry that is held.

    The entry that a token joined may have joined another one in its turn; the last of the chain counts.
    """
    freed = sample.freed[..., : sample.prompt_tokens]
    if sample.merged is None:
        return np.zeros(freed.shape, dtype=bool)
    joined = (sample.merged != NEVER) & (freed <= step)
    last = np.where(joined, sample.merged, np.arange(sample.prompt_tokens)).astype(np.int64)
    for _ in range(sample.prompt_tokens.bit_length()):  # each turn doubles the length of chain that is followed
        last = np.take_along_axis(last, last, axis=-1)
    found: Array = joined & (np.take_along_axis(freed, last, axis=-1) > step)
    return found
