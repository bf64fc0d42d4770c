"""What this machine reaches at best: bytes moved and matrix operations a second.

A ceiling is a maximum, so each figure is the best of several samples and of several sizes:

    copy     one copy far larger than any cache; what is read plus what is written
    peak     copies of all sizes down to those that stay in a cache
    matrix   square products, growing until one takes too long; 2n³ operations

The samples come from the device's own timer. It flushes a GPU's L2 before a sample, so there a
sample of a small size holds many copies, of which only the first finds its bytes in memory.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from msgspec.structs import replace

from resblock_bench.bench.records import Ceilings

from .conditions import conditions
from .devices import Device
from .telemetry import open_probe
from .timing import Sampler
from .workload import DTYPES

COPY_BYTES = {"cpu": (64 * 2**20, 512 * 2**20), "cuda": (256 * 2**20, 1024 * 2**20)}
"""The source of the largest copy: four times the largest cache, but within these limits."""
LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
"""Such as 32768K."""
SMALLEST_COPY_BYTES = 64 * 2**10
COPIES = {"cpu": 4, "cuda": 64}
"""In one sample of a small size, at most. A CPU's threads meet after each, which takes long where
other programs hold one up; a GPU's first copy misses its flushed cache."""
SMALLEST_PRODUCT = {"fp32": 1024, "bf16": 128, "fp16": 128}
LARGEST_PRODUCT = 8192
PRODUCT_S = 0.02
"""Sizes are doubled until a product would take longer: 16 bits are slow on some CPUs."""
ATTEMPTS = 3
SAMPLES = 3
SAMPLING_S = 0.015
"""At least so many samples of each size, and then more for so long."""


def measure_ceilings(device: Device) -> Ceilings:
    """The ceilings of an opened device, in its dtypes and with TF32 as it was opened, off.

    Takes about a second on a CPU that is not busy otherwise, and leaves no memory behind. While
    others work it is done again, up to ATTEMPTS times, and the best is kept.
    """
    probe = open_probe(device.kind, device.uuid)
    found: Ceilings | None = None
    try:
        for _ in range(ATTEMPTS):
            before = probe.read()
            newer = _measured(device)
            gone = conditions(
                before, probe.read(), source=probe.source, images=0, threads=torch.get_num_threads()
            )
            newer = replace(newer, disturbances=gone.disturbances)
            found = newer if found is None else best(found, newer)
            if not newer.disturbances:
                break
    finally:
        probe.close()
        device.timer.close()
    assert found is not None
    return found


def best(one: Ceilings, other: Ceilings) -> Ceilings:
    """The highest figures of both; undisturbed if either is."""
    matrix = {
        name: max(rate, other.matrix_flops_per_s[name])
        for name, rate in one.matrix_flops_per_s.items()
    }
    return Ceilings(
        copy_bytes_per_s=max(one.copy_bytes_per_s, other.copy_bytes_per_s),
        peak_bytes_per_s=max(one.peak_bytes_per_s, other.peak_bytes_per_s),
        matrix_flops_per_s=matrix,
        disturbances=one.disturbances and other.disturbances,
    )


def _measured(device: Device) -> Ceilings:
    copy, peak = _bytes_per_s(device)
    matrix = {name: _flops_per_s(device, name) for name in SMALLEST_PRODUCT}
    return Ceilings(copy_bytes_per_s=copy, peak_bytes_per_s=peak, matrix_flops_per_s=matrix)


def _bytes_per_s(device: Device) -> tuple[float, float]:
    """Of the largest copy, and of the best."""
    least, most = COPY_BYTES[device.kind]
    largest = min(max(least, 4 * _cache_bytes(device)), most)
    source = torch.ones(largest // 4, device=device.torch_device)
    target = torch.zeros_like(source)
    copy = best = _best_per_s(device, lambda: target.copy_(source), 2 * largest)
    size = SMALLEST_COPY_BYTES
    while size <= largest // 4:
        repeats = min(COPIES[device.kind], largest // size)
        copies = functools.partial(_copy, source[: size // 4], target[: size // 4], repeats)
        best = max(best, _best_per_s(device, copies, 2 * size * repeats))
        size *= 4
    return copy, best


def _cache_bytes(device: Device) -> int:
    """The last level; 0 where the system does not say."""
    if device.kind == "cuda":
        return int(torch.cuda.get_device_properties(device.torch_device).L2_cache_size)
    try:
        return int(LAST_CACHE.read_text().strip().removesuffix("K")) * 2**10
    except (OSError, ValueError):
        return 0


def _copy(source: torch.Tensor, target: torch.Tensor, repeats: int) -> None:
    for _ in range(repeats):
        target.copy_(source)


def _flops_per_s(device: Device, name: str) -> float:
    size, best, seconds = SMALLEST_PRODUCT[name], 0.0, 0.0
    while size <= LARGEST_PRODUCT and seconds <= PRODUCT_S:
        a, b = torch.randn(2, size, size, device=device.torch_device).to(DTYPES[name])
        out = torch.empty_like(a)
        product = functools.partial(torch.mm, a, b, out=out)
        rate = _best_per_s(device, product, 2 * size**3)
        best, seconds, size = max(best, rate), 2 * (2 * size) ** 3 / rate, 2 * size
    return best


def _best_per_s(device: Device, step: Callable[[], object], amount: int) -> float:
    step()  # untimed: touches the memory, loads the library
    samples = Sampler(step, device.timer).burst(SAMPLING_S, least=SAMPLES)
    return amount / min(samples) * 1e3
