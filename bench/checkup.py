"""What about this machine would spoil a measurement, and what to do about it.

Reads only files and NVML counters that need no privilege; changes nothing.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from resblock_bench.bench import environment
from resblock_bench.bench.units import format_bytes


class Finding(NamedTuple):
    """One fact; `advice` is None where there is nothing to mend."""

    topic: str
    found: str
    advice: str | None = None


def findings(root: Path = Path("/")) -> list[Finding]:
    """Every finding about processor, load, power and GPU. `root` is where /sys and /proc hang."""
    found = [_governor(root), _load(root), _threads(root), _power(root), _memory(root)]
    return [*filter(None, found), *gpu_findings()]


def _governor(root: Path) -> Finding:
    folder = root / "sys/devices/system/cpu"
    governors = {
        path.read_text().strip() for path in folder.glob("cpu[0-9]*/cpufreq/scaling_governor")
    }
    if not governors:
        return Finding("CPU governor", "not visible here (a virtual machine or container)")
    text = ", ".join(sorted(governors))
    if governors == {"performance"}:
        return Finding("CPU governor", text)
    return Finding(
        "CPU governor", text, "clocks follow the load: set it to 'performance' while measuring"
    )


def _load(root: Path) -> Finding | None:
    try:
        minute = float((root / "proc/loadavg").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    cpus = os.cpu_count() or 1
    # Half a CPU of background work is what an idle desktop shows.
    busy = minute > 0.5
    advice = "other work competes for the CPUs: stop it, or expect wide intervals"
    return Finding("load average", f"{minute:.2f} on {cpus} CPUs", advice if busy else None)


def _threads(root: Path) -> Finding:
    usable, default = environment.usable_cpus(root), torch.get_num_threads()
    quota = environment.cgroup_quota(root)
    granted = "no cgroup quota" if quota is None else f"cgroup quota {quota:g}"
    found = f"{usable} usable CPUs ({granted}); PyTorch would start {default} threads"
    if default > usable:
        return Finding(
            "threads", found, f"set OMP_NUM_THREADS={usable} in your own programs; run does so"
        )
    return Finding("threads", found)


def _power(root: Path) -> Finding | None:
    supplies = root / "sys/class/power_supply"
    states = {path.parent.name: path.read_text().strip() for path in supplies.glob("*/online")}
    if not states:
        return None
    if "1" in states.values():
        return Finding("power", "mains")
    return Finding("power", "battery", "a laptop on battery lowers its clocks: plug it in")


def _memory(root: Path) -> Finding | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        available, total = fields["MemAvailable"], fields["MemTotal"]
    except (OSError, ValueError, IndexError, KeyError):
        return None
    found = f"{format_bytes(available)} available of {format_bytes(total)}"
    short = available < 0.25 * total
    return Finding("memory", found, "little is free: close what holds it" if short else None)


def gpu_findings() -> list[Finding]:
    """What NVML says of each GPU; a single finding where there is no GPU or no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [Finding("GPU", f"none visible to NVML ({error})")]
    found: list[Finding] = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            found += _one_gpu(pynvml.nvmlDeviceGetHandleByIndex(index), f"GPU {index}")
    finally:
        pynvml.nvmlShutdown()
    if found and not torch.cuda.is_available():
        advice = "this PyTorch cannot use the GPU: install a CUDA build that fits the driver"
        found.append(Finding("PyTorch", f"{torch.__version__}, no CUDA", advice))
    return found


def _one_gpu(handle: object, topic: str) -> list[Finding]:
    import pynvml

    found = [Finding(topic, str(pynvml.nvmlDeviceGetName(handle)))]
    try:
        temperature = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        now = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        most = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
        hot = "let it cool: it will lower its clocks" if temperature >= 80 else None
        found.append(Finding(topic, f"{temperature} °C, SM clock {now} of {most} MHz", hot))
        processes = len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
        shared = "others use this GPU: stop them, or pick a free one" if processes else None
        found.append(Finding(topic, f"{processes} compute processes", shared))
        if pynvml.nvmlDeviceGetPersistenceMode(handle) == 0:
            found.append(
                Finding(topic, "persistence mode off", "each run starts cold: nvidia-smi -pm 1")
            )
    except pynvml.NVMLError as error:
        found.append(Finding(topic, f"NVML does not say more ({error})"))
    return found
