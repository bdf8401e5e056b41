"""An oracle: it is told what the tokens that are scored will look at. No method, but a bound for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When


@dataclass(frozen=True, kw_only=True)
class Oracle(ScorePolicy):
    """Keep of the prompt what the scored tokens attend to most, per layer and head. IT SEES THE FUTURE.

    Source: none; it answers what choosing by attention could reach if the attention to come were known. The scored
    tokens run through the full cache first, and an entry's score is what they give it there. So it holds only where a
    task knows its tokens before the prompt (perplexity, fidelity), is refused elsewhere, and is labelled in every
    record and table. Not a bound on every method: attention in the full cache is not what a cut one gives, values do
    not count, and nothing is merged or divided. Generated tokens all stay.
    """

    needs: ClassVar[Needs] = Needs.FUTURE
    when: ClassVar[When] = When.PREFILL

    def score(self, view: View) -> Tensor:
        """Return the attention to come."""
        return view.future
