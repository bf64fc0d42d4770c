import io
import re

import pynvml
import pytest
from rich.console import Console
from support.fake_nvml import FakeGpu, FakeNvml, processes

from resblock_bench.bench.cli.listing import machine
from resblock_bench.bench.machine import environment, nvml
from resblock_bench.bench.machine.checkup import Fact, cpu_facts
from resblock_bench.bench.machine.checkup_gpu import gpu_facts

A = "GPU-aaaaaaaa-86f3-7a43-b711-4771313afc50"
B = "GPU-bbbbbbbb-86f3-7a43-b711-4771313afc50"
SLICE = "MIG-cccccccc-86f3-7a43-b711-4771313afc50"


def install(monkeypatch: pytest.MonkeyPatch, *gpus: FakeGpu, **options) -> FakeNvml:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    fake = FakeNvml(*gpus, **options)
    monkeypatch.setattr(nvml, "pynvml", fake)
    return fake


def to_mend(found: list[Fact]) -> list[Fact]:
    return [finding for finding in found if finding.advice is not None]


def test_a_good_gpu_takes_two_lines_and_nothing_is_to_mend(monkeypatch) -> None:
    fake = install(monkeypatch, FakeGpu(A))
    driver, name, state = gpu_facts({})
    assert driver.found == "580.1"
    assert (name.topic, name.found) == ("GPU 0", f"NVIDIA Test, 8.0 GiB, {A}")
    assert state.found == (
        "SM clock 1500 of 1980 MHz, memory 2600 MHz; nothing holds the clocks back; 41 °C; "
        "250 W, capped at 700 W; ECC on; persistence mode on; no other process computes on it"
    )
    assert to_mend([driver, name, state]) == []
    assert fake.open == 0


@pytest.mark.parametrize(
    ("answers", "found", "command"),
    [
        (
            {"nvmlDeviceGetCurrentClocksEventReasons": 0x4 | 0x40},
            "held back now by power cap, hardware thermal slowdown",
            f"nvidia-smi -i {A} -q -d PERFORMANCE",
        ),
        (
            {"nvmlDeviceGetTemperature": {pynvml.NVML_TEMPERATURE_GPU: 80}},
            "80 °C",
            f"watch nvidia-smi -i {A} -q -d TEMPERATURE",
        ),
        (
            {"nvmlDeviceGetEnforcedPowerLimit": 350_000},
            "capped at 350 W of 700 W by default",
            f"sudo nvidia-smi -i {A} -pl 700",
        ),
        ({"nvmlDeviceGetMigMode": [1, 0]}, "MIG on", f"sudo nvidia-smi -i {A} -mig 0"),
        (
            {"nvmlDeviceGetPersistenceMode": 0},
            "persistence mode off",
            f"sudo nvidia-smi -i {A} -pm 1",
        ),
        (
            {"nvmlDeviceGetComputeRunningProcesses": processes(999_999_999)},
            "other processes compute on it: 999999999",
            "nvidia-smi",
        ),
    ],
)
def test_each_defect_comes_with_the_command_that_mends_it(
    monkeypatch, answers, found: str, command: str
) -> None:
    install(monkeypatch, FakeGpu(A, **answers))
    (finding,) = to_mend(gpu_facts({}))
    assert finding.topic == "GPU 0"
    assert found in finding.found
    assert finding.command == command


def test_only_visible_gpus_are_looked_at_and_a_free_one_is_offered(monkeypatch) -> None:
    busy = FakeGpu(B, nvmlDeviceGetComputeRunningProcesses=processes(999_999_999))
    install(monkeypatch, FakeGpu(A, nvmlDeviceGetPersistenceMode=0), busy)
    found = gpu_facts({"CUDA_VISIBLE_DEVICES": "1"})
    assert B in found[1].found
    (finding,) = to_mend(found)
    assert finding.command == f"export CUDA_VISIBLE_DEVICES={A}"


def test_commands_for_a_slice_name_the_whole_gpu(monkeypatch) -> None:
    whole = FakeGpu(A, nvmlDeviceGetMigMode=[1, 0])
    fake = install(monkeypatch, whole)
    fake.slices.append(FakeGpu(SLICE, nvmlDeviceGetDeviceHandleFromMigDeviceHandle=whole))
    found = gpu_facts({"CUDA_VISIBLE_DEVICES": SLICE})
    assert SLICE in found[1].found
    assert [finding.command for finding in to_mend(found)] == [f"sudo nvidia-smi -i {A} -mig 0"]


def test_a_hidden_gpu_is_a_finding(monkeypatch) -> None:
    install(monkeypatch, FakeGpu(A))
    (finding,) = to_mend(gpu_facts({"CUDA_VISIBLE_DEVICES": "-1"}))
    assert finding.command == "unset CUDA_VISIBLE_DEVICES"
    install(monkeypatch)
    assert to_mend(gpu_facts({})) == []


def test_a_pytorch_that_cannot_use_the_gpu_is_a_finding(monkeypatch) -> None:
    install(monkeypatch, FakeGpu(A))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (finding,) = to_mend(gpu_facts({}))
    assert (finding.topic, "no CUDA" in finding.found) == ("PyTorch", True)


def test_without_a_driver_there_is_one_finding(monkeypatch) -> None:
    install(monkeypatch, init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    (finding,) = gpu_facts({})
    assert finding.advice is None
    assert "Library Not Found" in finding.found


def test_a_failing_question_costs_its_own_line_only(monkeypatch) -> None:
    error = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    install(monkeypatch, FakeGpu(A, nvmlDeviceGetTemperature=error))
    state = gpu_facts({})[2].found
    assert "temperature: NVML failed (GPU is lost)" in state
    assert "250 W" in state


def test_a_gpu_that_supports_nothing_is_no_error(monkeypatch) -> None:
    gpu = FakeGpu(A)
    gpu.answers = {"nvmlDeviceGetUUID": A}
    install(monkeypatch, gpu)
    found = gpu_facts({})
    assert to_mend(found) == []
    assert "SM clock ? of ? MHz" in found[2].found


def test_a_bad_gpu_is_only_read_and_fits_the_screen(monkeypatch) -> None:
    bad = FakeGpu(
        A,
        nvmlDeviceGetCurrentClocksEventReasons=0x4 | 0x8 | 0x40,
        nvmlDeviceGetTemperature={pynvml.NVML_TEMPERATURE_GPU: 92},
        nvmlDeviceGetEnforcedPowerLimit=350_000,
        nvmlDeviceGetMigMode=[1, 0],
        nvmlDeviceGetPersistenceMode=0,
        nvmlDeviceGetComputeRunningProcesses=processes(999_999_998, 999_999_999),
    )
    fake = install(monkeypatch, bad, FakeGpu(B))
    found = gpu_facts({})
    assert fake.called
    reading = re.compile("nvml(Init|Shutdown|SystemGet|DeviceGet)")
    assert [name for name in fake.called if not reading.match(name)] == []

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    console = Console(file=io.StringIO(), width=100)
    console.print(machine(environment.gather(2), [*cpu_facts(), *found]))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 100
    for finding in to_mend(found):
        # A command that is folded cannot be copied.
        assert any(line.endswith(f"$ {finding.command}") for line in lines)
