"""Triton kernels, each with its launcher; `dispatch` says whether work goes to them or to plain torch."""
