import os
from contextlib import closing
from pathlib import Path

import pynvml
import pytest
import torch
from support.fake_nvml import FakeGpu, FakeNvml, processes

from resblock_bench.bench.machine import nvml
from resblock_bench.bench.machine.proc import is_relative, read_cpu
from resblock_bench.bench.machine.visible_gpus import visible_gpus
from resblock_bench.bench.measure.telemetry import (
    CpuProbe,
    GpuProbe,
    Reading,
    open_probe,
)

OWN = os.getpid()
HZ = os.sysconf("SC_CLK_TCK")
A, B = "GPU-aaaa-1", "GPU-bbbb-2"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def status(pid: int, parent: int, *ticks: int) -> str:
    """A line of /proc/PID/stat with a name that is hard to read past."""
    times = " ".join(map(str, ticks or (0, 0, 0, 0)))
    return f"{pid} (a) b ( c) R {parent} 1 1 0 -1 0 1 2 3 4 {times} 20 0 1 0 5 6 7\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A recorded machine: 100 → 10 is this process's parent, 400 its child, 300 a stranger."""
    cpu = min(os.sched_getaffinity(0))
    write(
        tmp_path,
        {
            "proc/stat": "cpu  1000 200 300 99999 8888 40 50 600 77 7\ncpu0 1 2 3 4 5 6 7 8 9 0\n",
            "proc/cpuinfo": f"processor : {cpu}\ncpu MHz : 2400.5\nprocessor : 9999\ncpu MHz : 1\n",
            f"proc/{OWN}/stat": status(OWN, 100, 11, 22, 33, 44),
            "proc/100/stat": status(100, 10),
            "proc/10/stat": status(10, 1),
            "proc/1/stat": status(1, 0),
            "proc/300/stat": status(300, 1),
            "proc/400/stat": status(400, OWN),
        },
    )
    return tmp_path


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    fake = FakeNvml(FakeGpu(A, nvmlDeviceGetPowerUsage=1000), FakeGpu(B))
    monkeypatch.setattr(nvml, "pynvml", fake)
    return fake


def read_once(machine: Path) -> Reading:
    with closing(GpuProbe(B, machine)) as probe:
        return probe.read()


def test_cpu_times_are_seconds_without_idleness_guests_and_steal(machine: Path) -> None:
    found = read_cpu(machine)
    assert found.busy_s == pytest.approx((1000 + 200 + 300 + 40 + 50) / HZ)
    assert found.own_s == pytest.approx((11 + 22 + 33 + 44) / HZ)
    assert found.stolen_s == pytest.approx(600 / HZ)
    assert found.notes == []


def test_the_clock_is_the_usable_cpus_from_cpufreq_or_cpuinfo(machine: Path) -> None:
    assert read_cpu(machine).mhz == 2400.5
    usable = sorted(os.sched_getaffinity(0))
    for cpu, mhz in zip(usable, range(1000, 9000, 100), strict=False):
        write(
            machine,
            {f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq": f"{mhz}000\n"},
        )
    assert read_cpu(machine).mhz == pytest.approx(1000 + 50 * (len(usable) - 1))


@pytest.mark.parametrize("text", [None, "", "intr 1 2\n", "cpu 1 2 3\n", "cpu a b c d e f g h\n"])
def test_a_machine_without_cpu_times_leaves_a_note(machine: Path, text: str | None) -> None:
    (machine / "proc/stat").unlink()
    if text is not None:
        write(machine, {"proc/stat": text})
    found = CpuProbe(machine).read()
    assert (found.busy_cpu_s, found.own_cpu_s, found.stolen_cpu_s) == (None, None, None)
    assert "CPU times cannot be read" in found.notes[0]


def test_relatives_are_ancestors_and_descendants(machine: Path) -> None:
    relatives = [pid for pid in (OWN, 100, 10, 1, 300, 400, 999) if is_relative(pid, machine)]
    assert relatives == [OWN, 100, 10, 1, 400]


def test_this_machine_can_be_read() -> None:
    probe = open_probe("cpu", None)
    first, last = probe.read(), probe.read()
    probe.close()
    assert last.t_s >= first.t_s
    assert first.power_w is None


def test_the_gpu_of_the_uuid_is_read_and_the_processor_beside_it(
    gpus: FakeNvml, machine: Path
) -> None:
    """The wrong GPU would be the first; the program sees the second only."""
    gpus.gpus[1].throttle(THERMAL=3000)
    probe = GpuProbe(B.removeprefix("GPU-"), machine)
    found = probe.read()
    assert (found.sm_clock_mhz, found.memory_clock_mhz, found.power_w) == (1500, 2600, 250)
    assert (found.temperature_c, found.energy_j) == (41, 1234.5)
    assert found.throttled_us == {"thermal limit": 3}
    assert found.busy_cpu_s == pytest.approx(1590 / HZ)
    assert found.notes == []
    assert gpus.open == 1
    probe.close()
    assert gpus.open == 0
    assert probe.read().notes == ["the probe is closed"]


def test_the_visible_gpu_is_read_and_not_the_first(gpus: FakeNvml) -> None:
    (visible,) = visible_gpus({"CUDA_VISIBLE_DEVICES": "1"})
    with closing(open_probe("cuda", visible.uuid)) as probe:
        assert probe.read().power_w == 250


def test_strangers_on_the_gpu_are_counted_and_relatives_are_not(
    gpus: FakeNvml, machine: Path
) -> None:
    gpus.gpus[1].answers["nvmlDeviceGetComputeRunningProcesses"] = processes(OWN, 100, 300, 400, 9)
    assert read_once(machine).foreign_processes == 2


@pytest.mark.parametrize("listed", [[], [777]])
def test_a_driver_that_hides_this_process_cannot_tell_others(
    gpus: FakeNvml, machine: Path, monkeypatch: pytest.MonkeyPatch, listed: list[int]
) -> None:
    gpus.gpus[1].answers["nvmlDeviceGetComputeRunningProcesses"] = processes(*listed)
    assert read_once(machine).foreign_processes == len(listed)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    found = read_once(machine)
    assert found.foreign_processes is None
    assert "does not list this process" in found.notes[0]


def test_nvml_that_fails_in_between_leaves_a_note_and_the_processor(
    gpus: FakeNvml, machine: Path
) -> None:
    probe = GpuProbe(B, machine)
    assert probe.read().power_w == 250
    error = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    gpus.gpus[1].answers = dict.fromkeys(gpus.gpus[1].answers, error)
    found = probe.read()
    assert (found.power_w, found.energy_j, found.throttled_us) == (None, None, None)
    assert found.foreign_processes is None
    assert found.own_cpu_s == pytest.approx(110 / HZ)
    (note,) = found.notes
    assert note.startswith("NVML failed: GPU is lost (sm_clock_mhz, ")
    probe.close()


def test_one_failing_counter_costs_that_counter_only(gpus: FakeNvml, machine: Path) -> None:
    error = pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
    gpus.gpus[1].answers["nvmlDeviceGetComputeRunningProcesses"] = error
    found = read_once(machine)
    assert (found.power_w, found.foreign_processes) == (250, None)
    assert found.notes == ["NVML failed: Insufficient Permissions (foreign_processes)"]


@pytest.mark.parametrize(
    ("uuid", "note"), [(None, "UUID is unknown"), ("GPU-other", "NVML failed: Not Found")]
)
def test_without_the_gpu_the_processor_is_read(gpus: FakeNvml, machine: Path, uuid, note) -> None:
    probe = GpuProbe(uuid, machine)
    found = probe.read()
    assert found.busy_cpu_s is not None
    assert note in found.notes[0]
    probe.close()
    assert gpus.open == 0


def test_without_a_driver_a_run_goes_on(gpus: FakeNvml) -> None:
    gpus.init = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    probe = open_probe("cuda", B)
    assert "NVML failed: Driver Not Loaded" in probe.read().notes
    probe.close()
