"""Which fields of a sample a pooled measure divides: the sums over samples, total by weight, not a mean of scores."""

from __future__ import annotations

from collections.abc import Mapping

POOLED: Mapping[str, tuple[str, str]] = {
    "ppl": ("nll_sum", "num_scored_tokens"),
    "ppl_released": ("released_nll_sum", "released_num_scored_tokens"),
    "kl_to_full": ("kl_sum", "num_compared_tokens"),
    "top1_agreement_fraction": ("num_agreeing_tokens", "num_compared_tokens"),
}
