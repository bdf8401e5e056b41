"""Attention told what it sees: the contract's reference, under the name tests know."""

from __future__ import annotations

from kvbench.contract.reference import Sees as Sees
from kvbench.contract.reference import rotated as rotated
from kvbench.contract.reference import visible_entries as visible_entries
from kvbench.contract.reference import visible_logits as visible_logits
