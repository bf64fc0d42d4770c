import msgspec
import pytest

from resblock_bench.bench.measure.conditions import conditions
from resblock_bench.bench.measure.telemetry import Reading
from resblock_bench.bench.records import Conditions

CALM = Reading(
    t_s=100.0,
    sm_clock_mhz=1980,
    memory_clock_mhz=2600,
    temperature_c=50,
    power_w=300,
    energy_j=1000,
    throttled_us={"power cap": 70, "thermal limit": 0},
    foreign_processes=0,
    cpu_mhz=2400,
    busy_cpu_s=500,
    own_cpu_s=40,
    stolen_cpu_s=3,
)
LATER = msgspec.structs.replace(CALM, t_s=102.0, energy_j=1600, busy_cpu_s=504.2, own_cpu_s=44)


def between(before=CALM, after=LATER, *, images=12, threads=2, **changed) -> Conditions:
    after = msgspec.structs.replace(after, **changed)
    return conditions(before, after, source="test", images=images, threads=threads)


def test_a_calm_machine_is_recorded_and_not_disturbed() -> None:
    found = between(temperature_c=55, power_w=320)
    assert (found.disturbances, found.notes) == ([], [])
    assert (found.energy_j, found.energy_j_per_image) == (600, 50)
    assert (found.temperature_c, found.power_w) == ((50, 55), (300, 320))
    assert found.throttled_us == {"power cap": 0, "thermal limit": 0}
    assert found.foreign_cpus == pytest.approx(0.1)
    assert found.stolen_cpus == 0
    assert msgspec.json.decode(msgspec.json.encode(found), type=Conditions) == found


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"throttled_us": {"power cap": 70, "thermal limit": 500_000}},
            "the thermal limit held the clocks back for 500 ms of 2 s",
        ),
        (
            {"throttled_us": {"power cap": 71, "thermal limit": 0}},
            "the power cap held the clocks back for 0.001 ms of 2 s",
        ),
        ({"sm_clock_mhz": 1782}, "the SM clock went from 1980 to 1782 MHz, 10% apart"),
        ({"foreign_processes": 1}, "1 other process computed on the GPU"),
        ({"foreign_processes": 2}, "2 other processes computed on the GPU"),
        ({"busy_cpu_s": 505.0}, "other programs took 0.50 CPUs beside 2 threads"),
        ({"stolen_cpu_s": 4.0}, "the hypervisor took 0.50 CPUs beside 2 threads"),
    ],
)
def test_each_disturbance_is_one_sentence(changed, sentence: str) -> None:
    assert between(**changed).disturbances == [sentence]


@pytest.mark.parametrize(
    "changed",
    [
        {"sm_clock_mhz": 1980 * 0.951},
        {"sm_clock_mhz": 1980 / 0.951},
        {"sm_clock_mhz": 0, "before": msgspec.structs.replace(CALM, sm_clock_mhz=0)},
        {"busy_cpu_s": 504.49},
        {"stolen_cpu_s": 3.49},
    ],
)
def test_what_lies_within_the_limits_is_none(changed) -> None:
    assert between(**changed).disturbances == []


@pytest.mark.parametrize("clock", [1980 * 0.949, 1980 / 0.949])
def test_clocks_may_differ_by_a_twentieth_either_way(clock: float) -> None:
    assert len(between(sm_clock_mhz=clock).disturbances) == 1


def test_a_process_that_left_was_there() -> None:
    found = between(msgspec.structs.replace(CALM, foreign_processes=3))
    assert found.foreign_processes == 3
    assert len(found.disturbances) == 1


def test_a_large_machine_may_lose_a_fiftieth_of_its_threads() -> None:
    busy = {"busy_cpu_s": 506.0}  # one CPU
    assert len(between(threads=49, **busy).disturbances) == 1
    assert between(threads=51, **busy).disturbances == []


def test_a_few_ticks_in_a_short_time_are_rounding() -> None:
    short = {"t_s": 100.1, "own_cpu_s": 40.2}
    assert between(busy_cpu_s=500.24, **short).disturbances == []
    assert len(between(busy_cpu_s=500.26, **short).disturbances) == 1


def test_own_time_above_the_machines_is_rounding_and_no_gain() -> None:
    assert between(busy_cpu_s=503.98).foreign_cpus == 0


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"energy_j": 900}, "energy_j"),
        ({"energy_j": 900}, "energy_j_per_image"),
        ({"busy_cpu_s": 10}, "foreign_cpus"),
        ({"own_cpu_s": 10}, "foreign_cpus"),
        ({"stolen_cpu_s": 1}, "stolen_cpus"),
    ],
)
def test_a_counter_that_went_backwards_is_unknown_with_a_note(changed, field: str) -> None:
    found = between(**changed)
    assert getattr(found, field) is None
    assert found.disturbances == []
    (note,) = found.notes
    assert "went backwards" in note


def test_a_throttle_counter_that_was_reset_is_left_out_alone() -> None:
    found = between(throttled_us={"power cap": 3, "thermal limit": 9})
    assert found.throttled_us == {"thermal limit": 9}
    assert "power cap went backwards from 70 to 3" in found.notes[0]


@pytest.mark.parametrize("t_s", [100.0, 99.0])
def test_no_time_between_the_readings_gives_no_rates(t_s: float) -> None:
    found = between(t_s=t_s, throttled_us={"power cap": 70, "thermal limit": 2_000_000})
    assert (found.foreign_cpus, found.stolen_cpus) == (None, None)
    assert found.energy_j == 600
    assert found.disturbances == ["the thermal limit held the clocks back for 2000 ms"]
    assert "no time passed" in found.notes[0]


def test_no_images_give_no_energy_per_image() -> None:
    assert between(images=0).energy_j_per_image is None


def test_what_either_reading_lacks_is_null_and_its_notes_are_kept_once() -> None:
    blind = Reading(t_s=101.0, notes=["NVML failed: GPU is lost", "more"])
    before = msgspec.structs.replace(CALM, notes=["NVML failed: GPU is lost"])
    for found in (between(before, blind), between(blind, LATER)):
        values = msgspec.to_builtins(found)
        known = {name for name, value in values.items() if value not in (None, [])}
        assert known == {"source", "notes"}
    assert between(before, blind).notes == ["NVML failed: GPU is lost", "more"]
