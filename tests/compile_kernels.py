"""Cross-compile every kernel for NVIDIA GPUs, with no GPU: run as a script, prints JSON.

A process of its own, since kernels that were defined under TRITON_INTERPRET=1 cannot be compiled.
Usage: python compile_kernels.py ARCH LAYOUT DTYPE OPTIONS   (90 nchw fp16 everything)
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resblock_bench.kernels import backward, forward
from resblock_bench.kernels.tiers import ceil_div, plan_launch, power_of_2

OPTIONAL = ("p_weight", "p_bias", "p_scale", "p_shift", "p_pre", "p_seed", "p_db", "p_partial_s3")
N, C, G = 8, 256, 32
CG = C // G


def compile_kernel(
    kernel: Any, arch: int, dtype: str, everything: bool, integers: dict[str, int],
    constants: dict[str, Any], num_warps: int,
) -> dict[str, Any]:  # fmt: skip
    """Compile as a launch with these arguments would: 1 and multiples of 16 are specialised."""
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name in OPTIONAL and not everything:
            signature[name], values[(i,)] = "constexpr", None
        elif name.startswith("p_"):
            wide = {"p_seed": "i64"}.get(name, "fp32")
            stored = name in ("p_x", "p_y", "p_dx", "p_dy", "p_scale", "p_shift", "p_pre")
            signature[name] = "*" + (dtype if stored else wide)
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in ("eps", "dropout_p"):
            signature[name] = "fp32"
        elif integers[name] == 1:
            signature[name], values[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32"
            if integers[name] % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    ptx = compiled.asm["ptx"].splitlines()
    return {
        "loads_128": sum("ld.global" in line and ".v4" in line for line in ptx),
        "stores_128": sum("st.global" in line and ".v4" in line for line in ptx),
        "shared_bytes": compiled.metadata.shared,
    }


def main(arch: int, channels_last: bool, dtype: str, everything: bool) -> dict[str, Any]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    results = {}
    for direction, tier, HW in [
        (d, *t) for d in ("forward", "backward") for t in (("A", 64), ("B", 4096), ("D", 4096))
    ]:
        launch = plan_launch(direction, N, C, HW, G, layout, 2 if "16" in dtype else 4, 132, tier)
        integers = {
            "C": C,
            "HW": HW,
            "CG": CG,
            "slabs": ceil_div(C, launch.slab),
            "blocks_c": ceil_div(C, launch.block_c),
            "splits": launch.splits,
            "chunk": launch.chunk,
            "stride_c": 1 if channels_last else HW,
            "stride_hw": C if channels_last else 1,
            "scale_n": 2 * C,
            "scale_c": 1,
            "shift_n": 2 * C,
            "shift_c": 1,
            "pre_n": C,
            "pre_c": 1,
        }
        constants = {
            "SLAB": launch.slab,
            "BLOCK_C": launch.block_c,
            "BLOCK_HW": launch.block_hw,
            "BLOCK_CG": power_of_2(CG),
            "BLOCK_S": power_of_2(launch.splits),
            "ONE_GROUP": launch.slab == CG,
            "RESIDENT": tier == "A",
            "ACTIVATION": True,
        }
        whole = {
            "forward": forward.group_forward_kernel,
            "backward": backward.group_backward_kernel,
        }
        split = {
            "forward": [
                forward.statistics_kernel,
                forward.fold_statistics_kernel,
                forward.apply_kernel,
            ],
            "backward": [
                backward.sums_kernel,
                backward.fold_sums_kernel,
                backward.input_gradient_kernel,
            ],
        }
        for kernel in split[direction] if tier == "D" else [whole[direction]]:
            used = {k: v for k, v in constants.items() if k in kernel.arg_names}
            name = f"{kernel.__name__} {tier}"
            results[name] = compile_kernel(
                kernel, arch, dtype, everything, integers, used, launch.num_warps
            )
    return results


if __name__ == "__main__":
    arch, layout, dtype, options = sys.argv[1:]
    print(json.dumps(main(int(arch), layout == "nhwc", dtype, options == "everything")))
