"""To which group an operator or a kernel belongs, by its name and by what called it.

convolution   convolutions and their gradients, with what a library lays out for them
norm-act      norm, SiLU and dropout, and whatever runs in a fused operator of these
attention     batched products and softmax
linear        matrix products
optimizer     AdamW, masters and moving average
copies        what only moves: copies, casts, concatenations
compiled      what torch.compile made, whose inside a CPU does not tell
elementwise   all other operators: sums and products, reductions, resampling
gaps          no operator: Python, the autograd engine; on a GPU, no kernel
"""

import re
from typing import Literal

Group = Literal[
    "convolution", "norm-act", "attention", "linear", "elementwise", "copies", "optimizer",
    "compiled", "gaps",
]  # fmt: skip

_NAMES: dict[Group, re.Pattern[str]] = {
    "optimizer": re.compile(r"^Optimizer\.|_foreach_|fused_adam|multi_tensor_apply"),
    "convolution": re.compile(r"conv(olution)?(?![a-z])|wgrad|dgrad|fprop|winograd", re.I),
    "attention": re.compile(r"(?<!log_)softmax|bmm|scaled_dot|flash|fmha", re.I),
    "linear": re.compile(r"addmm|::(mm|linear)\b|gemm", re.I),
    "norm-act": re.compile(
        r"(group|batch|layer)_?norm|silu|dropout|keep_mask|NormActConv|DirectFunction"
        r"|\b(forward|backward|rewrite)_kernel",
        re.I,
    ),
    "copies": re.compile(r"::(_to_copy|to|copy_|clone|contiguous|cat)\b|memcpy|memset|copy", re.I),
    "compiled": re.compile(r"CompiledF|Torch-Compiled|^triton_"),
}
_WHOLE: tuple[Group, ...] = ("optimizer", "convolution", "attention", "linear")
"""What such an operator calls is a part of it."""


def group_of(name: str, within: Group | None) -> Group | None:
    """The group of an operator that runs within one of another group; None for any other."""
    own = next((group for group, pattern in _NAMES.items() if pattern.search(name)), None)
    for one in (within, own):
        if one in _WHOLE:
            return one
    for group in ("norm-act", "copies", "compiled"):
        if group in (within, own):
            return group
    return None
