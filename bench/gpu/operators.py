"""The operator at the norms of published models, on a GPU: eager, fused, compiled, other projects'.

    python -m resblock_bench.bench.gpu.operators --output rows.jsonl --time-budget 120s

Each direction of each norm is checked against float64 and then timed, with a cold L2 and without
the host's part. A line of JSON is written for each at once, and one that says "begun" before it:
what hangs or breaks the GPU is known to the next call, which leaves it out and goes on.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, cast, get_args

import msgspec
import torch
import typer
from msgspec.structs import replace
from torch import Tensor, nn
from torch.func import functional_call

from resblock_bench.bench.compiled.norms import Norm, norms_of_block
from resblock_bench.bench.cost.published_norms import groups_of
from resblock_bench.bench.errors import first_line
from resblock_bench.bench.grid.axes import Selection
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.measure import correctness, operator, stats
from resblock_bench.bench.measure.devices import Kind, device_kind, open_device
from resblock_bench.bench.measure.operator import CallInputs, Tensors
from resblock_bench.bench.measure.peers import PEERS
from resblock_bench.bench.measure.timing import CpuTimer, Timer, Timing, time_fn
from resblock_bench.bench.measure.workload import DTYPES
from resblock_bench.bench.records import DType, Layout, Record
from resblock_bench.bench.tune.cases import errors
from resblock_bench.bench.tune.gpu import TIMING, QueuedTimer
from resblock_bench.kernels import dispatch, functional
from resblock_bench.kernels.spec import Modulation, spread
from resblock_bench.kernels.tiers import Direction
from resblock_bench.reference import PUBLISHED

OperatorCall = Callable[[Tensor, Modulation, int], Tensor]

BATCHES = {32: 128, 64: 64, 128: 16, 256: 8, 512: 4}
"""Images a step, by their size: what fills a GPU."""
COPY_ELEMENTS = {"cuda": 2**28, "cpu": 2**24}
"""Of float32, in the copy that says what the memory reaches."""
SAMPLING = replace(TIMING, rel_half_width=0.01, max_time_s=0.25)


class OperatorRow(Record, frozen=True, kw_only=True):
    """One direction of one norm by one implementation.

    label         what the rows are told apart by, such as before and after tuning
    weight        C·HW × count over the published models that have this norm at this batch
    status        begun: nothing has come after it; skipped: it is not installed
    reason        why it is not ok
    median_us     device time with a cold L2; low_us and high_us its 95 % interval
    bytes         that have to be moved: x, dy, y or dx and what modulates, each once
    floor_us      bytes at copy_bytes_per_s; share: floor_us / median_us
    """

    label: str
    model: str
    batch: int
    channels: int
    resolution: int
    groups: int
    dtype: DType
    layout: Layout
    modulation: str
    weight: int
    direction: Direction
    impl: str
    status: Literal["begun", "ok", "wrong", "failed", "skipped"] = "begun"
    reason: str | None = None
    tier: str | None = None
    error: float | None = None
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    bytes: int | None = None
    floor_us: float | None = None
    share: float | None = None
    copy_bytes_per_s: float | None = None
    device: str | None = None
    torch: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it another measurement."""
        names = "label batch channels resolution groups dtype layout modulation direction impl"
        return tuple(getattr(self, name) for name in names.split())


class Site(NamedTuple):
    norm: Norm
    model: str
    resolution: int
    weight: int


def published_sites(dtype: DType, layout: Layout) -> list[Site]:
    """The norms of all published models at batches that fill a GPU, heaviest first."""
    found: dict[Norm, Site] = {}
    for model, config in PUBLISHED.items():
        selection: Selection = {
            "model": (model,),
            "batch": (BATCHES[config.image_size],),
            "dtype": (dtype,),
            "layout": (layout,),
            "mode": ("inference",),
            "impl": ("fused",),
        }
        for item in plan([selection], of_any_kind=True):
            for norm in norms_of_block(item.cell, partial(groups_of, config)):
                # Dropout is left out, since what is timed is what can be checked.
                norm = replace(norm, dropout=0.0)
                weight = norm.channels * norm.positions * item.multiplicity
                site = found.get(norm, Site(norm, model, round(norm.positions**0.5), 0))
                found[norm] = site._replace(weight=site.weight + weight)
    return sorted(found.values(), key=lambda site: -site.weight)


def chosen(sites: list[Site], count: int) -> list[Site]:
    """The heaviest, and a third of as many from all of the rest: small maps weigh little."""
    heaviest = sites[: count - count // 3]
    rest = sites[len(heaviest) :]
    return heaviest + rest[:: max(1, len(rest) // max(1, count // 3))][: count // 3]


def fused(x: Tensor, m: Modulation, groups: int) -> Tensor:
    return functional.group_norm_silu(
        x, groups, m.weight, m.bias, m.scale, m.shift, pre_shift=m.pre_shift, eps=operator.EPS
    )


def implementation(impl: str, norm: Norm, device: torch.device) -> OperatorCall:
    """What computes the operator. Raises what the project that it belongs to raises."""
    if impl == "eager":
        return operator.eager
    if impl == "fused":
        return fused
    if impl == "compiled":
        # Of one function Dynamo compiles some shapes only, and then, but for fullgraph, gives up.
        torch.compiler.reset()
        return torch.compile(operator.eager, dynamic=False, fullgraph=True)
    block = (
        PEERS[impl]
        .build(
            {
                "channels": norm.channels,
                "emb_channels": 64,
                "dropout": 0.0,
                "use_scale_shift_norm": True,
                "up": False,
                "down": False,
            }
        )
        .to(device)
    )
    theirs = cast(nn.Sequential, block.out_layers)[0]

    def call(x: Tensor, m: Modulation, groups: int) -> Tensor:
        h = x if m.pre_shift is None else x + spread(m.pre_shift, x)
        named = {"weight": cast(Tensor, m.weight), "bias": cast(Tensor, m.bias)}
        z: Tensor = functional_call(theirs, named, (h,)).to(x.dtype)
        if m.scale is not None and m.shift is not None:
            z = z * (1 + spread(m.scale, x)) + spread(m.shift, x)
        return torch.nn.functional.silu(z)

    return call


def inputs_of(norm: Norm, resolution: int, device: torch.device) -> CallInputs:
    return operator.draw(
        (norm.batch, norm.channels, resolution, norm.positions // resolution),
        norm.groups,
        DTYPES[norm.dtype],
        channels_last=norm.layout == "nhwc",
        scale_shift=norm.modulation == "scale_shift",
        # A constant in front of a group of one channel has a gradient of exactly zero.
        pre_shift=norm.modulation == "add" and norm.channels > norm.groups,
        device=device,
    )


def least_bytes(inputs: CallInputs, direction: Direction) -> int:
    """Forward: read x and what modulates it, write y. Backward: read dy, too; write gradients."""
    read = sum(t.nbytes for t in (inputs.x, *inputs.modulation) if t is not None)
    return read + inputs.x.nbytes if direction == "forward" else 2 * read + inputs.dy.nbytes


class OperatorTruth:
    """The results of one site in float64, and what eager's own errors allow."""

    def __init__(self, inputs: CallInputs) -> None:
        self._tensors = operator.in_parts(operator.gradients, inputs, torch.float64)
        usual = operator.in_parts(operator.gradients, inputs)
        self._limits = {
            name: correctness.limit(error.norm, usual[name].dtype)
            for name, error in errors(usual, self._tensors).items()
        }

    def mistake(self, found: Tensors) -> tuple[str | None, float]:
        """What is wrong, or None; and the largest relative error."""
        norms = {name: error.norm for name, error in errors(found, self._tensors).items()}
        sentence = None
        for name, error in norms.items():
            limit = self._limits[name]
            if not error <= limit:
                sentence = f"{name} has a relative error of {error:.2g}, and {limit:.2g} is right"
        return sentence, max(norms.values())


def time_direction(
    call: OperatorCall, inputs: CallInputs, direction: Direction, timer: Timer
) -> Timing:
    named = {"x": inputs.x, **inputs.modulation._asdict()}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    rows = Modulation(*map(leaves.get, Modulation._fields))
    forward = partial(call, leaves["x"], rows, inputs.groups)
    if direction == "forward":
        return time_fn(forward, timer, SAMPLING)
    made: list[Tensor] = []

    def prepare() -> None:
        made[:] = [forward()]

    def backward() -> object:
        return torch.autograd.grad(made.pop(), list(leaves.values()), inputs.dy)

    return time_fn(backward, timer, SAMPLING, prepare=prepare)


class Sweep:
    """Measures rows one after the other, and writes each at once."""

    def __init__(self, path: Path, label: str, kind: Kind, deadline: float) -> None:
        self._path, self._label, self._deadline = path, label, deadline
        self._known = {row.key for row in read_rows(path)}
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")  # Behind a line that was cut off.
        self._device = open_device(kind, torch.get_num_threads())
        self._timer: Timer = CpuTimer()
        if kind == "cuda":
            self._timer = QueuedTimer(self._device.torch_device)
        self._copy = self._copy_bytes_per_s()
        self.left_out = False
        """Whether the time was spent before all that was asked for was measured."""

    def _copy_bytes_per_s(self) -> float:
        """Of a large copy, read plus written; the best of many samples."""
        size = COPY_ELEMENTS[self._device.kind]
        source = torch.ones(size, device=self._device.torch_device)
        target = torch.empty_like(source)
        timing = time_fn(lambda: target.copy_(source), self._timer, SAMPLING)
        return 2 * source.nbytes / min(timing.samples_ms) * 1e3

    def site(self, site: Site, impls: Sequence[str]) -> Iterator[OperatorRow]:
        """Rows of one norm, as they are done. Ends early when the time is spent."""
        norm = site.norm
        head = OperatorRow(
            label=self._label,
            model=site.model,
            batch=norm.batch,
            channels=norm.channels,
            resolution=site.resolution,
            groups=norm.groups,
            dtype=norm.dtype,
            layout=norm.layout,
            modulation=norm.modulation,
            weight=site.weight,
            direction="forward",
            impl="eager",
            copy_bytes_per_s=self._copy,
            device=self._device.name,
            torch=str(torch.__version__),
        )
        wanted: list[list[OperatorRow]] = []
        for impl in impls:
            both = [replace(head, impl=impl, direction=way) for way in get_args(Direction)]
            rows = [row for row in both if row.key not in self._known]
            absent = PEERS[impl].missing() if impl in PEERS else None
            if absent is not None:
                yield from self._kept(replace(row, status="skipped", reason=absent) for row in rows)
            elif rows:
                wanted.append(rows)
        if not wanted or self._spent():
            return
        inputs = inputs_of(norm, site.resolution, self._device.torch_device)
        truth = OperatorTruth(inputs)
        for rows in wanted:
            if self._spent():
                return
            for row in rows:
                self._write(row)
            yield from self._kept(self._measured(rows, norm, inputs, truth))
        del truth
        if self._device.kind == "cuda":
            torch.cuda.empty_cache()

    def _kept(self, rows: Iterable[OperatorRow]) -> Iterator[OperatorRow]:
        for row in rows:
            self._write(row)
            yield row

    def _spent(self) -> bool:
        """Whether the time is; what is asked for then is left out."""
        spent = time.monotonic() >= self._deadline
        self.left_out |= spent
        return spent

    def _measured(
        self, rows: list[OperatorRow], norm: Norm, inputs: CallInputs, truth: OperatorTruth
    ) -> Iterator[OperatorRow]:
        try:
            call = implementation(rows[0].impl, norm, self._device.torch_device)
            found = operator.gradients(inputs, call)
            self._wait()
            sentence, error = truth.mistake(found)
            del found
        except Exception as problem:
            reason = first_line(problem)
            yield from (replace(row, status="failed", reason=reason) for row in rows)
            self._wait()  # raises where the GPU runs nothing more
            return
        for row in rows:
            if sentence is not None:
                yield replace(row, status="wrong", reason=sentence, error=error)
                continue
            timing = time_direction(call, inputs, row.direction, self._timer)
            median = statistics.median(timing.samples_ms)
            low, high = stats.median_interval(timing.samples_ms, 0.95) or (median, median)
            needed = least_bytes(inputs, row.direction)
            floor_us = needed / self._copy * 1e6
            tier = None
            if row.impl == "fused":
                tier = dispatch.launch_for(row.direction, inputs.x, norm.groups).tier
            yield replace(
                row,
                status="ok",
                tier=tier,
                error=error,
                median_us=median * 1e3,
                low_us=low * 1e3,
                high_us=high * 1e3,
                bytes=needed,
                floor_us=floor_us,
                share=floor_us / (median * 1e3),
            )

    def _wait(self) -> None:
        if self._device.kind == "cuda":
            torch.cuda.synchronize()

    def _write(self, row: OperatorRow) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[OperatorRow]:
    """The last row of every measurement. A line that was cut off is left out."""
    if not path.exists():
        return []
    rows = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            row = msgspec.json.decode(line, type=OperatorRow)
        except msgspec.MsgspecError:
            continue
        rows[row.key] = row
    return list(rows.values())


def main(
    output: Annotated[Path, typer.Option()],
    time_budget: Annotated[float, typer.Option(min=1, max=3600)] = 120,
    label: str = "rules",
    sites: Annotated[int, typer.Option(min=1, max=1000)] = 24,
    dtype: DType = "bf16",
    device: str = "cuda",
    stages: str = "eager,fused;compiled;liger-flat,flag-gems,liger,apex",
) -> None:
    """Measure the heaviest sites of either layout, an implementation's stage after the other."""
    sweep = Sweep(output, label, device_kind(device), time.monotonic() + time_budget)
    layouts = (chosen(published_sites(dtype, layout), sites) for layout in ("nchw", "nhwc"))
    ordered = [site for pair in zip(*layouts, strict=True) for site in pair]
    for stage in stages.split(";"):
        for site in ordered:
            layout = site.norm.layout
            impls = [
                i for i in stage.split(",") if i not in PEERS or layout in PEERS[i].can.layouts
            ]
            for row in sweep.site(site, impls):
                took = "" if row.median_us is None else f"{row.median_us:.0f} µs {row.share:.0%}"
                print(
                    f"{row.layout} {row.batch}x{row.channels}x{row.resolution}² {row.modulation} "
                    f"{row.direction} {row.impl} {row.tier or ''} {row.status} {took} "
                    f"{row.reason or ''}",
                    flush=True,
                )
    if sweep.left_out:
        print("stopped, since the time budget is spent")


if __name__ == "__main__":
    typer.run(main)
