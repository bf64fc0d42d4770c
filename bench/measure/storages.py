"""The storages of a step, from birth to death.

A storage is the memory behind a tensor and its views. Real and fake tensors are the same here;
scratch memory inside an operator is not seen.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_DEVICE = torch.ops.prim.device.default


class StorageWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the storages of whatever operators return within the context.

    Subclasses say what comes of it: `born` and `died` are called with a storage's number, in the
    order of birth from 0, and its bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = 0
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by address

    def born(self, number: int, size: int) -> None:
        raise NotImplementedError

    def died(self, number: int, size: int) -> None:
        raise NotImplementedError

    def see(self, tensor: Tensor) -> int:
        """The number of a tensor's storage; also of one from before the context."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return self._alive[address][0]
        number, size = self._count, storage.nbytes()
        self._count += 1

        def bury(_: object) -> None:
            if self._alive.pop(address, None) is not None:
                self.died(number, size)

        self._alive[address] = number, weakref.ref(storage, bury)
        self.born(number, size)
        return number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _DEVICE:  # what every second call on fake tensors asks
            return out
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out
