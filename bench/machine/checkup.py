"""What about this machine would spoil a measurement, and what to do about it.

Reads only files that need no privilege; changes nothing.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from resblock_bench.bench.units import format_bytes
from resblock_bench.kernels import versions

from . import proc


class Fact(NamedTuple):
    """One fact; `advice` and the `command` that follows it are None where nothing is to mend."""

    topic: str
    found: str
    advice: str | None = None
    command: str | None = None


def judged(topic: str, found: str, advice: str, command: str | None = None, *, well: bool) -> Fact:
    """A fact with its advice, unless all is well."""
    return Fact(topic, found) if well else Fact(topic, found, advice, command)


def versions_fact() -> Fact:
    """Whether the kernels were tested with the torch and the Triton that are installed."""
    pair = versions.installed()
    found = versions.describe(pair)
    return judged("versions", found, versions.advice(), well=versions.tested(pair))


def cpu_facts(root: Path = Path("/")) -> list[Fact]:
    """What is found of the processor, its load and its limits; `root` holds /sys and /proc."""
    found = [
        Fact("CPU", proc.cpu_model(root) or "model unknown"),
        _governor(root),
        _turbo(root),
        _smt(root),
        _load(root),
        _threads(root),
        _power(root),
        _memory(root),
    ]
    return [fact for fact in found if fact is not None]


def _governor(root: Path) -> Fact:
    folder = root / "sys/devices/system/cpu"
    governors = {
        path.read_text().strip() for path in folder.glob("cpu[0-9]*/cpufreq/scaling_governor")
    }
    if not governors:
        return Fact("CPU governor", "not visible here (a virtual machine or container)")
    return judged(
        "CPU governor",
        ", ".join(sorted(governors)),
        "clocks follow the load: set it to 'performance' while measuring",
        "sudo cpupower frequency-set -g performance",
        well=governors == {"performance"},
    )


def _turbo(root: Path) -> Fact | None:
    folder = root / "sys/devices/system/cpu"
    for name, on, off in (("intel_pstate/no_turbo", "0", "1"), ("cpufreq/boost", "1", "0")):
        state = proc.read(folder / name)
        if state in (on, off):
            return judged(
                "turbo",
                "on" if state == on else "off",
                "clocks vary with heat and busy cores: switch it off to compare runs",
                f"echo {off} | sudo tee /sys/devices/system/cpu/{name}",
                well=state == off,
            )
    return None


def _smt(root: Path) -> Fact | None:
    active = proc.read(root / "sys/devices/system/cpu/smt/active")
    if active not in ("0", "1"):
        return None
    cores = proc.physical_cores(root)
    if active == "0" or cores is None or proc.usable_cpus(root) <= cores:
        return Fact("SMT", "on" if active == "1" else "off")
    return Fact(
        "SMT",
        f"on, {cores} cores",
        "two threads on a core slow each other: measure with one a core",
        f"resblock-bench run --threads {cores}",
    )


def _load(root: Path) -> Fact | None:
    try:
        minute = float(proc.read(root / "proc/loadavg").split()[0])
    except (ValueError, IndexError):
        return None
    return judged(
        "load average",
        f"{minute:.2f} on {os.cpu_count() or 1} CPUs",
        "other work competes for the CPUs: stop it, or expect wide intervals",
        "ps -eo pid,user,pcpu,args --sort=-pcpu | head",
        well=minute <= 0.5,  # an idle desktop has half a CPU of background work
    )


def _threads(root: Path) -> Fact:
    usable, default = proc.usable_cpus(root), torch.get_num_threads()
    quota = proc.cgroup_quota(root)
    granted = "no cgroup quota" if quota is None else f"cgroup quota {quota:g}"
    return judged(
        "threads",
        f"{usable} usable CPUs ({granted}); PyTorch would start {default} threads",
        "more threads than CPUs wait for each other in your own programs; run takes care of it",
        f"export OMP_NUM_THREADS={usable}",
        well=default <= usable,
    )


def _power(root: Path) -> Fact | None:
    supplies = root / "sys/class/power_supply"
    states = {path.parent.name: path.read_text().strip() for path in supplies.glob("*/online")}
    if not states:
        return None
    mains = "1" in states.values()
    advice = "a laptop on battery lowers its clocks: plug it in"
    return judged("power", "mains" if mains else "battery", advice, well=mains)


def _memory(root: Path) -> Fact | None:
    available, total = (
        proc.field(root / "proc/meminfo", name) for name in ("MemAvailable", "MemTotal")
    )
    if available is None or total is None:
        return None
    found = f"{format_bytes(available * 1024)} available of {format_bytes(total * 1024)}"
    limit = proc.cgroup_memory(root)
    if limit is not None and limit < total * 1024:
        found += f", cgroup limit {format_bytes(limit)}"
    return judged(
        "memory",
        found,
        "little is free: close what holds it",
        "ps -eo pid,user,rss,args --sort=-rss | head",
        well=available >= 0.25 * total,
    )
