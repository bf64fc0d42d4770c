"""The checkup of the GPUs that a program started now would see."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from resblock_bench.bench.units import format_bytes

from . import nvml
from .checkup import Fact, judged
from .proc import is_relative
from .visible_gpus import visible_gpus

# Below this most GPUs do not slow down for their temperature.
_HOT_C = 80


def gpu_facts(environ: Mapping[str, str]) -> list[Fact]:
    """What the driver says of each visible GPU; one fact where there is none, or no driver."""
    try:
        with nvml.session():
            gpus = visible_gpus(environ)
            found = [Fact("GPU driver", nvml.driver_version() or "version unknown")]
            for number, gpu in enumerate(gpus):
                topic = f"GPU {number}"
                memory = "" if gpu.memory_bytes is None else f", {format_bytes(gpu.memory_bytes)}"
                found.append(Fact(topic, f"{gpu.name or 'name unknown'}{memory}, {gpu.uuid}"))
                found += _one_gpu(nvml.NvmlGpu(gpu.uuid), topic)
    except nvml.NvmlError as error:
        return [Fact("GPU", f"none visible to NVML ({error})")]
    if not gpus:
        found.append(_nothing_visible(environ))
    elif not torch.cuda.is_available():
        advice = "this PyTorch cannot use the GPU: install a CUDA build that fits the driver"
        found.append(Fact("PyTorch", f"{torch.__version__}, no CUDA", advice))
    return found


def _nothing_visible(environ: Mapping[str, str]) -> Fact:
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return Fact("GPU", "none")
    return Fact(
        "GPU",
        f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU",
        "programs will run on the CPU: name a GPU, or unset it",
        "unset CUDA_VISIBLE_DEVICES",
    )


def _one_gpu(gpu: nvml.NvmlGpu, topic: str) -> list[Fact]:
    """One line of all that is well, then what is to mend."""
    found: list[Fact] = []
    for check in (_clocks, _throttles, _temperature, _power, _modes, _processes):
        try:
            found += check(gpu)
        except nvml.NvmlError as error:
            found.append(Fact("", f"{check.__name__.strip('_')}: NVML failed ({error})"))
    well = "; ".join(fact.found for fact in found if fact.advice is None)
    return [
        Fact(topic, well),
        *(fact._replace(topic=topic) for fact in found if fact.advice is not None),
    ]


def _clocks(gpu: nvml.NvmlGpu) -> Iterator[Fact]:
    sm, most, memory = gpu.sm_clock_mhz(), gpu.max_sm_clock_mhz(), gpu.memory_clock_mhz()
    yield Fact("", f"SM clock {_number(sm)} of {_number(most)} MHz, memory {_number(memory)} MHz")


def _throttles(gpu: nvml.NvmlGpu) -> Iterator[Fact]:
    active = gpu.active_throttles()
    if active is not None:
        held = ", ".join(active)
        yield judged(
            "",
            f"clocks held back now by {held}" if active else "nothing holds the clocks back",
            "timings will follow that, not the code: see the reasons and mend them first",
            f"nvidia-smi -i {gpu.whole_uuid} -q -d PERFORMANCE",
            well=not active,
        )


def _temperature(gpu: nvml.NvmlGpu) -> Iterator[Fact]:
    celsius = gpu.temperature_c()
    if celsius is not None:
        yield judged(
            "",
            f"{celsius:.0f} °C",
            "it will lower its clocks: let it cool, and watch it",
            f"watch nvidia-smi -i {gpu.whole_uuid} -q -d TEMPERATURE",
            well=celsius < _HOT_C,
        )


def _power(gpu: nvml.NvmlGpu) -> Iterator[Fact]:
    cap, default = gpu.power_cap_w(), gpu.default_power_cap_w()
    found = f"{_number(gpu.power_w())} W, capped at {_number(cap)} W"
    if cap is None or default is None or cap >= default:
        yield Fact("", found)
        return
    yield Fact(
        "",
        f"{found} of {default:.0f} W by default",
        "the cap lowers the clocks under load: raise it, or compare only with runs under it",
        f"sudo nvidia-smi -i {gpu.whole_uuid} -pl {default:.0f}",
    )


def _modes(gpu: nvml.NvmlGpu) -> Iterator[Fact]:
    ecc, mig, persistence = gpu.ecc(), gpu.mig(), gpu.persistence()
    if ecc is not None:
        yield Fact("", f"ECC {_on(ecc)}")
    if mig:
        yield Fact(
            "",
            "MIG on",
            "slices share power and heat, and a program sees one of them: switch it off",
            f"sudo nvidia-smi -i {gpu.whole_uuid} -mig 0",
        )
    if persistence is not None:
        yield judged(
            "",
            f"persistence mode {_on(persistence)}",
            "the driver is loaded anew for each run, clocks start cold",
            f"sudo nvidia-smi -i {gpu.whole_uuid} -pm 1",
            well=persistence,
        )


def _processes(gpu: nvml.NvmlGpu) -> Iterator[Fact]:
    others = _others(gpu)
    if others is None:
        return
    if not others:
        yield Fact("", "no other process computes on it")
        return
    free = next((uuid for uuid in nvml.all_uuids() if _others(nvml.NvmlGpu(uuid)) == []), None)
    advice = "wait for them" if free is None else "pick a free one"
    yield Fact(
        "",
        f"other processes compute on it: {', '.join(map(str, others))}",
        f"they take its time and memory: {advice}",
        "nvidia-smi" if free is None else f"export CUDA_VISIBLE_DEVICES={free}",
    )


def _others(gpu: nvml.NvmlGpu) -> list[int] | None:
    listed = gpu.processes()
    if listed is None:
        return None
    return [pid for pid in listed if not is_relative(pid, Path("/"))]


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _on(value: bool) -> str:
    return "on" if value else "off"
