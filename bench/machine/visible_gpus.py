"""Which GPUs CUDA_VISIBLE_DEVICES lets a program see, found without starting CUDA."""

import functools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from resblock_bench.bench.errors import UsageError, unknown

from . import nvml

_ASK_CUDA = """
import torch
for i in range(torch.cuda.device_count()):
    gpu = torch.cuda.get_device_properties(i)
    print(f"GPU-{gpu.uuid}", gpu.total_memory, gpu.name)
"""
_ASK_S = 120.0


class VisibleGpu(NamedTuple):
    """A GPU, or the MIG slice that is named in its place."""

    uuid: str
    name: str | None
    memory_bytes: int | None


def visible_gpus(environ: Mapping[str, str]) -> list[VisibleGpu]:
    """The GPUs that a program with these environment variables sees, in CUDA's order.

    Without CUDA_VISIBLE_DEVICES these are all of them. With it, the list ends at the first entry
    that names no GPU, such as -1, and is empty when a GPU is named twice, as CUDA has it. Indices
    follow PCI bus addresses. CUDA counts so with CUDA_DEVICE_ORDER=PCI_BUS_ID; by default it puts
    the fastest first, which is the same where all GPUs are alike. Where they are not, name UUIDs.
    A GPU in MIG mode is listed whole unless a slice is named, though CUDA sees one slice of it.

    Raises NvmlError without a driver.
    """
    with nvml.session():
        everyone = nvml.all_uuids()
        entries = environ.get("CUDA_VISIBLE_DEVICES")
        uuids = everyone if entries is None else _named(entries.split(","), everyone)
        gpus = map(nvml.NvmlGpu, uuids)
        return [VisibleGpu(gpu.uuid, gpu.name(), gpu.memory_bytes()) for gpu in gpus]


def chosen_gpus(wanted: Sequence[str]) -> list[VisibleGpu]:
    """Of the visible GPUs those named by position or UUID; all where none is named.

    Where NVML fails CUDA is asked: a run does without NVML.

    Raises UsageError for a name that fits none, and where no GPU is visible.
    """
    try:
        visible = visible_gpus(os.environ)
    except nvml.NvmlError as error:
        visible = _asked_of_cuda(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if not visible:
            raise UsageError(f"no GPU can be used: {error}; use --device cpu") from None
    if not visible:
        raise UsageError("no GPU is visible: mend CUDA_VISIBLE_DEVICES, or use --device cpu")
    known = {str(position): gpu for position, gpu in enumerate(visible)}
    known |= {gpu.uuid: gpu for gpu in visible}
    for name in wanted:
        if name.strip() not in known:
            raise unknown("GPU", name, known)
    chosen = [known[name.strip()] for name in wanted] or visible
    kinds = {gpu.name for gpu in chosen}
    if len(kinds) > 1:
        raise UsageError(
            f"the GPUs are of several kinds ({', '.join(sorted(map(str, kinds)))}), and one run "
            "compares cells on one: choose with --devices or CUDA_VISIBLE_DEVICES"
        )
    return list(dict.fromkeys(chosen))


@functools.cache
def _asked_of_cuda(variable: str | None) -> list[VisibleGpu]:
    """The GPUs that PyTorch sees, in a process of its own; none where it cannot be asked.

    variable   of the environment: with another one others are visible
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_CUDA],
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
            timeout=_ASK_S,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    lines = (line.split(maxsplit=2) for line in done.stdout.splitlines())
    return [VisibleGpu(uuid, name, int(memory)) for uuid, memory, name in lines]


def _named(entries: list[str], everyone: list[str]) -> list[str]:
    uuids: list[str] = []
    for entry in map(str.strip, entries):
        uuid = _one(entry, everyone)
        if uuid is None:
            break
        if uuid in uuids:
            return []
        uuids.append(uuid)
    return uuids


def _one(entry: str, everyone: list[str]) -> str | None:
    if entry.isdecimal():
        return everyone[int(entry)] if int(entry) < len(everyone) else None
    if entry.startswith("MIG-"):
        try:
            return nvml.NvmlGpu(entry).uuid
        except nvml.NvmlError:
            return None
    matches = [uuid for uuid in everyone if entry.startswith("GPU-") and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None
