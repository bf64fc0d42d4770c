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

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# How a compiled kernel is called is no public interface: it was read and tried in these.
TRIED = (3, 2) <= TRITON <= (3, 9)
# Whether a compiled kernel is also given its constexprs, to be ignored.
TAKES_CONSTEXPRS = TRITON >= (3, 3)
# A hook is a function or None, from then on a chain of functions.
CHAINED_HOOKS = TRITON >= (3, 5)
ALIGNMENT = 16
PIECE = 4  # fp32 elements to an alignment

if TRITON >= (3, 4):
    from triton import knobs

    # What else the public way asks for in every launch, in the versions that know it.
    SWITCHES = [
        (knob, name)
        for knob, name in (
            (knobs.runtime, "add_stages_inspection_hook"),
            (knobs.compilation, "instrumentation_mode"),
            (knobs.compilation, "fpsan_homomorphic_casts"),
        )
        if hasattr(knob, name)
    ]
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
    """kernel[(programs,)](**tensors, **scratch, **constants), for tensors that come with each call.

    names       the arguments that are tensors, in the order in which calls pass them
    constants   all other arguments and options of the launch
    scratch     arguments that are fp32 tensors for the time of the launch, with their elements;
                absent (None) where there are none

    All calls of one launcher pass tensors of the same dtypes, on the current device; the first is
    always there, and each of the others is absent (None) in every call or in none.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        names: Sequence[str],
        constants: Mapping[str, Any],
        scratch: Mapping[str, int] | None = None,
    ) -> None:
        self.kernel = kernel
        self.programs = programs
        pieces = {name: count for name, count in (scratch or {}).items() if count}
        absent = [name for name in scratch or {} if name not in pieces]
        self.names = (*names, *pieces)
        self.constants = {**constants, **dict.fromkeys(absent)}
        # Pieces of one allocation, each aligned.
        self._sizes = [PIECE * -(-count // PIECE) for count in pieces.values()]
        self._scratch = sum(self._sizes)
        self._offsets = [4 * sum(self._sizes[:i]) for i in range(len(self._sizes))]
        self._compiled: dict[Any, _Compiled] = {}
        # Another kind, such as an autotuner, chooses anew in every call.
        self._repeats = TRIED and type(kernel) is JITFunction
        if self._repeats:
            params = [p for p in kernel.params if TAKES_CONSTEXPRS or not p.is_constexpr]
            fixed = [p for p in params if p.name not in self.names]
            self._values = tuple(self.constants.get(p.name, p.default) for p in fixed)
            sources = [*self.names, *(p.name for p in fixed)]
            self._ordered = operator.itemgetter(*(sources.index(p.name) for p in params))

    def __call__(self, first: Tensor, *others: Tensor | None) -> None:
        tensors = (first, *others)
        scratch = None
        if self._scratch:
            scratch = torch.empty(self._scratch, dtype=torch.float32, device=first.device)
        if _recorded is not None or not self._repeats or not _undisturbed(self.kernel):
            launch_once(self.kernel, self.programs, **self._arguments(tensors, scratch))
            return
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        if scratch is not None:
            start = scratch.data_ptr()
            addresses += [start + offset for offset in self._offsets]
        aligned: Any = None
        if functools.reduce(operator.or_, filter(None, addresses), 0) % ALIGNMENT:
            aligned = tuple([not address or address % ALIGNMENT == 0 for address in addresses])
        active = driver.active
        device = active.get_current_device()
        key = device, aligned
        compiled = self._compiled.get(key)
        if compiled is None or not compiled.is_of(self.kernel):
            self._first(self._arguments(tensors, scratch), key)
            return
        compiled.run(
            self.programs, 1, 1, active.get_current_stream(device),
            compiled.function, compiled.metadata,
            None, None, None,  # metadata for the hooks, and the hooks
            *self._ordered((*addresses, *self._values)),
        )  # fmt: skip

    def _first(self, arguments: dict[str, Any], key: Any) -> None:
        """A launch the public way, remembered."""
        kernel = self.kernel
        compiled = kernel[(self.programs,)](**arguments)
        # A hook of Triton's cache may have refused to compile; AMD's specialisation asks for more.
        if compiled is None or driver.active.get_current_target().backend != "cuda":
            return
        # Triton has just compared these with what it compiled.
        used = tuple(
            (found, name, found.get(name))
            for (name, _), (_, found) in kernel.used_global_vals.items()
        )
        self._compiled[key] = _Compiled(
            compiled.run, compiled.function, compiled.packed_metadata, kernel.hash, used
        )

    def _arguments(
        self, tensors: tuple[Tensor | None, ...], scratch: Tensor | None
    ) -> dict[str, Any]:
        pieces = () if scratch is None else scratch.split_with_sizes(self._sizes)
        return {**dict(zip(self.names, (*tensors, *pieces), strict=True)), **self.constants}


def current_device() -> int:
    return driver.active.get_current_device()  # type: ignore[no-any-return]


def current_stream(device: torch.device) -> int:
    """The stream on which a launch on the device would run."""
    index = -1 if device.index is None else device.index
    return driver.active.get_current_stream(index)  # type: ignore[no-any-return]


_RUN = JITFunction.run


def _undisturbed(kernel: Any) -> bool:
    """Whether a launch the public way would do nothing but start the compiled kernel."""
    if kernel.pre_run_hooks or JITFunction.run is not _RUN or "run" in kernel.__dict__:
        return False
    if TRITON < (3, 4):
        hooked = CompiledKernel.launch_enter_hook or CompiledKernel.launch_exit_hook
        return hooked is None and os.environ.get("TRITON_DEBUG", "0") != "1"
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if CHAINED_HOOKS:
        enter, leave = enter.calls, leave.calls
    if enter or leave or knobs.runtime.debug:
        return False
    for knob, name in SWITCHES:  # noqa: SIM110 (a generator takes twice as long)
        if getattr(knob, name):
            return False
    return True
