"""Triton kernels with their plain-torch references beside them; `dispatch` says which of the two runs."""
