"""Imported by the process server, and by nothing else: what every cell's process would import.

Nothing here may create a tensor, ask for a GPU or start a thread pool: processes forked from the
server must find the allocator, the device and the pools untouched.
"""

import signal

# Ctrl-C is for who waits. The server itself ignores it only once it has imported all this.
signal.signal(signal.SIGINT, signal.SIG_IGN)

import gc  # noqa: E402

import torch.distributed._tools.mem_tracker  # noqa: E402
import torch.utils.flop_counter  # noqa: E402, F401

import resblock_bench.bench.measure.jobs  # noqa: E402
import resblock_bench.kernels  # noqa: E402, F401

from .fingerprint import code_fingerprint  # noqa: E402

# What is imported by now stays: without this each of the collections that a memory measurement
# needs would walk through all of it, and copy its pages.
code_fingerprint()
gc.collect()
gc.freeze()
