import pytest
import torch

from resblock_bench.bench.measure.out_of_memory import is_out_of_memory


def wrapped(inner: BaseException) -> RuntimeError:
    error = RuntimeError("backend failed")
    error.inner_exception = inner  # type: ignore[attr-defined]
    return error


def caused(cause: BaseException) -> RuntimeError:
    error = RuntimeError("outer")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (wrapped(torch.OutOfMemoryError("inside")), True),
        (caused(MemoryError()), True),
        (RuntimeError("illegal memory access"), False),
        (ValueError("CUDA error: out of memory"), False),
        (wrapped(ValueError("inside")), False),
    ],
    ids=str,
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_circle_of_causes_ends() -> None:
    error = RuntimeError("a")
    error.__cause__ = error
    assert not is_out_of_memory(error)
