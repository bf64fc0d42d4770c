"""Imported by the process server, and by nothing else: what every cell's process would import.

Nothing here may create a tensor, ask for a GPU or start a thread pool: processes forked from the
server must find the allocator, the device and the pools untouched.
"""

import gc

# At its first call a checkpoint, an optimizer or a custom operator would import it.
import torch._dynamo
import torch.distributed._tools.mem_tracker
import torch.utils.flop_counter  # noqa: F401

import resblock_bench.bench.measure.jobs
import resblock_bench.kernels  # noqa: F401

from .fingerprint import code_fingerprint, code_of

for impl in ("reference", "fused"):
    code_of(impl)
code_fingerprint()
# What is imported by now stays: without this each of the collections that a memory measurement
# needs would walk through all of it, and copy its pages.
gc.collect()
gc.freeze()
