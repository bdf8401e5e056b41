"""StreamingLLM with the sizes of its authors' perplexity script."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvbench.cache import ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class StreamingLLMReleased(ScorePolicy):
    """StreamingLLM as released (github.com/mit-han-lab/streaming-llm at 2e50426, eval_long_ppl.py).

    Its cache holds `num_sinks` first tokens and a window of fixed size: 1 + 255 in the perplexity script,
    which is budget=tokens budget.tokens=256, and 4 + 2000 in the chatbot. The paper has 4 sinks, and
    reports that 1 is much worse; with num_sinks=4 this is the policy `streaming_llm`.
    """

    native_positions: ClassVar[Literal["original", "in_cache", "released"]] = "in_cache"

    num_sinks: int = 1

    def score(self, view: View) -> Tensor:
        """Newer is better."""
        return view.position.float()
