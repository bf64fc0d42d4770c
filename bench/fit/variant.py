"""One variant of a training step, planned in a process of its own."""

from __future__ import annotations

import resource
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from resblock_bench.bench.errors import first_line
from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.measure import storages
from resblock_bench.bench.measure.memory import peak_resident_bytes
from resblock_bench.kernels.dispatch import (
    interpreting,
    prefer,
    standing_for_gpu,
    triton_installed,
)

from .lifetimes import Peak, TooLargeError
from .peaks import Piece, UnlikeStepsError, largest_batch, peak_at, pieces
from .subject import Subject
from .training import Recipe, Training


class VariantJob(Struct, frozen=True, kw_only=True):
    """A variant to plan.

    batch        images a pass
    capacities   bytes of the devices; the largest batch of the largest is confirmed by a step
    """

    subject: Subject
    recipe: Recipe
    batch: int
    capacities: list[int]


class VariantPlan(Struct, frozen=True, kw_only=True):
    """What a variant's step needs.

    peak              at the batch asked for
    pieces            of the peak over the batch, from two images on
    reserved_bytes    of CUDA's caching allocator at the batch asked for, an estimate
    note              on what was fused
    confirmed_batch   of the third step, whose peak was that of the pieces to the byte
    cpu_s, resident_bytes   what the planning itself took
    """

    recipe: Recipe
    batch: int
    peak: Peak
    pieces: list[Piece]
    confirmed_batch: int
    cpu_s: float
    resident_bytes: int
    reserved_bytes: int | None = None
    note: str | None = None

    def peak_at(self, batch: int) -> int:
        """Bytes; exact at the batch asked for, which may be a single image."""
        return self.peak.bytes if batch == self.batch else peak_at(self.pieces, batch)

    def largest_batch(self, capacity: int) -> int:
        """The most images a pass that fit into so many bytes; 0 for none."""
        found = largest_batch(self.pieces, capacity)
        if self.batch == 1 and found <= 1:
            return int(self.peak.bytes <= capacity)
        return found


class VariantReply(Struct, frozen=True, kw_only=True):
    """A plan, or a sentence that says why there is none."""

    plan: VariantPlan | None = None
    problem: str | None = None


def plan_variant(argument: bytes, channel: Channel) -> bytes:
    """VariantJob -> VariantReply."""
    job = msgspec.json.decode(argument, type=VariantJob)
    try:
        reply = VariantReply(plan=variant_plan(job))
    except Exception as error:
        reply = VariantReply(problem=_problem(error, job))
    return msgspec.json.encode(reply)


def variant_plan(job: VariantJob) -> VariantPlan:
    """The plan of a variant, on fake tensors."""
    with FakeTensorMode(), as_on_a_gpu():
        training = Training(job.subject, job.recipe)
        asked = training.watch(job.batch)
        # PyTorch treats a batch of one as a case of its own in some operators.
        first = max(job.batch, 2)
        live = asked.live_bytes() if first == job.batch else training.watch(first).live_bytes()
        found = pieces(live, training.watch(first + 1).live_bytes(), first)
        confirmed = max(largest_batch(found, max(job.capacities)), first + 2)
        confirmed_bytes = training.watch(confirmed).peak().bytes
    if confirmed_bytes != peak_at(found, confirmed):
        raise UnlikeStepsError(
            f"its peak at {confirmed} images is {confirmed_bytes} bytes, and the steps at {first} "
            f"and {first + 1} let expect {peak_at(found, confirmed)}"
        )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return VariantPlan(
        recipe=job.recipe,
        batch=job.batch,
        peak=asked.peak(),
        pieces=found,
        confirmed_batch=confirmed,
        cpu_s=usage.ru_utime + usage.ru_stime,
        resident_bytes=peak_resident_bytes(),
        reserved_bytes=asked.reserved_bytes(),
        note=training.note,
    )


def as_on_a_gpu() -> AbstractContextManager[object]:
    """The fused model takes the path that it takes on a GPU, where Triton is installed."""
    if not triton_installed():
        return nullcontext()
    return prefer("triton") if interpreting() else standing_for_gpu()


def _problem(error: Exception, job: VariantJob) -> str:
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return (
            f"{_line_of(error)} asks for a number in a tensor, and a step that is planned computes "
            "none: let it do without, or measure it with 'run'"
        )
    overflow = isinstance(error, RuntimeError) and "overflow" in str(error)  # PyTorch's own
    if overflow or isinstance(error, TooLargeError):
        return (
            f"{job.subject.name} at {job.batch} images has a tensor of more than 256 TiB: give a "
            "smaller --batch or image"
        )
    if isinstance(error, UnlikeStepsError):
        return str(error)
    return f"its step failed: {first_line(error)}, in {_line_of(error)}"


def _line_of(error: Exception) -> str:
    """The innermost line of an error's traceback that is neither PyTorch's nor what watches it."""
    frames = list(_foreign(traceback.extract_tb(error.__traceback__)))
    if not frames:
        return "PyTorch"
    frame = frames[-1]
    return f"{frame.filename}, line {frame.lineno} ({frame.line}),"


def _foreign(frames: traceback.StackSummary) -> Iterator[traceback.FrameSummary]:
    own = {Path(torch.__file__).parent, Path(__file__).parent, Path(storages.__file__)}
    for frame in frames:
        path = Path(frame.filename)
        if not own & {path, *path.parents}:
            yield frame
