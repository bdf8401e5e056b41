"""Find the entry with a given number of older ones, without sorting: halve the range of positions."""

# mypy: ignore-errors
# Kernels are written in Triton's language, not Python's.

import triton
import triton.language as tl


@triton.jit
def find_rank(position, rank, slot, capacity, BLOCK_C: tl.constexpr):
    """slot (pair,): where the held entry lies whose position is the (rank + 1)-th smallest."""
    pair = tl.program_id(0)
    base = position + pair.to(tl.int64) * capacity
    wanted = tl.load(rank + pair) + 1
    c = tl.arange(0, BLOCK_C)
    newest = tl.full((BLOCK_C,), -1, tl.int64)
    for start in range(0, capacity, BLOCK_C):
        newest = tl.maximum(newest, tl.load(base + start + c, mask=start + c < capacity, other=-1))
    low = tl.max(newest, 0) * 0
    high = tl.max(newest, 0)
    while low < high:
        middle = (low + high) // 2
        count = tl.zeros((BLOCK_C,), tl.int64)
        for start in range(0, capacity, BLOCK_C):
            p = tl.load(base + start + c, mask=start + c < capacity, other=-1)
            count += ((p >= 0) & (p <= middle)).to(tl.int64)
        enough = tl.sum(count, 0) >= wanted
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    found = tl.zeros((BLOCK_C,), tl.int64)
    for start in range(0, capacity, BLOCK_C):
        p = tl.load(base + start + c, mask=start + c < capacity, other=-1)
        found = tl.where(p == low, (start + c).to(tl.int64), found)
    tl.store(slot + pair, tl.max(found, 0))
