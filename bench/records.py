"""What a run leaves behind: the structs that are written as JSON and strictly checked when read.

A row is self-describing: the cell's axes, how it was timed, on what, by which commit. Unknown
keys, missing keys and wrong types are errors on reading. A number that is not finite is written
as null.
"""

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

SCHEMA_VERSION = 1

DType = Literal["fp32", "bf16", "fp16"]
Layout = Literal["nchw", "nhwc"]
Mode = Literal["inference", "forward", "train"]
Checkpoint = Literal["none", "selective", "full"]
Conditioning = Literal["scale_shift", "add"]
UpDown = Literal["none", "up", "down"]
Status = Literal["ok", "skipped", "failed", "oom", "wrong"]
StopRule = Literal["precision", "time", "samples"]

Positive = Annotated[int, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0)]
NonNegative = Annotated[float, Meta(ge=0)]


class Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Common settings of every stored struct."""


class Cell(Record, frozen=True, kw_only=True):
    """One point of the grid: which block, on what input, run how.

    `resolution` is the extent of each of the `dims` spatial axes at the block's input;
    `emb_channels` the width of the timestep embedding; `updown` whether the block resamples.
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


class Contract(Record, frozen=True, kw_only=True):
    """How a cell is timed. Rows with different contracts are not comparable."""

    device: str
    timer: str
    threads: Positive
    warmup_s: NonNegative
    warmup_min_steps: Count
    confidence: Annotated[float, Meta(gt=0, lt=1)]
    rel_half_width: Annotated[float, Meta(gt=0)]
    min_samples: Positive
    max_samples: Positive
    max_time_s: Annotated[float, Meta(gt=0)]
    l2: str
    backend: str
    seed: int
    step: str
    precision: str
    inputs: str


class Memory(Record, frozen=True, kw_only=True):
    """Bytes of one warm step; see memory.py for what each method counts."""

    method: Literal["mem_tracker", "cuda_allocator", "fake_tensors"]
    baseline_bytes: Count
    peak_bytes: Count
    peak_above_baseline_bytes: Count
    saved_for_backward_bytes: Count


class Correctness(Record, frozen=True, kw_only=True):
    """Relative errors against float64; null stands for NaN or infinity.

    `worst` names the quantity with the largest error in units of its limit. `dropout` is the
    probability used in the check, always 0: implementations draw different masks.
    """

    errors: dict[str, float | None]
    limits: dict[str, float | None]
    worst: str
    dropout: float


class Environment(Record, frozen=True, kw_only=True):
    """The machine and the software of a run; null where unknown or absent."""

    machine: str
    cpu: str | None
    physical_cores: int | None
    logical_cores: int | None
    usable_cpus: int
    memory_bytes: int | None
    gpu: str | None
    gpu_memory_bytes: int | None
    gpu_driver: str | None
    os: str
    threads: int
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None


class Row(Record, frozen=True, kw_only=True):
    """One measured cell. Times are raw and in milliseconds; bytes are exact.

    `ci_low_ms, ci_high_ms` is the distribution-free confidence interval of the median;
    `outliers` counts the samples outside Tukey's fences, none of which is removed.
    """

    schema_version: int
    id: str
    status: Status
    reason: str | None
    axes: Cell
    multiplicity: Positive
    samples_ms: list[Annotated[float, Meta(gt=0)]] | None
    median_ms: float | None
    ci_low_ms: float | None
    ci_high_ms: float | None
    stop_rule: StopRule | None
    outliers: Count | None
    warmup_steps: Count | None
    warmup_s: NonNegative | None
    throughput_images_per_s: float | None
    memory: Memory | None
    memory_note: str | None
    correctness: Correctness | None
    contract: Contract
    device_name: str
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    seed: int
    started_at: str


def cell_id(cell: Cell, contract: Contract) -> str:
    """The content address of a cell: 16 hexadecimal digits over schema, axes and contract."""
    content = msgspec.json.encode([SCHEMA_VERSION, cell, contract], order="deterministic")
    return hashlib.sha256(content).hexdigest()[:16]


def cell_name(cell: Cell) -> str:
    """The cell as one line for people, such as '256→128 32² b8 fp32 train fused/selective'."""
    return f"{site_name(cell)} {cell.dtype} {cell.layout} {cell.mode} {variant_name(cell)}"


def site_name(cell: Cell) -> str:
    """The block and its input: channels, resolution, batch, and what is unusual about it."""
    channels = f"{cell.channels}"
    if cell.out_channels != cell.channels:
        channels += f"→{cell.out_channels}"
    parts = [f"{channels} {cell.resolution}{'¹²³'[cell.dims - 1]} b{cell.batch}"]
    if cell.model is not None:
        parts.insert(0, cell.model)
    if cell.updown != "none":
        parts.append(cell.updown)
    if cell.conditioning != "scale_shift":
        parts.append(cell.conditioning)
    if cell.dropout:
        parts.append(f"p={cell.dropout:g}")
    return " ".join(parts)


def variant_name(cell: Cell) -> str:
    """How the block is run: implementation and checkpoint mode."""
    return f"{cell.impl}/{cell.checkpoint}"


def site_of(cell: Cell) -> Cell:
    """The cell with its variant fixed, so that all variants of one site compare equal."""
    return msgspec.structs.replace(cell, impl="reference", checkpoint="none")
