"""How a model is driven through a cache: what the contract does it by, under the name tests know."""

from __future__ import annotations

from kvbench.contract.driving import Held as Held
from kvbench.contract.driving import Trace as Trace
from kvbench.contract.driving import drive as drive
from kvbench.contract.driving import held_positions as held_positions
from kvbench.contract.driving import repeat_where_asked as repeat_where_asked
from kvbench.contract.driving import storage_bytes as storage_bytes
from kvbench.contract.driving import tensors_of as tensors_of
