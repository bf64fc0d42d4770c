"""What a run leaves behind: the structs that are written as JSON and strictly checked when read.

A row is self-describing: the cell's axes, how it was timed, on what, under which conditions, by
which code. Unknown keys, missing keys and wrong types are errors on reading. A number that is not
finite is written as null.
"""

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

SCHEMA_VERSION = 3

DType = Literal["fp32", "bf16", "fp16"]
Layout = Literal["nchw", "nhwc"]
Mode = Literal["inference", "forward", "train"]
Checkpoint = Literal["none", "selective", "full"]
Conditioning = Literal["scale_shift", "add"]
UpDown = Literal["none", "up", "down"]
WorkloadKind = Literal["block", "model", "blocks"]
Status = Literal["ok", "skipped", "failed", "oom", "timeout", "crashed", "impossible", "wrong"]
StopRule = Literal["precision", "time", "samples"]

OOM_EXPECTED = "out of memory is expected"
"""How the reason of a row begins that was skipped because a smaller cell ran out of memory."""

MACHINE = r"\w[\w.-]*"
"""A machine's name, which is that of a folder, too."""

Positive = Annotated[int, Meta(gt=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
NonNegative = Annotated[float, Meta(ge=0)]
Above = Annotated[float, Meta(gt=0)]
Milliseconds = Annotated[float, Meta(ge=1e-6, le=1e9)]
"""A measured time: a nanosecond to eleven days. Ratios of two are finite and not zero."""


class Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Common settings of every stored struct."""


class Cell(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One point of the grid: which block or model, on what input, run how.

    `resolution` is the extent of each of the `dims` spatial axes at the block's input;
    `emb_channels` the width of the timestep embedding; `updown` whether the block resamples.

    `workload` is what a step runs: a block; the whole `model`, whose resolution and channels are
    those of its images; or all its residual `blocks`, each on an input of its own. `microbatch` are
    the images that a model takes at once in a training step, None for all. `config` is that of a
    model of diffusers, in JSON: the cell is whole without the file that it came from. None of them
    is written where it is the default, so that the cells of blocks are what they were before there
    were others.
    """

    model: str | None
    dims: Literal[1, 2, 3]
    resolution: Positive
    channels: Positive
    out_channels: Positive
    emb_channels: Positive
    conditioning: Conditioning
    dropout: Annotated[float, Meta(ge=0, lt=1)]
    updown: UpDown
    batch: Positive
    dtype: DType
    layout: Layout
    mode: Mode
    impl: str
    checkpoint: Checkpoint
    workload: WorkloadKind = "block"
    microbatch: Positive | None = None
    config: Annotated[str, Meta(max_length=2**20)] | None = None

    def __post_init__(self) -> None:
        if self.config is None:
            return
        kind, _, _ = (self.model or "").rpartition("-")
        if not kind.isidentifier() or self.model != config_name(kind, self.config):
            raise ValueError("model is not named after its config")
        if self.workload != "model":
            raise ValueError("of a model with a config neither a block nor all blocks are measured")


class Rule(Record, frozen=True, kw_only=True):
    """When to stop: warm-up, wanted precision of median and ratio, and the limits.

    warmup_s, warmup_min_steps   the least warm-up
    steady, warmup_max_s         it goes on until two successive windows of half of that least
                                 warm-up differ by at most this fraction, or until it took so long
    burst_s, gap_s               a burst ends after burst_s; who is alone sleeps before the next
    confidence, rel_half_width   stop once the intervals of medians and ratios are so narrow
    min_samples                  taken whatever the limits below say; no burst is cut shorter for
                                 max_samples, which else spreads over several bursts
    max_time_s                   of sampling with its preparations and gaps, without the warm-up,
                                 for each variant of a block
    """

    warmup_s: NonNegative
    warmup_max_s: NonNegative
    warmup_min_steps: Count
    steady: NonNegative
    burst_s: NonNegative
    gap_s: NonNegative
    confidence: Annotated[float, Meta(gt=0, lt=1)]
    rel_half_width: Annotated[float, Meta(gt=0)]
    min_samples: Positive
    max_samples: Positive
    max_time_s: Annotated[float, Meta(gt=0)]


class Contract(Rule, frozen=True, kw_only=True):
    """How a cell is timed, by which rule. Rows with different contracts are not comparable.

    `turns` is what takes turns in being timed.
    """

    turns: str
    device: str
    timer: str
    threads: Positive
    l2: str
    backend: str
    seed: int
    step: str
    precision: str
    inputs: str


class Memory(Record, frozen=True, kw_only=True):
    """Bytes of one step; see memory.py for what each method counts.

    `peak_bytes` is that of a warm step and repeats to the byte; `cold_peak_bytes` that of the first
    step in its process; `reserved_peak_bytes` what the caching allocator held of the device;
    `process_bytes` what the driver or the operating system charged the process with, which does
    not repeat exactly. Null where there is no such number.
    """

    method: Literal["mem_tracker", "live_storages", "cuda_allocator", "fake_tensors"]
    baseline_bytes: Count
    peak_bytes: Count
    peak_above_baseline_bytes: Count
    saved_for_backward_bytes: Count
    cold_peak_bytes: Count | None
    reserved_peak_bytes: Count | None
    process_bytes: Count | None


class Correctness(Record, frozen=True, kw_only=True):
    """Relative errors against float64; null stands for NaN or infinity.

    `worst` names the quantity with the largest error in units of its limit. `dropout` is the
    probability used in the check, always 0: implementations draw different masks.
    """

    errors: dict[str, NonNegative | None]
    limits: dict[str, NonNegative | None]
    worst: str
    dropout: float

    def __post_init__(self) -> None:
        if self.worst not in self.errors:
            raise ValueError(f"worst is {self.worst!r}, which is none of the errors")


class Ceilings(Record, frozen=True, kw_only=True):
    """What this machine reaches at best, measured at the start of a run; see ceilings.py.

    `copy_bytes_per_s` is that of a copy far larger than the caches, bytes read plus bytes written;
    `peak_bytes_per_s` the best over all sizes, caches included; `matrix_flops_per_s` that of a
    large matrix product by dtype, two operations a multiply-add. `disturbances` are sentences that
    say why they may be too low.
    """

    copy_bytes_per_s: Annotated[float, Meta(gt=0)]
    peak_bytes_per_s: Annotated[float, Meta(gt=0)]
    matrix_flops_per_s: dict[str, Annotated[float, Meta(gt=0)]]
    disturbances: list[str] = msgspec.field(default_factory=list)


class Ratio(Record, frozen=True, kw_only=True):
    """How many times as fast as another variant of its block, measured in the same rounds.

    The median over the rounds of the other's median time over this one's, with its interval; null
    where the rounds are too few for one.
    """

    value: Above
    low: Above | None
    high: Above | None


class Floor(Record, frozen=True, kw_only=True):
    """The least that a step must do, and how long this machine's ceilings need for it.

    `bytes` are the inputs read once and the results written once; `flops` those of the reference's
    convolutions and linears; `share` the larger of the two times over the measured median.
    """

    bytes: Count
    flops: Count
    bytes_ms: NonNegative
    flops_ms: NonNegative
    share: NonNegative | None


class Conditions(Record, frozen=True, kw_only=True):
    """The machine while a cell was timed: counters after minus before, gauges before and after.

    `throttled_us` are the microseconds that the device was held back, by reason; `energy_j` the
    device's; `foreign_processes` other processes on the GPU; `foreign_cpus` and `stolen_cpus` the
    mean number of CPUs that other programs and the hypervisor took. `disturbances` are sentences
    that say why the timing should not be trusted, `notes` what could not be read. Null where the
    machine does not say.
    """

    source: str
    sm_clock_mhz: tuple[float, float] | None
    memory_clock_mhz: tuple[float, float] | None
    temperature_c: tuple[float, float] | None
    power_w: tuple[float, float] | None
    energy_j: NonNegative | None
    energy_j_per_image: NonNegative | None
    throttled_us: dict[str, Count] | None
    foreign_processes: Count | None
    cpu_mhz: tuple[float, float] | None
    foreign_cpus: float | None
    stolen_cpus: float | None
    disturbances: list[str]
    notes: list[str]


class Environment(Record, frozen=True, kw_only=True):
    """The machine and the software of a run; null where unknown or absent."""

    machine: Annotated[str, Meta(pattern=rf"^{MACHINE}\Z", max_length=200)]
    cpu: str | None
    physical_cores: int | None
    logical_cores: int | None
    usable_cpus: int
    memory_bytes: int | None
    gpu: str | None
    gpu_memory_bytes: int | None
    gpu_uuid: str | None
    gpu_driver: str | None
    os: str
    threads: int
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    ceilings: Ceilings | None


class Row(Record, frozen=True, kw_only=True):
    """One measured cell. Times are raw and in milliseconds; bytes are exact.

    `block` names the variants that took turns, `rounds` is the number of samples in each turn.
    `ratio` compares with the reference in the same checkpoint mode, `ratio_to_none` with the
    reference without checkpointing, where the block has them. `ci_low_ms, ci_high_ms` is the
    distribution-free confidence interval of the median; `outliers` counts the samples outside
    Tukey's fences, none of which is removed. The `graph_` figures are those of the same step's
    replay by a CUDA graph.
    `wall_s` is all that the cell took, `overhead_s` the part of it spent on starting and ending its
    process. `attempt` counts from 1; of the attempts at a cell the last one stands. `output` is the
    end of what the process of a cell that failed printed; `snapshot` a file in the run folder for
    PyTorch's memory viewer.
    """

    schema_version: int
    id: str
    attempt: Positive
    status: Status
    reason: str | None
    output: str | None
    snapshot: str | None
    axes: Cell
    multiplicity: Positive
    block: str | None
    samples_ms: list[Milliseconds] | None
    rounds: list[Positive] | None
    ratio: Ratio | None
    ratio_to_none: Ratio | None
    median_ms: Milliseconds | None
    ci_low_ms: Milliseconds | None
    ci_high_ms: Milliseconds | None
    stop_rule: StopRule | None
    outliers: Count | None
    warmup_steps: Count | None
    warmup_s: NonNegative | None
    warmup_steady: bool | None
    throughput_images_per_s: Annotated[float, Meta(gt=0)] | None
    graph_samples_ms: list[Milliseconds] | None
    graph_median_ms: Milliseconds | None
    graph_note: str | None
    floor: Floor | None
    memory: Memory | None
    memory_limit_bytes: Count | None
    memory_note: str | None
    correctness: Correctness | None
    conditions: Conditions | None
    contract: Contract
    code: str
    device_name: str
    device_uuid: str | None
    host: str
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    seed: int
    started_at: str
    wall_s: NonNegative | None
    overhead_s: NonNegative | None


def config_name(kind: str, config: str) -> str:
    """The name of a model of diffusers: its class, and a digest of its configuration."""
    return f"{kind}-{hashlib.sha256(config.encode()).hexdigest()[:8]}"


def cell_id(cell: Cell, contract: Contract, code: str) -> str:
    """The content address of a cell: 16 hexadecimal digits over schema, axes, contract and code."""
    # The fields of the contract have one order in all addresses, wherever the struct has them.
    names = dict.fromkeys(("device", "timer", "threads", *contract.__struct_fields__))
    fields = {name: getattr(contract, name) for name in names}
    content = msgspec.json.encode([SCHEMA_VERSION, cell, fields, code])
    return hashlib.sha256(content).hexdigest()[:16]


def cell_name(cell: Cell) -> str:
    """The cell as one line for people, such as '256→128 32² b8 fp32 train fused/selective'."""
    return f"{site_name(cell)} {cell.dtype} {cell.layout} {cell.mode} {variant_name(cell)}"


def site_name(cell: Cell) -> str:
    """The block or model and its input: sizes, batch, and what is unusual about it."""
    parts = [f"{cell.resolution}{'¹²³'[cell.dims - 1]} b{cell.batch}"]
    if cell.workload == "block":
        channels = f"{cell.channels}"
        if cell.out_channels != cell.channels:
            channels += f"→{cell.out_channels}"
        parts.insert(0, channels)
    else:
        parts.insert(0, "whole model" if cell.workload == "model" else "all blocks")
    if cell.model is not None:
        parts.insert(0, cell.model)
    if cell.microbatch is not None:
        parts.append(f"by {cell.microbatch}")
    if cell.updown != "none":
        parts.append(cell.updown)
    if cell.conditioning != "scale_shift" and cell.workload == "block":
        parts.append(cell.conditioning)
    if cell.dropout:
        parts.append(f"p={cell.dropout:g}")
    return " ".join(parts)


def variant_name(cell: Cell) -> str:
    """How a block or model is run: implementation and checkpoint mode."""
    return f"{cell.impl}/{cell.checkpoint}"


def site_of(cell: Cell) -> Cell:
    """The cell with its variant fixed, so that all variants of one site compare equal."""
    return msgspec.structs.replace(cell, impl="reference", checkpoint="none")
