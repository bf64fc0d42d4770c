"""Published figures of three GPUs, each with where it stands: what `predict_time` computes with.

A100 SXM 80 GB (8.0), H100 SXM (9.0) and B200 (10.0). A figure is either published, by NVIDIA or by
somebody who measured it, or assumed; an assumption says why. None was measured by this project.
"""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """A number, where it stands, and whether it is assumed rather than published."""

    value: float
    source: str
    assumed: bool = False


class GpuFigures(NamedTuple):
    """What a GPU can do, in bytes, seconds and microseconds.

    multiprocessors         of them
    l2_bytes                of its second-level cache
    peak_bytes_per_s        of its memory, by clock and width
    copy_bytes_per_s        what a large copy reaches, bytes read plus bytes written
    l2_bytes_per_s          what reads from L2 reach
    clock_hz                of the multiprocessors while they stream
    issue_lanes             of a multiprocessor in a cycle: 4 schedulers, a warp each
    issue_share             of those slots that a streaming kernel fills
    special_lanes           results of the special-function units of a multiprocessor in a cycle
    threads                 that are resident on a multiprocessor at most
    memory_latency_us       from a load to its data under load: bytes in flight over the rate
    l2_latency_us           from a load to its data where L2 has them, with nothing else going on
    launch_us               from the end of a kernel to the first instruction of the next
    """

    multiprocessors: float
    l2_bytes: float
    peak_bytes_per_s: float
    copy_bytes_per_s: float
    l2_bytes_per_s: float
    clock_hz: float
    issue_lanes: float
    issue_share: float
    special_lanes: float
    threads: float
    memory_latency_us: float
    l2_latency_us: float
    launch_us: float


_GUIDE = "CUDA C++ Programming Guide, "
_BENCHES = "RRZE-HPC/gpu-benches 1038c5d, "
_SCHEDULERS = (
    _GUIDE + "multiprocessors of 8.x, 9.0 and 10.0: 4 warp schedulers, 1 warp a cycle each"
)
_SPECIAL = (
    _GUIDE + "throughput of arithmetic instructions, exp2 and reciprocal: 16 on 8.0, 9.0, 10.0"
)
_THREADS = _GUIDE + "technical specifications per compute capability: 2048 on 8.0, 9.0, 10.0"
_ISSUE = Figure(
    0.8,
    "a kernel that waits for memory leaves slots empty; to be replaced by what a profiler says",
    assumed=True,
)

FIGURES: dict[int, dict[str, Figure]] = {
    80: {
        "multiprocessors": Figure(108, "NVIDIA A100 architecture whitepaper"),
        "l2_bytes": Figure(40 * 2**20, "NVIDIA A100 architecture whitepaper"),
        "peak_bytes_per_s": Figure(2.039e12, "NVIDIA A100 datasheet, 80 GB SXM"),
        "copy_bytes_per_s": Figure(
            1.737e12, _BENCHES + "gpu-stream/a100_80.txt, scale: 85 % of peak"
        ),
        "l2_bytes_per_s": Figure(5.4e12, _BENCHES + "gpu-l2-cache/a100_80.txt at 5 to 18 MB"),
        "clock_hz": Figure(1.41e9, "NVIDIA A100 architecture whitepaper, boost"),
        "issue_lanes": Figure(128, _SCHEDULERS),
        "issue_share": _ISSUE,
        "special_lanes": Figure(16, _SPECIAL),
        "threads": Figure(2048, _THREADS),
        "memory_latency_us": Figure(
            0.85,
            _BENCHES + "gpu-stream/a100_80.txt, read: 138,240 threads of 8 bytes at 1,306 GB/s",
        ),
        "l2_latency_us": Figure(
            0.21, _BENCHES + "gpu-latency/a100_80.txt: 0.146 to 17 MB, 0.28 at 36 MB; their mean"
        ),
        "launch_us": Figure(
            1.2,
            _BENCHES + "gpu-small-kernels/a100_80_graph.txt: 64 KiB at 48 GB/s, less a trip to L2",
        ),
    },
    90: {
        "multiprocessors": Figure(132, "NVIDIA H100 architecture whitepaper, SXM5"),
        "l2_bytes": Figure(50 * 2**20, "NVIDIA H100 architecture whitepaper"),
        "peak_bytes_per_s": Figure(3.35e12, "NVIDIA H100 datasheet, SXM"),
        "copy_bytes_per_s": Figure(
            3.0e12,
            "Dao-AILab/quack c8ec317, AI/hadamard_roofline_analysis.md: torch.clone of bf16 on an "
            "H100 SXM at 3,003 GB/s, 89.6 % of peak",
        ),
        "l2_bytes_per_s": Figure(
            9.7e12, _BENCHES + "gpu-l2-cache/h200.txt, the same chip, at 10 to 36 MB"
        ),
        "clock_hz": Figure(
            1.755e9,
            "below the boost of 1.98 GHz (gpu-benches' GH200), which a power limit may not "
            "leave; it is the boost of the H100 PCIe (chipsandcheese.com, 'Nvidia's H100')",
            assumed=True,
        ),
        "issue_lanes": Figure(128, _SCHEDULERS),
        "issue_share": _ISSUE,
        "special_lanes": Figure(16, _SPECIAL),
        "threads": Figure(2048, _THREADS),
        "memory_latency_us": Figure(
            0.75,
            _BENCHES + "gpu-stream/gh200.txt, read, the same chip: 8 bytes of 135,168 threads at "
            "1,715 GB/s are 0.63 µs, of 253,440 at 2,669 GB/s 0.76 µs",
        ),
        "l2_latency_us": Figure(
            0.19,
            _BENCHES
            + "gpu-latency/gh200.txt, the same chip: 0.142 to 24 MB, 0.235 at 36 MB; their "
            "mean",
        ),
        "launch_us": Figure(
            1.2,
            _BENCHES + "gpu-small-kernels/h200_graph.txt, the same chip: 64 KiB at 48 GB/s, less a "
            "trip to L2",
        ),
    },
    100: {
        "multiprocessors": Figure(148, "pytorch/ao pull request 4002, read from a B200's driver"),
        "l2_bytes": Figure(126 * 2**20, "pytorch/ao pull request 4002, read from a B200's driver"),
        "peak_bytes_per_s": Figure(
            7.67e12,
            "pytorch/ao pull request 4002: 7,680 bits at 3,996 MHz (the datasheet rounds up to 8)",
        ),
        "copy_bytes_per_s": Figure(6.9e12, "90 % of peak, as on an H100", assumed=True),
        "l2_bytes_per_s": Figure(
            10.9e12, "an H100's by multiprocessor, 148 instead of 132", assumed=True
        ),
        "clock_hz": Figure(
            1.755e9,
            "as on an H100: chipsandcheese.com, 'Nvidia's B200', calls their clocks similar",
            assumed=True,
        ),
        "issue_lanes": Figure(128, _SCHEDULERS),
        "issue_share": _ISSUE,
        "special_lanes": Figure(16, _SPECIAL),
        "threads": Figure(2048, _THREADS),
        "memory_latency_us": Figure(0.75, "an H100's: no measurement was found", assumed=True),
        "l2_latency_us": Figure(
            0.2,
            "about 0.15 in the near half (chipsandcheese.com, 'Nvidia's B200'); as far as an "
            "H100's in the other",
            assumed=True,
        ),
        "launch_us": Figure(1.2, "an H100's: no measurement was found", assumed=True),
    },
}
"""By compute capability·10."""

GPUS = {
    arch: GpuFigures(**{name: figure.value for name, figure in figures.items()})
    for arch, figures in FIGURES.items()
}

_NAMES = {"A100": 80, "H100": 90, "H200": 90, "GH200": 90, "B200": 100}


def architecture(device_name: str) -> int | None:
    """Of a GPU by its name; None where there are no figures of its architecture."""
    words = device_name.replace("-", " ").split()
    return next((arch for name, arch in _NAMES.items() if name in words), None)


def gpu_that_copies(arch: int, copy_bytes_per_s: float | None) -> GpuFigures:
    """An architecture's figures, with the copy bandwidth that a machine reached itself."""
    gpu = GPUS[arch]
    return gpu if copy_bytes_per_s is None else gpu._replace(copy_bytes_per_s=copy_bytes_per_s)
