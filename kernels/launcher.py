"""A launch prepared once: a call then fills in the addresses and goes straight to the driver.

`kernel[grid](**arguments)` works out for every call which compiled kernel the arguments need, which
takes several times as long as starting it. That answer depends on the tensors' dtypes, on which of
them are absent, on which addresses 16 divides, on the device and on the values of all else. A
`Launcher` fixes everything but the addresses. It makes the first launch of a kind the public way,
which compiles the kernel and returns it, and repeats it with other addresses from then on.

Whatever Triton looks at anew in every launch is looked at here, too: hooks (profilers set them),
debugging switches, and globals that the kernel uses. Where any is set, or Triton is of a version
that was not tried, or interprets, every launch is made the public way.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# How a compiled kernel is called is no public interface: it was read and tried in these.
TRIED = (3, 2) <= TRITON <= (3, 9)
# Whether a compiled kernel is also given its constexprs, to be ignored.
TAKES_CONSTEXPRS = TRITON >= (3, 3)
ALIGNMENT = 16

if TRITON >= (3, 4):
    from triton import knobs
else:
    from triton.compiler import CompiledKernel


class Recorded(NamedTuple):
    """A launch that was not made: kernel[grid](**arguments)."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]


_recorded: list[Recorded] | None = None


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Within the block no kernel runs: the list gets what would have been launched.

    With tensors on the meta device this says how a problem of any size would run.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch_once(kernel: Any, programs: int, **arguments: Any) -> None:
    """kernel[(programs,)](**arguments), the public way."""
    if _recorded is None:
        kernel[(programs,)](**arguments)
    else:
        _recorded.append(Recorded(kernel, (programs,), arguments))


class _Compiled(NamedTuple):
    """A compiled kernel, and what it was compiled from.

    run, function, metadata: of Triton's CompiledKernel. hash: of the source. globals: where each
    that the source uses is found, and what it was.
    """

    run: Callable[..., None]
    function: Any
    metadata: Any
    hash: str
    globals: tuple[tuple[dict[str, Any], str, Any], ...]

    def is_of(self, kernel: Any) -> bool:
        """Whether the kernel would still be compiled to this."""
        # By identity: that is quick, and where it fails Triton compares the values.
        for found, name, value in self.globals:
            if found.get(name) is not value:
                return False
        return kernel.hash is self.hash


class Launcher:
    """kernel[(programs,)](**tensors, **constants), for tensors that come with each call.

    names       the arguments that are tensors, in the order in which calls pass them
    constants   all other arguments and options of the launch, absent tensors (None) among them

    All calls of one launcher pass tensors of the same dtypes, on the current device.
    """

    def __init__(
        self, kernel: Any, programs: int, names: Sequence[str], constants: Mapping[str, Any]
    ) -> None:
        self.kernel = kernel
        self.programs = programs
        self.names = tuple(names)
        self.constants = dict(constants)
        self._compiled: dict[Any, _Compiled] = {}
        # Another kind, such as an autotuner, chooses anew in every call.
        self._repeats = TRIED and type(kernel) is JITFunction
        if self._repeats:
            params = [p for p in kernel.params if TAKES_CONSTEXPRS or not p.is_constexpr]
            fixed = [p for p in params if p.name not in self.names]
            self._values = tuple(self.constants.get(p.name, p.default) for p in fixed)
            sources = [*self.names, *(p.name for p in fixed)]
            self._ordered = operator.itemgetter(*(sources.index(p.name) for p in params))

    def __call__(self, *tensors: Tensor) -> None:
        if _recorded is not None or not (self._repeats and _undisturbed(self.kernel)):
            launch_once(self.kernel, self.programs, **self._arguments(tensors))
            return
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned: Any = None
        if functools.reduce(operator.or_, addresses) % ALIGNMENT:
            aligned = tuple(address % ALIGNMENT == 0 for address in addresses)
        active = driver.active
        device = active.get_current_device()
        key = (device, aligned)
        compiled = self._compiled.get(key)
        if compiled is None or not compiled.is_of(self.kernel):
            self._first(tensors, key)
            return
        compiled.run(
            self.programs, 1, 1, active.get_current_stream(device),
            compiled.function, compiled.metadata,
            None, None, None,  # metadata for the hooks, and the hooks
            *self._ordered((*addresses, *self._values)),
        )  # fmt: skip

    def _first(self, tensors: tuple[Tensor, ...], key: Any) -> None:
        """A launch the public way, remembered."""
        kernel = self.kernel
        compiled = kernel[(self.programs,)](**self._arguments(tensors))
        # A hook of Triton's cache may have refused to compile; AMD's specialisation asks for more.
        if compiled is None or driver.active.get_current_target().backend != "cuda":
            return
        used = tuple(
            (found, name, found.get(name))
            for (name, _), (_, found) in kernel.used_global_vals.items()
        )
        self._compiled[key] = _Compiled(
            compiled.run, compiled.function, compiled.packed_metadata, kernel.hash, used
        )

    def _arguments(self, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        return {**dict(zip(self.names, tensors, strict=True)), **self.constants}


_RUN = JITFunction.run


def _undisturbed(kernel: Any) -> bool:
    """Whether a launch the public way would do nothing but start the compiled kernel."""
    if kernel.pre_run_hooks or JITFunction.run is not _RUN or "run" in kernel.__dict__:
        return False
    if TRITON < (3, 4):
        hooked = CompiledKernel.launch_enter_hook or CompiledKernel.launch_exit_hook
        return hooked is None and os.environ.get("TRITON_DEBUG", "0") != "1"
    runtime, compilation = knobs.runtime, knobs.compilation
    return not (
        _hooks(runtime.launch_enter_hook)
        or _hooks(runtime.launch_exit_hook)
        or runtime.debug
        or getattr(runtime, "add_stages_inspection_hook", None)
        or getattr(compilation, "instrumentation_mode", None)
        or getattr(compilation, "fpsan_homomorphic_casts", None)
    )


def _hooks(hook: Any) -> Any:
    """What a hook calls: from 3.5 on it is a chain of functions, before a function or None."""
    return getattr(hook, "calls", hook)
