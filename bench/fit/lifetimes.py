"""When every storage of a step is made and let go of, and what it is for.

What is alive changes only where a storage is made or let go of, so a step is the list of its
storages in order of their birth, each with its size and the moment of its death: all that is asked
of a step's memory follows, and what a storage was for can be decided once the step is over.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from resblock_bench.bench.measure.storages import StorageWatch

from .allocator import reserved_peak

Purpose = Literal[
    "parameters", "masters", "optimizer", "ema", "inputs", "gradients", "activations", "temporaries"
]
"""What a storage is for.

    parameters    of the model, in the dtype in which it keeps them
    masters       float32 copies of the parameters, where the model keeps some in 16 bits
    optimizer     its states
    ema           the moving average of the parameters
    inputs        images, labels and targets of the step
    gradients     of parameters and masters
    activations   made in the forward and kept for the backward
    temporaries   all else: what the forward lets go of; in the backward gradients of activations,
                  and what checkpoints compute again
"""
Phase = Literal["forward", "backward", "optimizer", "ema"]
MOST_BYTES = 2**48
"""Of one storage: of thousands of larger ones the sum would not fit 64 bits."""


class TooLargeError(Exception):
    """A storage of more than MOST_BYTES."""


class Peak(Struct, frozen=True):
    """The moment of a step at which most is alive.

    kinds    bytes for each purpose; they add up to `bytes`
    phase    in which it lies
    place    the module that runs, or is differentiated; "" for none
    places   where the activations and temporaries were made that are alive, the most bytes first
    """

    bytes: int
    kinds: dict[Purpose, int]
    phase: Phase
    place: str
    places: dict[str, int]


class Lifetimes(StorageWatch):
    """Watches a step: the storages of whatever operators return within the context.

    model   the names of its modules, cut to two parts such as input_blocks.3, say where a storage
            was made
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {
            module: ".".join(name.split(".")[:2]) for name, module in model.named_modules()
        }
        self._sizes: list[int] = []
        self._deaths: dict[int, int] = {}  # storage -> how many had been made when it died
        self._kinds: dict[int, Purpose] = {}  # of those that were labelled
        self._places: list[str] = []
        self._phases: list[tuple[int, Phase]] = []  # each with the number of storages before it
        self._running: list[str] = []
        self._ends: tuple[list[int], list[str]] = ([], [])  # of modules: last node, name
        self._hooks = ExitStack()

    def label(self, kind: Purpose, *tensors: Tensor) -> None:
        """Say what tensors are for, and count those that were made before the step."""
        for tensor in tensors:
            self._kinds[self.see(tensor)] = kind

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What is made within the block belongs to this phase."""
        self._phases.append((len(self._sizes), name))
        yield

    def __enter__(self) -> Lifetimes:
        self._hooks.enter_context(_removed(register_module_forward_pre_hook(self._begin)))
        # Also of a module that a checkpoint leaves once it has all that it has to compute again.
        ending = register_module_forward_hook(self._end, always_call=True)
        self._hooks.enter_context(_removed(ending))
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._hooks.close()
        self._alive.clear()  # what dies from now on is alive to the end of the step

    def live_bytes(self) -> NDArray[np.int64]:
        """What is alive after the birth of each storage."""
        count = len(self._sizes)
        change = np.zeros(count + 1, np.int64)
        change[:count] = self._sizes
        for born, died in self._deaths.items():
            change[died] -= self._sizes[born]
        return np.cumsum(change[:count])

    def peak(self) -> Peak:
        """The moment at which most is alive, the first if there are several."""
        live = self.live_bytes()
        moment = int(live.argmax())
        kinds: Counter[Purpose] = Counter()
        places: Counter[str] = Counter()
        for born in range(moment + 1):
            if self._died(born) > moment:
                kind = self._kind(born)
                kinds[kind] += self._sizes[born]
                if kind in ("activations", "temporaries"):
                    places[self._places[born]] += self._sizes[born]
        phase = self._phase_at(moment)
        return Peak(
            bytes=int(live[moment]),
            kinds=dict(kinds),
            phase=self._phases[phase][1] if phase >= 0 else "forward",
            place=self._places[moment],
            places=dict(places.most_common()),
        )

    def reserved_bytes(self) -> int:
        """What CUDA's caching allocator would hold of the driver's memory: an estimate."""
        before = self._phases[0][0] if self._phases else len(self._sizes)
        deaths = [self._died(born) for born in range(len(self._sizes))]
        return reserved_peak(self._sizes, deaths, before)

    def born(self, number: int, size: int) -> None:
        if size > MOST_BYTES:
            raise TooLargeError
        self._sizes.append(size)
        self._places.append(self._place())

    def died(self, number: int, size: int) -> None:
        self._deaths[number] = len(self._sizes)

    def _begin(self, module: nn.Module, inputs: object) -> None:
        self._running.append(self._names.get(module, ""))

    def _end(self, module: nn.Module, inputs: object, output: object) -> None:
        name = self._running.pop()
        if isinstance(output, Tensor) and output.grad_fn is not None:
            last = output.grad_fn._sequence_nr()
            if not self._ends[0] or last > self._ends[0][-1]:
                self._ends[0].append(last)
                self._ends[1].append(name)

    def _place(self) -> str:
        """The module that runs; in the backward the one whose operator is differentiated.

        Operators are numbered as they run, so a module's are those up to its output's.
        """
        if self._running:
            return self._running[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        later = bisect.bisect_left(self._ends[0], node._sequence_nr())
        return self._ends[1][later] if later < len(self._ends[1]) else ""

    def _died(self, born: int) -> int:
        return self._deaths.get(born, len(self._sizes) + 1)

    def _phase_at(self, moment: int) -> int:
        """The position of a moment's phase; −1 before the first."""
        return bisect.bisect_right(self._phases, moment, key=lambda phase: phase[0]) - 1

    def _kind(self, born: int) -> Purpose:
        if born in self._kinds:
            return self._kinds[born]
        phase = self._phase_at(born)
        if phase >= 0 and self._phases[phase][1] == "forward":
            following = self._phases[phase + 1 : phase + 2]
            if following and self._died(born) > following[0][0]:
                return "activations"
        return "temporaries"


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    """A hook for as long as the context lasts."""
    try:
        yield
    finally:
        handle.remove()
