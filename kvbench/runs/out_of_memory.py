"""What an exception says of the process: that memory ran out, in whichever words, or that CUDA has given up."""

from __future__ import annotations

_CLASSES = (
    "OutOfMemoryError",
    "MemoryError",
)  # torch's own class is found by name, so that nobody imports torch for it
_TEXTS = (  # of a RuntimeError: torch on the CPU, the CUDA runtime, triton's launcher and the matrix library
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_POISONED = "CUDA error"  # after one of these every later call of the process fails too


def ran_out_of_memory(exception: BaseException) -> bool:
    """Return whether memory ran out, on a device or on the host."""
    if any(kind.__name__ in _CLASSES for kind in type(exception).__mro__):
        return True
    return isinstance(exception, RuntimeError) and any(text in str(exception) for text in _TEXTS)


def is_poisoned(message: str) -> bool:
    """Whether an error with this message leaves a process in which nothing works any more."""
    return _POISONED in message
