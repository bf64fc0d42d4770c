"""What every operator of a step reads, writes and computes, and which storages it makes.

    bytes         every tensor that an operator takes read once, every one that it makes or changes
                  written once; a view moves nothing, and of an expanded tensor what it stands on
    matrix_flops  of convolutions, matrix products and attention, backward, too; two a multiply-add
    flops         these, and of all others that compute one for every element of the largest tensor
                  that they read or write: a lower bound. Own fused operators count as the chain of
                  operators that they replace

These follow from shapes alone, so they are exact and the same each time. The step runs under a
dispatch mode, which is slow: no time comes from it. A mark around each operator says, in the
profiler's record of the step, where it belongs.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from resblock_bench.bench.measure.storages import StorageWatch

from .events import WORK, mark
from .groups import group_of
from .profiles import Operation

_OWN = "resblock_bench::group_norm_silu"
_ONLY_WRITTEN = ("copy_", "zero_", "fill_", "random_", "bernoulli_", "normal_", "uniform_")
_ALLOCATES = ("empty", "new_empty")
"""How the names begin of operators that move nothing."""


class WorkWatch(StorageWatch):  # type: ignore[no-untyped-call]
    """The operators of a step in order, and the births and deaths of storages between them.

    resident   alive before the step

    births   of each storage the position of its operator, -1 for none, and its bytes
    deaths   by number of the storage, how many had been born when it died
    """

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.births: list[tuple[int, int]] = []
        self.deaths: dict[int, int] = {}
        for tensor in resident:
            self.see(tensor)

    def born(self, number: int, size: int) -> None:
        self.births.append((len(self.operations) - 1, size))

    def died(self, number: int, size: int) -> None:
        self.deaths[number] = len(self.births)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = len(self.operations)
        self.operations.append(Operation(name=func._schema.name))
        with mark(f"{WORK}{place}"):
            out = func(*args, **(kwargs or {}))
        self.operations[place] = operation(func, args, kwargs or {}, out)
        for leaf in _tensors(out):
            self.see(leaf)
        return out


def operation(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Operation:
    """What a call of an operator does, from its arguments and what it returned."""
    name = func._schema.name
    read, written = _moved(func, args, kwargs, out)
    matrix = _matrix_flops(func, args, kwargs, out)
    flops = matrix
    if not matrix and written and group_of(name, None) != "copies":
        sizes = [tensor.numel() for tensor in (*read, *written)]
        if group_of(name, None) == "optimizer":  # of a list, tensor by tensor
            sizes = [sum(tensor.numel() for tensor in written)]
        flops = max(sizes) * _operations_an_element(func, args)
    moved = sum(map(_bytes, read)) + sum(map(_bytes, written))
    return Operation(name=name, bytes=moved, flops=flops, matrix_flops=matrix)


def _moved(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that are read, and those that are written."""
    name = func._schema.name.partition("::")[2]
    if name.startswith(_ALLOCATES):
        return [], []
    read: list[Tensor] = []
    changed: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        changed += _tensors(value) if writes else []
        if not writes or not (argument.kwarg_only or name in _ONLY_WRITTEN):
            read += _tensors(value)
    taken = {t.untyped_storage()._cdata for t in (*read, *changed)}
    made = [t for t in _tensors(out) if t.untyped_storage()._cdata not in taken]
    written = made + changed
    return (read, written) if written or not _tensors(out) else ([], [])


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """What a tensor stands on: an expanded dimension is read once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


def _matrix_flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    from torch.utils.flop_counter import flop_registry  # 70 MB

    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _operations_an_element(func: Any, args: Sequence[Any]) -> int:
    """Of our fused operators those of the chain: norm, scale, shift, SiLU and dropout; in the
    backward each has one for its input and, where it has a tensor of its own, one for that."""
    name = func._schema.name
    if not name.startswith(_OWN):
        return 1
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
    rows = sum(given.get(row) is not None for row in ("scale", "shift", "pre_shift"))
    chain = 1 + rows + bool(given.get("activation")) + bool(given.get("dropout_p"))
    return chain + 1 + rows if name.endswith("_backward") else chain
