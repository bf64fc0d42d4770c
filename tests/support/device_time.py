"""Device time for pytest-benchmark, whose timers are functions that return growing seconds."""

from __future__ import annotations

import re
from importlib.metadata import version

import torch

FROM, BELOW = (5, 0), (5, 4)
"""The versions of pytest-benchmark that call a timer as DeviceTime needs it: right before and right
after what is timed, in one thread, and keep nothing but the difference of the two."""


class UnknownVersionError(RuntimeError):
    """A pytest-benchmark of which it is not known how it calls a timer."""


class DeviceTime:
    """A timer that advances by device time only, CUDA events apart, as bench.timing.CudaTimer does.

    Each call ends a span and begins the next:

        record end · wait for the device · seconds += end − start · flush L2 · record start

    so a span holds what was queued on the current stream between two calls, with a cold cache, and
    neither the flush nor what the host does alone. The flush is still running when the call
    returns, which hides the launch of the first kernels. Within one round of several iterations
    only the first finds the cache cold.

    The buffer of the flush has exactly the L2's size and lives until `close`.

    Raises UnknownVersionError on the first call under another version of pytest-benchmark.
    """

    def __init__(self) -> None:
        self.__name__ = "device_time"  # what a report calls it
        self._seconds = 0.0
        self._start: torch.cuda.Event | None = None
        self._buffer: torch.Tensor | None = None

    def __call__(self) -> float:
        if self._buffer is None:
            _check_version(version("pytest-benchmark"))
            size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
        if self._start is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            torch.cuda.synchronize()
            self._seconds += self._start.elapsed_time(end) / 1e3
        self._buffer.zero_()
        self._start = torch.cuda.Event(enable_timing=True)
        self._start.record()
        return self._seconds

    def close(self) -> None:
        """Free the buffer. The time goes on from where it was."""
        self._start = self._buffer = None


def _check_version(found: str) -> None:
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not FROM <= (int(numbers[1]), int(numbers[2])) < BELOW:
        allowed = f"pytest-benchmark>={FROM[0]}.{FROM[1]},<{BELOW[0]}.{BELOW[1]}"
        raise UnknownVersionError(
            f"device time is known to be right with {allowed}, and {found} is installed: "
            f"pip install '{allowed}'"
        )
