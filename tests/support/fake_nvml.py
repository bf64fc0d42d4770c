"""A machine's NVML for tests: the functions and constants of pynvml that are used, and no others.

Every name that is looked up with a call is written down in `called`.
"""

from types import SimpleNamespace
from typing import Any

import pynvml

FAILED = pynvml.NVML_ERROR_GPU_IS_LOST


class FakeGpu:
    """`answers` overrides what a function returns; an NVML error code among them is raised."""

    def __init__(self, uuid: str, **answers: Any) -> None:
        self.uuid = uuid
        self.answers: dict[str, Any] = {
            "nvmlDeviceGetUUID": uuid,
            "nvmlDeviceGetName": "NVIDIA Test",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=8 << 30),
            "nvmlDeviceGetComputeRunningProcesses": [],
            "nvmlDeviceGetClockInfo": {pynvml.NVML_CLOCK_SM: 1500, pynvml.NVML_CLOCK_MEM: 2600},
            "nvmlDeviceGetMaxClockInfo": {pynvml.NVML_CLOCK_SM: 1980},
            "nvmlDeviceGetTemperature": {pynvml.NVML_TEMPERATURE_GPU: 41},
            "nvmlDeviceGetPowerUsage": 250_000,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
            "nvmlDeviceGetTotalEnergyConsumption": 1_234_500,
            "nvmlDeviceGetCurrentClocksEventReasons": 0x1,
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetEccMode": [1, 0],  # current, pending
            "nvmlDeviceGetMigMode": [0, 1],
            "nvmlDeviceGetViolationStatus": {},
            "nvmlDeviceGetFieldValues": {},
        }
        self.answers.update(answers)

    def throttle(self, **nanoseconds: int) -> None:
        """Set what the driver counts for a policy, such as THERMAL=5000."""
        self.answers["nvmlDeviceGetViolationStatus"] = {
            getattr(pynvml, f"NVML_PERF_POLICY_{policy}"): SimpleNamespace(violationTime=ns)
            for policy, ns in nanoseconds.items()
        }


class FakeNvml:
    """Stands in for the module pynvml."""

    def __init__(self, *gpus: FakeGpu, init: int | None = None) -> None:
        self.gpus = gpus
        self.slices: list[FakeGpu] = []
        self.init = init
        self.open = 0
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            return getattr(pynvml, name)
        getattr(pynvml, name)  # a function that the real module lacks is a mistake
        if name.startswith("nvmlDeviceGet") and name[13:] not in ("Count",) and "By" not in name:
            return lambda *arguments: self._about(name, *arguments)
        return object.__getattribute__(self, f"_{name}")

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml"):
            object.__getattribute__(self, "called").add(name)
        return object.__getattribute__(self, name)

    def _nvmlInit(self) -> None:
        if self.init is not None:
            raise pynvml.NVMLError(self.init)
        self.open += 1

    def _nvmlShutdown(self) -> None:
        self.open -= 1

    def _nvmlSystemGetDriverVersion(self) -> str:
        self._need_session()
        return "580.1"

    def _nvmlDeviceGetCount(self) -> int:
        self._need_session()
        return len(self.gpus)

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        self._need_session()
        return self.gpus[index]

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        self._need_session()
        for gpu in (*self.gpus, *self.slices):
            if gpu.uuid == uuid:
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def _about(self, name: str, gpu: FakeGpu, argument: Any = None) -> Any:
        self._need_session()
        if name not in gpu.answers:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        answer = gpu.answers[name]
        if isinstance(answer, pynvml.NVMLError):
            raise answer
        if name == "nvmlDeviceGetFieldValues":
            return [_field(answer.get(field)) for field in argument]
        if isinstance(answer, dict):
            if argument not in answer:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return answer[argument]
        return answer

    def _need_session(self) -> None:
        if self.open < 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)


def _field(answer: tuple[int, int] | None) -> SimpleNamespace:
    """The field's value type and value, or one that is not supported."""
    if answer is None:
        return SimpleNamespace(nvmlReturn=pynvml.NVML_ERROR_NOT_SUPPORTED, valueType=0, value=None)
    kind, value = answer
    return SimpleNamespace(
        nvmlReturn=pynvml.NVML_SUCCESS, valueType=kind, value=SimpleNamespace(ullVal=value)
    )


def processes(*ids: int, held: int = 1 << 20) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid in ids]
