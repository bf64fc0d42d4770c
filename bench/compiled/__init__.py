"""What a kernel is on a GPU that is absent.

`traffic` counts the bytes that it touches, in Triton's interpreter; `machine_code` cross-compiles
and finds registers, spills, accesses and instructions, which `sass` reads from text; `norms` does
both for a call of the fused operator, `cases` for kernels of other packages; `kernel_key` tells
which launches compile alike.
"""
