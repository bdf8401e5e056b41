"""Give memory back between measurements."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Give back what is no longer used, so that the next measurement starts clean."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
