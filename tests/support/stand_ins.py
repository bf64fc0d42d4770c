"""Modules with the signatures of other projects' kernels, which compute in plain PyTorch.

Each notes its calls in `CALLS`.
"""

LIGER = """
import torch
from torch import nn

CALLS = []

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_channels, num_groups, eps):
        ctx.save_for_backward(x, weight, bias)
        ctx.rest = num_groups, eps
        return nn.functional.group_norm(x, num_groups, weight, bias, eps)

    @staticmethod
    def backward(ctx, dy):
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            y = nn.functional.group_norm(leaves[0], ctx.rest[0], *leaves[1:], ctx.rest[1])
        dx, dweight, dbias = torch.autograd.grad(y, leaves, dy)
        dx = dx[..., 0, :] if dx.dim() > 3 else dx  # as long as the last dimension alone
        return dx.view(dy.shape), dweight, dbias, None, None, None

class LigerGroupNorm(nn.Module):
    def __init__(self, num_channels, num_groups, eps=1e-6, bias=False, init_fn="ones"):
        super().__init__()
        self.num_channels, self.num_groups, self.variance_epsilon = num_channels, num_groups, eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.randn(num_channels) if bias else torch.zeros(num_channels))

    def forward(self, hidden_states):
        CALLS.append(hidden_states.dim())
        return Function.apply(
            hidden_states, self.weight, self.bias, self.num_channels, self.num_groups,
            self.variance_epsilon,
        )
"""

FLAG_GEMS = """
import torch

CALLS = []

def group_norm(input, weight, bias, N, C, HxW, group, eps=1e-05):
    CALLS.append("forward")
    return torch.native_group_norm(input.contiguous(), weight, bias, N, C, HxW, group, eps)

def group_norm_backward(grad_out, input, mean, rstd, weight, N, C, HxW, group, output_mask):
    CALLS.append("backward")
    return torch.ops.aten.native_group_norm_backward(
        grad_out.contiguous(), input, mean, rstd, weight, N, C, HxW, group, output_mask
    )
"""

APEX = """
import torch
from torch import nn

CALLS = []

class GroupNorm(nn.Module):
    SUPPORTED_CHANNELS = frozenset([128, 256])

    def __init__(
        self, num_groups, num_channels, eps=1e-5, affine=True, device=None, dtype=None, act=""
    ):
        super().__init__()
        self.num_groups, self.eps, self.act = num_groups, eps, act.lower()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, input):
        assert input.is_contiguous(memory_format=torch.channels_last)
        CALLS.append(self.act)
        y = nn.functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        return nn.functional.silu(y) if self.act else y
"""

VLLM_OMNI = """
import torch.nn.functional as F

CALLS = []

def fused_group_norm_silu(x, weight, bias, num_groups=32, eps=1e-6):
    CALLS.append("plain")
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))

def fused_adaptive_group_norm_silu(x, weight, bias, scale, shift, num_groups, eps=1e-6):
    CALLS.append("adaptive")
    assert scale.numel() == shift.numel() == x.shape[0] * x.shape[1]
    rows = x.shape[:2] + (1,) * (x.ndim - 2)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y * (1.0 + scale.reshape(rows)) + shift.reshape(rows))
"""

SGLANG = """
import torch
import torch.nn.functional as F

CALLS = []

def triton_group_norm_silu(x, weight, bias, num_groups, eps=1e-5):
    assert weight.dtype == bias.dtype == x.dtype
    assert not torch.is_grad_enabled() and not x.requires_grad
    CALLS.append(x.shape[1])
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))
"""

MODULES = {
    "liger": {"liger_kernel.transformers.group_norm": LIGER},
    "liger-flat": {"liger_kernel.transformers.group_norm": LIGER},
    "flag-gems": {"flag_gems": FLAG_GEMS},
    "apex": {"apex.contrib.group_norm": APEX},
    "vllm-omni": {
        "vllm_omni.model_executor.models.common.ops": VLLM_OMNI,
        "vllm.triton_utils": "HAS_TRITON = True",
    },
    "sglang": {"sglang.jit_kernel.diffusion.triton.group_norm_silu": SGLANG},
}
