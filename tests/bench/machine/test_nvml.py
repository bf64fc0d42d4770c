import os

import pynvml
import pytest
from support.fake_nvml import FakeGpu, FakeNvml, processes

from resblock_bench.bench.machine import nvml
from resblock_bench.bench.machine.visible_gpus import visible_gpus

A, B, SLICE = "GPU-aaaa-1", "GPU-bbbb-2", "MIG-cccc-3"
LONG = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
SHORT = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT


def install(monkeypatch, *gpus, **options):
    fake = FakeNvml(*gpus, **options)
    monkeypatch.setattr(nvml, "pynvml", fake)
    return fake


def lost():
    return pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)


def test_every_question_exists_in_nvidia_ml_py_and_closes_its_session(monkeypatch) -> None:
    fake = install(monkeypatch, FakeGpu(A))
    with nvml.session():
        gpu = nvml.NvmlGpu(A)
        assert (gpu.sm_clock_mhz(), gpu.memory_clock_mhz(), gpu.temperature_c()) == (1500, 2600, 41)
        assert (gpu.power_w(), gpu.energy_j()) == (250, 1234.5)
        assert (gpu.power_cap_w(), gpu.default_power_cap_w()) == (700, 700)
        assert (gpu.ecc(), gpu.mig(), gpu.persistence()) == (True, False, True)
        assert (gpu.name(), gpu.memory_bytes()) == ("NVIDIA Test", 8 << 30)
    assert nvml.driver_version() == "580.1"
    assert fake.open == 0


@pytest.mark.parametrize("name", [B, B.removeprefix("GPU-")])
def test_a_gpu_is_found_by_its_uuid_with_and_without_prefix(monkeypatch, name: str) -> None:
    install(monkeypatch, FakeGpu(A, nvmlDeviceGetPowerUsage=1000), FakeGpu(B))
    with nvml.session():
        assert nvml.NvmlGpu(name).uuid == B
        assert nvml.NvmlGpu(name).power_w() == 250


def test_an_unknown_uuid_is_an_error(monkeypatch) -> None:
    install(monkeypatch, FakeGpu(A))
    with nvml.session(), pytest.raises(nvml.NvmlError, match="Not Found"):
        nvml.NvmlGpu("dddd")


def test_a_slice_has_its_own_processes_and_the_whole_gpus_clocks(monkeypatch) -> None:
    whole = FakeGpu(A, nvmlDeviceGetComputeRunningProcesses=processes(1, 2))
    fake = install(monkeypatch, whole)
    part = FakeGpu(SLICE, nvmlDeviceGetDeviceHandleFromMigDeviceHandle=whole)
    part.answers["nvmlDeviceGetComputeRunningProcesses"] = processes(2)
    part.answers["nvmlDeviceGetClockInfo"] = {}
    fake.slices.append(part)
    with nvml.session():
        gpu = nvml.NvmlGpu(SLICE.removeprefix("MIG-"))
        assert (gpu.uuid, gpu.whole_uuid) == (SLICE, A)
        assert list(gpu.processes() or {}) == [2]
        assert gpu.sm_clock_mhz() == 1500


def test_what_a_gpu_does_not_support_is_none_and_a_failure_is_an_error(monkeypatch) -> None:
    gpu = FakeGpu(A, nvmlDeviceGetTotalEnergyConsumption=lost())
    del gpu.answers["nvmlDeviceGetPowerUsage"]
    install(monkeypatch, gpu)
    with nvml.session():
        assert nvml.NvmlGpu(A).power_w() is None
        with pytest.raises(nvml.NvmlError, match="lost"):
            nvml.NvmlGpu(A).energy_j()


def test_a_function_that_nvidia_ml_py_lacks_is_none(monkeypatch) -> None:
    monkeypatch.delattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption")
    install(monkeypatch, FakeGpu(A))
    with nvml.session():
        assert nvml.NvmlGpu(A).energy_j() is None


def test_throttle_counters_come_from_policies_and_fields_in_microseconds(monkeypatch) -> None:
    gpu = FakeGpu(A, nvmlDeviceGetFieldValues={74: (LONG, 9_000), 77: (LONG, 8_000)})
    gpu.throttle(POWER=5_000, THERMAL=0)
    install(monkeypatch, gpu)
    with nvml.session():
        found = nvml.NvmlGpu(A).throttled_us()
    assert found == {"power cap": 5, "thermal limit": 0, "board limit": 8}


@pytest.mark.parametrize(
    "fields",
    [{252: (LONG, 7_000), 270: (SHORT, 50_000)}, {252: (SHORT, 50_000), 270: (LONG, 7_000)}],
    ids=["older driver", "newer driver"],
)
def test_moved_fields_are_told_by_their_type(monkeypatch, fields) -> None:
    install(monkeypatch, FakeGpu(A, nvmlDeviceGetFieldValues=fields))
    with nvml.session():
        assert nvml.NvmlGpu(A).throttled_us() == {"hardware thermal slowdown": 7}


def test_no_throttle_counters_at_all_are_none_and_not_zero(monkeypatch) -> None:
    install(monkeypatch, FakeGpu(A))
    with nvml.session():
        assert nvml.NvmlGpu(A).throttled_us() is None


@pytest.mark.parametrize("function", ["ClocksEventReasons", "ClocksThrottleReasons"])
def test_idleness_is_no_throttling(monkeypatch, function: str) -> None:
    gpu = FakeGpu(A)
    del gpu.answers["nvmlDeviceGetCurrentClocksEventReasons"]
    gpu.answers[f"nvmlDeviceGetCurrent{function}"] = 0x1 | 0x2 | 0x100
    install(monkeypatch, gpu)
    with nvml.session():
        assert nvml.NvmlGpu(A).active_throttles() == []
        gpu.answers[f"nvmlDeviceGetCurrent{function}"] = 0x1 | 0x4 | 0x40
        assert nvml.NvmlGpu(A).active_throttles() == ["power cap", "hardware thermal slowdown"]


def test_the_bits_of_throttle_reasons_are_nvidia_ml_pys() -> None:
    suffixes = {
        "power cap": "SwPowerCap",
        "hardware slowdown": "HwSlowdown",
        "sync boost": "SyncBoost",
        "thermal limit": "SwThermalSlowdown",
        "hardware thermal slowdown": "HwThermalSlowdown",
        "hardware power brake": "HwPowerBrakeSlowdown",
    }
    bits = {name: bit for bit, name in nvml._ACTIVE.items()}
    for name, suffix in suffixes.items():
        assert bits[name] == getattr(pynvml, f"nvmlClocksThrottleReason{suffix}")


def test_process_bytes_are_those_of_the_process_on_that_gpu(monkeypatch) -> None:
    busy = FakeGpu(B, nvmlDeviceGetComputeRunningProcesses=processes(os.getpid(), held=4096))
    fake = install(monkeypatch, FakeGpu(A), busy)
    assert nvml.process_bytes(B, os.getpid()) == 4096
    assert nvml.process_bytes(A, os.getpid()) is None
    busy.answers["nvmlDeviceGetComputeRunningProcesses"] = lost()
    assert nvml.process_bytes(B, os.getpid()) is None
    assert fake.open == 0


def test_without_a_driver_nothing_is_known(monkeypatch) -> None:
    install(monkeypatch, FakeGpu(A), init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert nvml.driver_version() is None
    assert nvml.process_bytes(A, 1) is None
    with pytest.raises(nvml.NvmlError, match="Not Found"):
        visible_gpus({})


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (None, [A, B]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", [B]),
        ("1,0", [B, A]),
        (" 1 , 0 ", [B, A]),
        ("1,-1,0", [B]),
        ("0,2,1", [A]),
        ("0,0", []),
        (f"0,{A}", []),
        (B, [B]),
        ("GPU-b", [B]),
        ("GPU-b,0", [B, A]),
        ("GPU-", []),
        ("GPU-x,0", []),
        ("bbbb-2", []),
        (SLICE, [SLICE]),
        ("MIG-x,0", []),
    ],
)
def test_visible_gpus_are_those_that_cuda_sees(monkeypatch, value, seen) -> None:
    fake = install(monkeypatch, FakeGpu(A), FakeGpu(B))
    fake.slices.append(FakeGpu(SLICE))
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [gpu.uuid for gpu in visible_gpus(environ)] == seen
    assert fake.open == 0
