"""Options of a sweep that do not fit each other, found before anything is opened."""

from collections.abc import Sequence

from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.machine.visible_gpus import chosen_gpus

ENGINES = ("local", "ray")


def require_fitting(
    plan: Plan, engine: str, devices: Sequence[str], accelerator: str | None
) -> None:
    """Raises UsageError for an option that the engine or the device of the plan has no use for."""
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if plan.device == "cpu" and devices:
        raise UsageError("--devices names GPUs, and this run measures on the CPU: leave it out")
    if plan.device == "cuda" and plan.memory_limit_bytes is not None:
        raise UsageError("--memory-limit is for cells on a CPU: leave it out")
    if engine == "local" and accelerator is not None:
        raise UsageError("--accelerator goes with --engine ray: name local GPUs with --devices")
    if engine == "ray" and devices:
        raise UsageError(
            "--devices names GPUs of this machine, and --engine ray finds its own: leave it out, "
            "or choose a type of GPU with --accelerator"
        )
    if devices:
        chosen_gpus(devices)
