"""Small models of every kind, and planning in this process."""

from collections.abc import Callable

import pytest

from resblock_bench.bench.fit import plans
from resblock_bench.bench.fit.subject import Subject
from resblock_bench.bench.fit.variant import plan_variant
from resblock_bench.bench.machine.process import Ending
from resblock_bench.bench.records import Cell
from resblock_bench.reference import UNetConfig

SHARED = {
    "image_size": 16,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
}
WIDE = {**SHARED, "model_channels": 64, "num_head_channels": 64, "resblock_updown": True}
CONFIGS = {
    "unet": UNetConfig(
        family="unet", num_classes=10, dropout=0.1, resblock_updown=True, num_heads=2, **SHARED
    ),
    "add": UNetConfig(family="unet", use_scale_shift_norm=False, **SHARED),
    "super_res": UNetConfig(family="super_res", num_classes=10, **SHARED),
    "encoder": UNetConfig(family="encoder", **{**WIDE, "out_channels": 10}),
    "edm_adm": UNetConfig(
        family="edm_adm", num_classes=10, augment_dim=9, dropout=0.1, **{**WIDE, "out_channels": 3}
    ),
    "edm_ddpmpp": UNetConfig(
        family="edm_ddpmpp",
        use_scale_shift_norm=False,
        num_heads=1,
        **{**WIDE, "num_head_channels": -1, "out_channels": 3},
    ),
}


@pytest.fixture
def model() -> Callable[[str], Subject]:
    """A small model by its kind."""
    return lambda kind: Subject(name=kind, config=CONFIGS[kind])


@pytest.fixture
def block(make_cell: Callable[..., Cell]) -> Subject:
    return Subject(name="block", cell=make_cell(channels=64, resolution=8))


@pytest.fixture
def planned_here(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Variants are planned in this process; their jobs, in order."""
    jobs: list[bytes] = []

    class Here:
        def run(self, function: Callable, argument: bytes, *, limit_s: float) -> Ending:
            assert function is plan_variant
            jobs.append(argument)
            return Ending(reply=plan_variant(argument, None), exit_code=0)

        def close(self) -> None:
            pass

    monkeypatch.setattr(plans, "Processes", Here)
    monkeypatch.setattr("resblock_bench.bench.fit.equal_memory.Processes", Here)
    return jobs
