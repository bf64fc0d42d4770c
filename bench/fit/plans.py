"""`plan`: does a training step fit, which batch would, and what is the cheapest change?

The variants asked for are planned one after the other, each in a process of its own. The cheapest
change is the first that fits of these, which are in order of the speed that they cost:

    fused         as many convolutions, fewer passes over memory
    selective     norms and activations are computed again, no convolution is
    attention     is computed again as well
    full          whole blocks are computed again, about a third of a step more
    microbatches  the same sums in several passes; what that costs depends on how few images still
                  keep the GPU busy, and nothing bounds it. Selective before full
    average       its moving average moves to main memory, and is copied to for every step
    bf16          autocast; it alone changes what is computed, so it is last
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import Struct, structs
from rich.console import Console

from resblock_bench.bench.checkout import package_folder, source_state
from resblock_bench.bench.machine.environment import versions
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.progress import TaskProgress
from resblock_bench.bench.records import Checkpoint, Record

from .subject import Subject
from .training import Impl, Optimizer, Precision, Recipe
from .variant import VariantJob, VariantPlan, VariantReply, plan_variant

GIB = 2**30
DEVICES = tuple(gib * GIB for gib in (16, 24, 40, 80, 141))
IMPLS: tuple[Impl, ...] = get_args(Impl)
CHECKPOINTS: tuple[Checkpoint, ...] = get_args(Checkpoint)
SCHEMA_VERSION = 1
_LIMIT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to plan; `microbatch` None is the whole batch at once."""

    subject: Subject
    precision: Precision
    batch: int = 8
    microbatch: int | None = None
    optimizer: Optimizer = "adamw"
    ema: bool = False
    recompute_attention: bool = False
    impls: Sequence[Impl] = IMPLS
    checkpoints: Sequence[Checkpoint] = CHECKPOINTS
    device_bytes: int | None = None
    json: Path | None = None
    plot: Path | None = None

    @property
    def at_once(self) -> int:
        """Images a pass."""
        return self.microbatch or self.batch

    @property
    def devices(self) -> list[int]:
        return list(DEVICES) if self.device_bytes is None else [self.device_bytes]

    def recipe(self, impl: Impl, checkpoint: Checkpoint) -> Recipe:
        return Recipe(
            impl=impl,
            checkpoint=checkpoint,
            precision=self.precision,
            optimizer=self.optimizer,
            ema=self.ema,
            recompute_attention=self.recompute_attention,
            accumulate=self.at_once < self.batch,
        )

    def recipes(self) -> list[Recipe]:
        return [self.recipe(*pair) for pair in itertools.product(self.impls, self.checkpoints)]


class Change(Struct, frozen=True, kw_only=True):
    """What makes the batch fit into a device, and the peak then.

    what     in words; "" where it fits without fusing or checkpointing, None where nothing helps
    images   a pass
    """

    device_bytes: int
    what: str | None
    recipe: Recipe | None = None
    images: int | None = None
    peak_bytes: int | None = None


class Failure(Struct, frozen=True):
    """A variant without a plan, and why."""

    recipe: Recipe
    problem: str


class MemoryPlan(Record, frozen=True, kw_only=True):
    """What `plan` found; what --json writes.

    interrupted   before all of it was found
    """

    schema_version: int = SCHEMA_VERSION
    subject: Subject
    batch: int
    images_a_pass: int
    devices: list[int]
    variants: list[VariantPlan]
    failures: list[Failure]
    changes: list[Change]
    interrupted: bool
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None


class Planner:
    """Plans variants of a subject, each once."""

    def __init__(
        self, subject: Subject, batch: int, devices: Sequence[int], processes: Processes
    ) -> None:
        self._subject, self._batch, self._devices = subject, batch, list(devices)
        self._processes = processes
        self.replies: dict[Recipe, VariantReply] = {}

    def plan(self, recipe: Recipe) -> VariantPlan | None:
        """A variant's plan, or None where its step fails."""
        if recipe not in self.replies:
            job = VariantJob(
                subject=self._subject, recipe=recipe, batch=self._batch, capacities=self._devices
            )
            self.replies[recipe] = self._reply(job)
        return self.replies[recipe].plan

    def _reply(self, job: VariantJob) -> VariantReply:
        ending = self._processes.run(plan_variant, msgspec.json.encode(job), limit_s=_LIMIT_S)
        if ending.reply is None:
            return VariantReply(problem=ending.problem(_LIMIT_S)[1])
        return msgspec.json.decode(ending.reply, type=VariantReply)


def memory_plan(request: PlanRequest, progress: Console) -> MemoryPlan:
    """All variants, then the cheapest change for each device; what there is after an interrupt."""
    recipes, changes, interrupted = request.recipes(), [], False
    with closing(Processes()) as processes:
        planner = Planner(request.subject, request.at_once, request.devices, processes)
        try:
            with TaskProgress(progress, len(recipes)) as bar:
                for recipe in recipes:
                    name = variant_title(recipe)
                    bar.begin(name)
                    planner.plan(recipe)
                    bar.finish(name)
            for device_bytes in request.devices:
                changes.append(cheapest_change(request, device_bytes, planner.plan))
        except KeyboardInterrupt:
            interrupted = True
    commit, dirty = source_state(package_folder("bench"))
    replies = [(recipe, planner.replies[recipe]) for recipe in recipes if recipe in planner.replies]
    return MemoryPlan(
        subject=request.subject,
        batch=request.batch,
        images_a_pass=request.at_once,
        devices=request.devices,
        variants=[reply.plan for _, reply in replies if reply.plan is not None],
        failures=[Failure(s, reply.problem) for s, reply in replies if reply.problem is not None],
        changes=changes,
        interrupted=interrupted,
        versions=versions(),
        commit=commit,
        dirty=dirty,
    )


def cheapest_change(
    request: PlanRequest, device_bytes: int, plan: Callable[[Recipe], VariantPlan | None]
) -> Change:
    """The first of the changes that makes the batch fit; `plan` gives a variant's plan."""
    at_once = request.at_once
    for what, recipe, split in changes_in_order(request):
        if split and at_once == 1:
            continue
        found = plan(recipe)
        if found is None:
            continue
        images = at_once
        if split:
            images = min(found.largest_batch(device_bytes), at_once - 1)
        if images and found.peak_at(images) <= device_bytes:
            what = f"{what}, {images} at a time" if split else what
            return Change(
                device_bytes=device_bytes,
                what=what,
                recipe=recipe,
                images=images,
                peak_bytes=found.peak_at(images),
            )
    return Change(device_bytes=device_bytes, what=None)


def changes_in_order(request: PlanRequest) -> Iterator[tuple[str, Recipe, bool]]:
    """What, how it is trained then, and whether in microbatches; the least speed lost first."""
    yield "", request.recipe("reference", "none"), False
    fused = [request.recipe("fused", checkpoint) for checkpoint in CHECKPOINTS]
    if request.subject.config is not None and not request.recompute_attention:
        fused.insert(2, structs.replace(fused[1], recompute_attention=True))
    for recipe in fused:
        yield _words(recipe, request), recipe, False
    changes: list[tuple[str, dict[str, Any]]] = [("", {})]
    if request.ema:
        changes.append((", the moving average in main memory", {"ema": False}))
    if request.precision == "fp32":
        text, fields = changes[-1]
        changes.append((f"{text}, autocast to bf16", {**fields, "precision": "bf16"}))
    for text, fields in changes:
        for recipe in fused[1:]:
            changed = structs.replace(recipe, **fields, accumulate=True)
            yield f"{_words(recipe, request)}{text}, microbatches", changed, True


def variant_title(recipe: Recipe) -> str:
    return f"{recipe.impl} {recipe.checkpoint}"


def _words(recipe: Recipe, request: PlanRequest) -> str:
    words = "fused"
    if recipe.checkpoint != "none":
        words += f", {recipe.checkpoint} checkpointing"
    if recipe.recompute_attention and not request.recompute_attention:
        words += ", attention computed again"
    return words
