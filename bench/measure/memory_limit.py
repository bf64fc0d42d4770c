"""How much memory a CPU cell may take.

A cell that wants more than there is would be ended by the kernel's out-of-memory killer, and maybe
not it alone. Under a limit its allocation fails instead, with PyTorch's own error.

The limit is RLIMIT_DATA, on private writable memory, which the kernel counts as VmData. RLIMIT_AS
would also count what only takes up addresses: shared libraries, files mapped read-only, and the
64 MiB that the C library sets apart for every thread's heap.
"""

import resource
from pathlib import Path

import torch

from resblock_bench.bench.machine.proc import ROOT, field

_DEFAULT_STACK = 8 * 2**20
_SPARE_THREADS = 2  # beside PyTorch's own: autograd's, a progress thread's


def limit_memory(bytes_: int, root: Path = ROOT) -> bool:
    """Let this process allocate `bytes_` more than it has now; whether the system can do that.

    The stacks of threads yet to be started come on top: all of a stack counts as allocated, though
    next to nothing of it is ever used.
    """
    held = field(root / "proc/self/status", "VmData")
    if held is None:
        return False
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held * 1024 + bytes_ + _stack_bytes()
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return True


def _stack_bytes() -> int:
    each, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if each == resource.RLIM_INFINITY:
        each = _DEFAULT_STACK
    return each * (torch.get_num_threads() + _SPARE_THREADS)
