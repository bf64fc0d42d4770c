"""What the NVIDIA driver says of a GPU, through NVML: the only file that imports pynvml.

A GPU is named by its UUID, never by an index: NVML counts the machine's GPUs, CUDA the visible
ones. Only reading functions are called, and none of them needs root.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pynvml


class NvmlError(Exception):
    """NVML cannot be used, or failed at a question that it should answer."""


class Throttle(NamedTuple):
    """A cumulative counter of the time that clocks were held back: how NVML may be asked for it."""

    policy: str | None
    fields: tuple[int, ...]


# The driver moved the last two fields by 18 between generations, and the constants of nvidia-ml-py
# are those of one generation only. What now stands at the other place is not a 64-bit counter.
THROTTLES = {
    "power cap": Throttle("NVML_PERF_POLICY_POWER", (74,)),
    "thermal limit": Throttle("NVML_PERF_POLICY_THERMAL", (75,)),
    "sync boost": Throttle("NVML_PERF_POLICY_SYNC_BOOST", (76,)),
    "board limit": Throttle("NVML_PERF_POLICY_BOARD_LIMIT", (77,)),
    "reliability limit": Throttle("NVML_PERF_POLICY_RELIABILITY", (79,)),
    "hardware thermal slowdown": Throttle(None, (252, 270)),
    "hardware power brake": Throttle(None, (253, 271)),
}

# Bits of nvmlClocksEventReasons. Those that a user chose or that idleness explains are left out:
# idle 0x1, application clocks 0x2, display clocks 0x100.
_ACTIVE = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal limit",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x200: "board limit",
    0x400: "reliability limit",
}

_NO_ANSWER = ("NVML_ERROR_NOT_SUPPORTED", "NVML_ERROR_FUNCTION_NOT_FOUND", "NVML_ERROR_DEPRECATED")


@contextmanager
def session() -> Iterator[None]:
    """NVML initialised, for as long as the block runs; sessions may be nested.

    Raises NvmlError without a driver.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlError(str(error)) from error
    try:
        yield
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """The NVIDIA driver's version, if NVML answers."""
    try:
        with session():
            return _text(_ask("nvmlSystemGetDriverVersion"))
    except NvmlError:
        return None


def process_bytes(uuid: str, pid: int) -> int | None:
    """Device memory that the driver charges the process with; None where it does not say."""
    try:
        with session():
            return (NvmlGpu(uuid).processes() or {}).get(pid)
    except NvmlError:
        return None


def all_uuids() -> list[str]:
    """The UUIDs of the machine's GPUs in NVML's order, which is that of PCI bus addresses.

    To be called in a session. Raises NvmlError.
    """
    handles = (
        _ask("nvmlDeviceGetHandleByIndex", i) for i in range(_ask("nvmlDeviceGetCount") or 0)
    )
    return [_text(_ask("nvmlDeviceGetUUID", handle)) or "" for handle in handles]


class NvmlGpu:
    """One GPU, or a MIG slice of one, by its UUID; to be used in a session.

    The UUID may lack its "GPU-" or "MIG-", as PyTorch's does. Every method returns None where the
    driver has no such number, and raises NvmlError where it fails. Of a slice, the name, memory and
    processes are its own; clocks, power and counters are those of the whole GPU.
    """

    def __init__(self, uuid: str) -> None:
        self._own = _handle(uuid)
        self.uuid = _text(_ask("nvmlDeviceGetUUID", self._own)) or uuid
        whole = None
        if self.uuid.startswith("MIG-"):
            whole = _ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", self._own)
        self._whole = self._own if whole is None else whole
        self.whole_uuid = _text(_ask("nvmlDeviceGetUUID", self._whole)) or uuid

    def name(self) -> str | None:
        return _text(_ask("nvmlDeviceGetName", self._own))

    def memory_bytes(self) -> int | None:
        memory = _ask("nvmlDeviceGetMemoryInfo", self._own)
        return None if memory is None else int(memory.total)

    def processes(self) -> dict[int, int | None] | None:
        """Process ids that compute on the GPU, with the bytes that each holds."""
        listed = _ask("nvmlDeviceGetComputeRunningProcesses", self._own)
        return None if listed is None else {int(p.pid): p.usedGpuMemory for p in listed}

    def sm_clock_mhz(self) -> float | None:
        return self._number("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM)

    def max_sm_clock_mhz(self) -> float | None:
        return self._number("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_SM)

    def memory_clock_mhz(self) -> float | None:
        return self._number("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM)

    def temperature_c(self) -> float | None:
        return self._number("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU)

    def power_w(self) -> float | None:
        return self._number("nvmlDeviceGetPowerUsage", unit=1e-3)

    def power_cap_w(self) -> float | None:
        """The limit in force."""
        return self._number("nvmlDeviceGetEnforcedPowerLimit", unit=1e-3)

    def default_power_cap_w(self) -> float | None:
        return self._number("nvmlDeviceGetPowerManagementDefaultLimit", unit=1e-3)

    def energy_j(self) -> float | None:
        """Energy drawn since the driver was loaded."""
        return self._number("nvmlDeviceGetTotalEnergyConsumption", unit=1e-3)

    def throttled_us(self) -> dict[str, int] | None:
        """Microseconds that clocks were held back since the driver was loaded, by reason.

        Drivers advance these counters in steps, so a window well below a second can miss one.
        """
        found = {reason: self._throttled_ns(throttle) for reason, throttle in THROTTLES.items()}
        known = {reason: ns // 1000 for reason, ns in found.items() if ns is not None}
        return known or None

    def active_throttles(self) -> list[str] | None:
        """What holds the clocks back now, but for idleness and clocks that a user has set."""
        mask = _ask("nvmlDeviceGetCurrentClocksEventReasons", self._whole)
        if mask is None:  # the name before driver 535
            mask = _ask("nvmlDeviceGetCurrentClocksThrottleReasons", self._whole)
        return None if mask is None else [name for bit, name in _ACTIVE.items() if mask & bit]

    def persistence(self) -> bool | None:
        return self._enabled("nvmlDeviceGetPersistenceMode")

    def ecc(self) -> bool | None:
        return self._enabled("nvmlDeviceGetEccMode")

    def mig(self) -> bool | None:
        return self._enabled("nvmlDeviceGetMigMode")

    def _number(self, function: str, *arguments: object, unit: float = 1.0) -> float | None:
        value = _ask(function, self._whole, *arguments)
        return None if value is None else float(value) * unit

    def _enabled(self, function: str) -> bool | None:
        mode = _ask(function, self._whole)
        if isinstance(mode, list):  # current and pending
            mode = mode[0]
        return None if mode is None else bool(mode)

    def _throttled_ns(self, throttle: Throttle) -> int | None:
        if throttle.policy is not None:
            policy = getattr(pynvml, throttle.policy)
            violation = _ask("nvmlDeviceGetViolationStatus", self._whole, policy)
            if violation is not None:
                return int(violation.violationTime)
        for field in _ask("nvmlDeviceGetFieldValues", self._whole, list(throttle.fields)) or []:
            counts = field.valueType == pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
            if field.nvmlReturn == pynvml.NVML_SUCCESS and counts:
                return int(field.value.ullVal)
        return None


def _handle(uuid: str) -> Any:
    if uuid.startswith(("GPU-", "MIG-")):
        return _ask("nvmlDeviceGetHandleByUUID", uuid)
    try:
        return _ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}")
    except NvmlError as error:
        with suppress(NvmlError):
            return _ask("nvmlDeviceGetHandleByUUID", f"MIG-{uuid}")
        raise error


def _ask(name: str, *arguments: object) -> Any:
    """What NVML answers; None where this nvidia-ml-py, driver or GPU knows no such question."""
    function = getattr(pynvml, name, None)
    if function is None:
        return None
    try:
        return function(*arguments)
    except pynvml.NVMLLibraryMismatchError:
        return None
    except pynvml.NVMLError as error:
        if error.value in [getattr(pynvml, code, None) for code in _NO_ANSWER]:
            return None
        raise NvmlError(str(error)) from error


def _text(value: str | None) -> str | None:
    return None if value is None else str(value)
