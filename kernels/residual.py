"""The residual addition with the bias of the convolution before it, in one pass.

y = (skip + h + bias)·scale        skip, h, y: (N, C, *spatial), bias: (C,)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def residual_kernel(
    p_skip, p_h, p_bias, p_y, rows, columns, C, scale, CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """A program: a tile of memory as a matrix, [N·C, HW] in NCHW and [N·HW, C] in channels-last."""
    blocks = tl.cdiv(columns, BLOCK_HW)
    i_row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    o_j = tl.program_id(0) % blocks * BLOCK_HW + tl.arange(0, BLOCK_HW)
    mask = (o_r < rows - i_row)[:, None] & (o_j < columns)[None, :]
    o_tile = i_row * columns + (o_r[:, None] * columns + o_j[None, :])
    b_y = tl.load(p_skip + o_tile, mask=mask, other=0.0).to(tl.float32)
    b_y += tl.load(p_h + o_tile, mask=mask, other=0.0).to(tl.float32)
    if p_bias is not None:
        if CHANNELS_LAST:
            b_y += tl.load(p_bias + o_j, mask=o_j < C, other=0.0).to(tl.float32)[None, :]
        else:
            b_y += tl.load(p_bias + (i_row + o_r) % C).to(tl.float32)[:, None]
    tl.store(p_y + o_tile, b_y * scale, mask=mask)
