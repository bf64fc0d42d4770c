"""The memory of a step by what it is for, and which modules hold it at the peak."""

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from resblock_bench.bench.measure.workload import Workload

from .events import Placed, StepStage
from .profiles import Category, MemoryUse
from .work import WorkWatch

_POINTS = 400


def memory_use(watch: WorkWatch, workload: Workload, places: Sequence[Placed]) -> MemoryUse:
    """Of a step that was watched and is over, its gradients still there.

    places   where each operator belongs
    """
    sizes = np.array([size for _, size in watch.births], np.int64)
    count = len(sizes)
    deaths = np.array([watch.deaths.get(n, count + 1) for n in range(count)], np.int64)
    categories = _categories(watch, workload, places)
    names = get_args(Category)
    live = np.stack([_live(sizes, deaths, categories == n) for n in range(len(names))])
    total = live.sum(0)
    peak = int(total.argmax())
    first = sum(operator < 0 for operator, _ in watch.births) - 1
    stretches = np.array_split(np.arange(first, count), min(_POINTS, count - first))
    kept = [int(part[total[part].argmax()]) for part in stretches]
    held: Counter[str] = Counter()
    for born in range(peak + 1):
        if deaths[born] > peak and names[categories[born]] in ("activations", "temporaries"):
            operator = watch.births[born][0]
            held[places[operator].module or ""] += int(sizes[born])
    operator = watch.births[peak][0]
    return MemoryUse(
        operators=len(watch.operations),
        at=[watch.births[born][0] + 1 for born in kept],
        bytes={name: live[n, kept].tolist() for n, name in enumerate(names)},
        stages=_stages(places),
        peak_bytes=int(total[peak]),
        peak_stage=places[operator].stage if operator >= 0 else "forward",
        peak_module=places[operator].module if operator >= 0 else None,
        held=dict(held.most_common()),
    )


def _live(
    sizes: NDArray[np.int64],
    deaths: NDArray[np.int64],
    chosen: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """The bytes of the chosen storages after the birth of each storage."""
    change = np.zeros(len(sizes) + 2, np.int64)
    change[: len(sizes)] = sizes * chosen
    np.subtract.at(change, deaths[chosen], sizes[chosen])
    return np.cumsum(change)[: len(sizes)]


def _categories(
    watch: WorkWatch, workload: Workload, places: Sequence[Placed]
) -> NDArray[np.int64]:
    """Of each storage the position of its category."""
    names = get_args(Category)
    parameters = _numbers(watch, [*workload.block.parameters(), *workload.block.buffers()])
    inputs = _numbers(watch, _inputs(workload))
    stages = [None if op < 0 else places[op].stage for op, _ in watch.births]
    backward = [n for n, stage in enumerate(stages) if stage in ("backward", "recompute")]

    def category(number: int) -> Category:
        if stages[number] is None:
            resident: Category = "inputs" if number in inputs else "optimizer"
            return "parameters" if number in parameters else resident
        if number not in watch.deaths:
            return "gradients"
        later = bisect.bisect_left(backward, number)
        kept = later < len(backward) and watch.deaths[number] > backward[later]
        return "activations" if stages[number] == "forward" and kept else "temporaries"

    return np.array([names.index(category(n)) for n in range(len(stages))], np.int64)


def _inputs(workload: Workload) -> list[Tensor]:
    """What a step is given."""
    named: dict[str, Tensor] | None = getattr(workload, "inputs", None)
    if named is not None:
        return list(named.values())
    return [workload.x, workload.emb, workload.cotangent]


def _numbers(watch: WorkWatch, tensors: Iterable[Tensor]) -> set[int]:
    return {watch.see(tensor) for tensor in tensors}


def _stages(places: Sequence[Placed]) -> list[tuple[int, StepStage]]:
    """Where each pass begins; what is computed again is a part of the backward."""
    found: list[tuple[int, StepStage]] = []
    for position, span in enumerate(places):
        stage: StepStage = "backward" if span.stage == "recompute" else span.stage
        if not found or found[-1][1] != stage:
            found.append((position, stage))
    return found
