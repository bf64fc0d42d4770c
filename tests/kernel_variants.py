"""Every variant of the kernels that the tests cover, compiled for a GPU that is not there.

    python tests/kernel_variants.py --arch 90 [--short]

Prints as JSON what came of it (`Compiled`); tests/versions.py runs this under one Triton after the
other. A process of its own, since kernels that were defined under TRITON_INTERPRET=1 cannot be
compiled.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
import typer
from torch import Tensor

from resblock_bench.bench.machine import workers
from resblock_bench.kernels.spec import Modulation, Spec
from resblock_bench.kernels.tiers import TIERS, Problem, Tier, plan_launch, rewrite_launch

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DROPOUT = (0.0, 0.1)
# (N, C, H, W, groups). Tier A cannot hold the last two.
SHAPES = {
    "two channels a group": (2, 64, 16, 16, 32),
    "odd sizes": (1, 30, 7, 9, 3),
    "one group": (2, 42, 15, 13, 1),
    "one channel a group": (2, 8, 4, 5, 8),
    "many positions": (1, 64, 128, 128, 32),
    "many odd positions": (1, 60, 181, 111, 6),
}
HALF = (torch.float16, torch.bfloat16)
# Of x, the output (autocast makes it another) and the modulation.
DTYPES = (
    *((dtype,) * 3 for dtype in (torch.float32, *HALF)),
    *((dtype, dtype, torch.float32) for dtype in HALF),
    *((torch.float32, dtype, torch.float32) for dtype in HALF),
)
LIMIT_S = 1800.0  # A compiler that is stuck; the slowest takes seconds where nothing else runs.
NAMES = Modulation._fields
# Which of the modulation is there: everything, nothing, all but one, one alone.
PRESENT = (
    frozenset(NAMES),
    frozenset(),
    *(frozenset(NAMES) - {name} for name in NAMES),
    *(frozenset({name}) for name in NAMES),
)
ACTIVATION = (True, False)


class Case(NamedTuple):
    """One call of the operator."""

    tier: Tier
    layout: str
    shape: str
    dropout: float
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    present: frozenset[str]
    activation: bool

    def pairs(self) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
        """Every two of its options."""
        return set(itertools.combinations(enumerate(self), 2))


class Compiled(msgspec.Struct):
    """What came of an architecture: how many variants there are, and why some do not compile.

    impossible   why the installed Triton compiles nothing for it
    """

    triton: str
    arch: int
    count: int
    failed: dict[str, str]
    impossible: str | None = None


def cases() -> list[Case]:
    """All combinations of tier, layout, shape and dropout, and of all other options every two.

    What else a case has is chosen such that most pairs of options come together that have not yet;
    all of every combination would be a hundred times as many.
    """
    rest = list(itertools.product(DTYPES, PRESENT, ACTIVATION))
    chosen: list[Case] = []
    seen: set[Any] = set()
    for first in itertools.product(TIERS.values(), LAYOUTS, SHAPES, DROPOUT):
        possible = [Case(*first, *others) for others in rest]
        best = max(possible, key=lambda case: len(case.pairs() - seen))
        chosen.append(best)
        seen |= best.pairs()
    return chosen


def launched(case: Case, arch: int) -> list[Any]:
    """The launches of a call, forward, rewrite and backward; none where the tier cannot hold it."""
    from resblock_bench.bench.compiled.norms import MACHINES
    from resblock_bench.kernels import launch as launches

    N, C, H, W, groups = SHAPES[case.shape]
    dtype, out_dtype, small_dtype = case.dtypes
    x = _empty(N, C, H, W, dtype=dtype).contiguous(memory_format=LAYOUTS[case.layout])
    # The halves of a chunk lie 2C apart, a bias that is every sample's has a stride of 0.
    scale, shift = _empty(N, 2 * C, dtype=small_dtype).chunk(2, dim=1)
    tensors = (
        _empty(C),
        _empty(C),
        scale,
        shift,
        _empty(C, dtype=small_dtype).expand(N, -1),
    )
    there = [
        tensor if name in case.present else None
        for name, tensor in zip(NAMES, tensors, strict=True)
    ]
    modulation = Modulation(*there)
    seed = _empty(dtype=torch.int64) if case.dropout else None
    spec = Spec(groups, 1e-5, case.activation, case.dropout, out_dtype)
    mean = _empty(N, groups)
    problem = Problem(N, C, H * W, groups, case.layout == "nhwc", x.element_size())
    machine = MACHINES[arch]
    with launches.recording() as recorded:
        try:
            forward = plan_launch("forward", problem, machine, case.tier)
            backward = plan_launch("backward", problem, machine, case.tier)
        except ValueError:
            return []
        launches.forward(x, modulation, seed, spec, forward)
        rewrite = rewrite_launch(problem, machine)
        launches.rewrite(x, mean, mean, modulation, seed, spec, rewrite)
        launches.backward(x, x, mean, mean, modulation, seed, spec, backward)
    return recorded


def residuals() -> list[Any]:
    """The launches of the addition to the skip, with every layout, dtype and bias, even and odd."""
    from resblock_bench.kernels import launch as launches

    dtypes = dict.fromkeys((skip, h) for skip, h, _ in DTYPES)
    shapes = [SHAPES[name] for name in ("two channels a group", "odd sizes")]
    with launches.recording() as recorded:
        for layout, (skip, h), (N, C, H, W, _), bias in itertools.product(
            LAYOUTS.values(), dtypes, shapes, (True, False)
        ):
            both = (
                _empty(N, C, H, W, dtype=dtype).contiguous(memory_format=layout)
                for dtype in (skip, h)
            )
            launches.residual(*both, _empty(C, dtype=h) if bias else None, 0.5)
    return recorded


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@functools.cache
def variants(arch: int, short: bool) -> dict[str, Any]:
    """The launches that are compiled to different code, by a name of each.

    short: the first of every kernel and phase, in either layout, with and without dropout.
    """
    from resblock_bench.bench.compiled.machine_code import specialise

    found: dict[str, Any] = {}
    for item in _all(arch):
        given = item.arguments
        source = specialise(item.kernel, given)
        options = {k: v for k, v in given.items() if k not in item.kernel.arg_names}
        constants = {str(k): str(v) for k, v in source.constants.items()}
        alike = (_name(item), source.signature, constants, source.attrs, options)
        if short:
            alike = (_name(item), given.get("CHANNELS_LAST"), given.get("p_seed") is None)
        found.setdefault(str(alike), item)
    return {f"{i} {_name(item)}": item for i, item in enumerate(found.values())}


def _all(arch: int) -> Iterator[Any]:
    for case in cases():
        yield from launched(case, arch)
    yield from residuals()


def _name(item: Any) -> str:
    phase = item.arguments.get("PHASE")
    return f"{item.kernel.__name__}{f' {phase}' if phase else ''}"


def compile_variant(arch: int, short: bool, name: str) -> None:
    """Raises what Triton or ptxas says of it."""
    import triton
    from triton.backends.compiler import GPUTarget

    from resblock_bench.bench.compiled.machine_code import WARP_SIZE, specialise

    item = variants(arch, short)[name]
    options = {k: v for k, v in item.arguments.items() if k not in item.kernel.arg_names}
    source = specialise(item.kernel, item.arguments)
    triton.compile(source, target=GPUTarget("cuda", arch, WARP_SIZE), options=options)


def describe(arch: int, name: str, short: bool) -> str:
    """What a variant was launched with, for whoever looks for why it does not compile."""
    arguments = variants(arch, short)[name].arguments
    return ", ".join(
        f"{key}={_short(value)}" for key, value in arguments.items() if value is not None
    )


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return str(value)


def compile_all(arch: int, short: bool, processes: int) -> Compiled:
    import triton

    from resblock_bench.bench.compiled.machine_code import ptxas_knows

    found = Compiled(triton.__version__, arch, len(variants(arch, short)), {})
    if not ptxas_knows(arch):
        found.impossible = f"its ptxas does not know sm_{arch}"
        return found
    jobs = [
        workers.Job(False, compile_variant, (arch, short, name)) for name in variants(arch, short)
    ]
    for job, answer in workers.run(jobs, processes, limit_s=LIMIT_S):
        if answer.error is not None:
            name = job.arguments[2]
            found.failed[f"{name} ({describe(arch, name, short)})"] = _tail(str(answer.error))
    return found


def _tail(text: str) -> str:
    """The last of what a compiler says, which prints the source before it."""
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:100]} … {text[-300:]}"


def main(
    arch: Annotated[int, typer.Option()],
    short: Annotated[bool, typer.Option("--short")] = False,
    processes: Annotated[int, typer.Option()] = 1,
) -> None:
    found = compile_all(arch, short, processes)
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")


if __name__ == "__main__":
    typer.run(main)
