"""How the files are sealed that `kvbench frontier` writes and `kvbench results verify` checks."""

from __future__ import annotations

KIND, VERSION = "kvbench_frontier", 1
