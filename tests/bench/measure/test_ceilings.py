import gc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resblock_bench.bench.measure import ceilings
from resblock_bench.bench.measure.ceilings import measure_ceilings
from resblock_bench.bench.measure.devices import Device, open_device

KIB = 2**10


class Machine(TorchDispatchMode):
    """A timer by the work that is done: so many bytes and operations a second, now and then less.

    Copies within the cache run at 4e9 bytes/s, others at 1e9.
    """

    name = "machine"
    l2 = "flushed"
    cache = 100 * KIB

    def __init__(self, flops_per_s):
        super().__init__()
        self.flops_per_s = flops_per_s
        self.seconds, self.count, self.closed = 0.0, 0, False
        self.products, self.copies = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            size = args[0].nbytes
            self.copies.append(size)
            self.seconds += 2 * size / (4e9 if 2 * size <= self.cache else 1e9)
        if func is torch.ops.aten.mm.out:
            size, dtype = len(args[0]), args[0].dtype
            self.products.append((dtype, size))
            self.seconds += 2 * size**3 / self.flops_per_s[dtype]
        return func(*args, **(kwargs or {}))

    def sample_ms(self, step):
        self.seconds = 0.0
        with self:
            step()
        self.count += 1
        return self.seconds * 1e3 * (1.5 if self.count % 2 else 1.0)

    def close(self):
        self.closed = True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Made small: copies of 1 MiB at most, products of 32."""
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": (KIB * KIB, KIB * KIB)})
    monkeypatch.setattr(ceilings, "COPIES", {"cpu": 16})
    monkeypatch.setattr(ceilings, "SMALLEST_COPY_BYTES", 4 * KIB)
    monkeypatch.setattr(ceilings, "SMALLEST_PRODUCT", {"fp32": 8, "bf16": 8, "fp16": 8})
    monkeypatch.setattr(ceilings, "LARGEST_PRODUCT", 32)
    monkeypatch.setattr(ceilings, "SAMPLING_S", 0.0)
    flops = {torch.float32: 3e9, torch.bfloat16: 9e9, torch.float16: 2e6}
    return replace(open_device("cpu", 1), timer=Machine(flops))


def test_a_ceiling_is_the_best_of_its_samples(device: Device) -> None:
    found = measure_ceilings(device)
    assert found.copy_bytes_per_s == pytest.approx(1e9)  # of the largest copy
    assert found.peak_bytes_per_s == pytest.approx(4e9)  # of those within the cache
    assert found.matrix_flops_per_s == pytest.approx({"fp32": 3e9, "bf16": 9e9, "fp16": 2e6})


def test_a_sample_of_a_small_size_is_many_copies_after_one_flush(device: Device) -> None:
    measure_ceilings(device)
    small = [size for size in device.timer.copies if size == 4 * KIB]
    # The untimed copies are not counted.
    assert len(small) == ceilings.SAMPLES * 16


def test_products_grow_until_one_takes_too_long(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "PRODUCT_S", 0.01)
    measure_ceilings(device)
    sizes: dict[torch.dtype, set[int]] = {}
    for dtype, size in device.timer.products:
        sizes.setdefault(dtype, set()).add(size)
    # At 2e6 a second, 16³ products take 4 ms and 32³ would take 33.
    assert sizes[torch.float16] == {8, 16}
    assert sizes[torch.float32] == sizes[torch.bfloat16] == {8, 16, 32}


@pytest.mark.parametrize(
    ("cache", "largest"), [(0, 64 * KIB), (100 * KIB, 400 * KIB), (KIB**3, KIB * KIB)]
)
def test_the_largest_copy_is_far_larger_than_the_caches(
    device: Device, monkeypatch: pytest.MonkeyPatch, cache: int, largest: int
) -> None:
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": (64 * KIB, KIB * KIB)})
    monkeypatch.setattr(ceilings, "_cache_bytes", lambda device: cache)
    measure_ceilings(device)
    assert max(device.timer.copies) == largest


def test_the_cache_s_size_is_the_system_s(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(ceilings, "LAST_CACHE", tmp_path / "size")
    assert ceilings._cache_bytes(device) == 0
    (tmp_path / "size").write_text("32768K\n")
    assert ceilings._cache_bytes(device) == 32 * KIB**2
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=12345)
    )
    assert ceilings._cache_bytes(replace(device, kind="cuda")) == 12345


def test_nothing_is_left_behind(device: Device) -> None:
    before = live_bytes()
    measure_ceilings(device)
    assert device.timer.closed
    assert live_bytes() == before


def live_bytes() -> int:
    gc.collect()
    return sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor)


def test_the_timer_is_closed_also_when_memory_is_short(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> Callable[..., object]:
        raise MemoryError

    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(MemoryError):
        measure_ceilings(device)
    assert device.timer.closed
