"""Rows of a GPU that nobody has measured: for tests of what is made of them."""

from resblock_bench.bench.cost.predictions import Predicted
from resblock_bench.bench.gpu.operators import OperatorRow

SITE = OperatorRow(
    label="rules", model="adm-imagenet256-cond", batch=8, channels=256, resolution=256, groups=32,
    dtype="bf16", layout="nchw", modulation="scale_shift", weight=256 * 256**2 * 4,
    direction="forward", impl="fused", status="ok", tier="C", error=1e-3, median_us=200.0,
    low_us=198.0, high_us=203.0, bytes=536_870_912, floor_us=180.0, share=0.9,
    copy_bytes_per_s=3e12, device="NVIDIA H100 80GB HBM3", torch="2.11.0",
)  # fmt: skip

PREDICTED = Predicted(
    us=190.0, bound="memory", shares_us={"memory": 190.0}, floor_us=180.0, floor_share=0.95,
    larger_than_l2=True, eager_us=1600.0, eager_kernels=9, compiled_us=270.0, host_us=None,
)  # fmt: skip
