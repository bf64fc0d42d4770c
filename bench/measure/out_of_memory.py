"""Recognises that memory ran out, whatever the library called it."""

import torch

_TEXTS = (
    "DefaultCPUAllocator: can't allocate",
    "could not create a primitive",  # oneDNN, of its scratch memory
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one that it wraps, says that an allocation failed."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        if isinstance(found, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(found, RuntimeError) and any(text in str(found) for text in _TEXTS):
            return True
        seen.append(found)
        # torch.compile keeps what a backend raised as an attribute.
        inner = getattr(found, "inner_exception", None)
        found = inner if isinstance(inner, BaseException) else found.__cause__
    return False
