"""Key norm: keys of small length are those that are attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvbench.cache import ScorePolicy, View
from kvbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KeyNorm(ScorePolicy):
    """Keep the entries whose keys have the smallest L2 norm, per layer and head; nothing is protected.

    Source: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv 2406.11430): small
    norms go with large attention. `keep="large"` is its counterpart, which should fail. A rotation leaves
    lengths as they are. Differs in: every layer is cut, where the paper leaves the first ones whole, which is
    skip_layers=[0,1] and paid for by the other layers here; and at any length, where its code (l2compress at
    6d84d6e) waits for 2,048 tokens and rounds up what stays. KnormPress of kvpress is this score for the prompt
    alone.
    """

    keep: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in ("small", "large"):
            raise ConfigError(f"policy.keep is {self.keep!r}; it must be 'small' or 'large'")

    def score(self, view: View) -> Tensor:
        """Return minus the length of the key, or the length itself."""
        length: Tensor = torch.linalg.vector_norm(view.keys.float(), dim=-1)
        return length if self.keep == "large" else -length
