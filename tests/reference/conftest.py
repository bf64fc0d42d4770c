"""The independent formulas that the reference is checked against, and weights worth checking.

The oracles take a state dict and compute from the published formulas with elementary operations:
they share no code with the package. As fixtures, because test files are not importable here.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are tiny: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """What a test draws does not depend on those before it."""
    torch.manual_seed(0)


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """Replace every parameter by random numbers: a fresh block is blind to its zeroed branch."""

    def fill(module: nn.Module, seed: int = 0) -> nn.Module:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in module.named_parameters():
                noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
                if p.ndim > 1:
                    noise *= 1.5 / math.sqrt(p[0].numel())
                else:
                    noise = 0.5 * noise + (1.0 if name.endswith("weight") else 0.0)
                p.copy_(noise)
        return module

    return fill


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    N, C = x.shape[:2]
    g = x.reshape(N, groups, -1)
    mean = g.sum(2, keepdim=True) / g.shape[2]
    variance = ((g - mean) ** 2).sum(2, keepdim=True) / g.shape[2]
    normed = ((g - mean) / (variance + eps).sqrt()).reshape(x.shape)
    per_channel = (1, C) + (1,) * (x.ndim - 2)
    return normed * weight.reshape(per_channel) + bias.reshape(per_channel)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    dims = weight.ndim - 2
    f = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    step = (1, stride, stride) if dims == 3 else stride
    return f(x, weight, bias, stride=step, padding=weight.shape[-1] // 2)


def resample(x: Tensor, how: str | None) -> Tensor:
    """Nearest ×2 or the mean of neighbours, over all sizes but the depth of 3D."""
    axes = range(3 if x.ndim == 5 else 2, x.ndim)
    for axis in axes:
        if how == "up":
            x = x.repeat_interleave(2, dim=axis)
        elif how == "down":
            pairs = x.unflatten(axis, (-1, 2))
            x = (pairs.select(axis + 1, 0) + pairs.select(axis + 1, 1)) / 2
    return x


def resblock(
    w: Weights,
    x: Tensor,
    emb: Tensor,
    scale_shift: bool,
    how: str | None = None,
    drop: Callable[[Tensor], Tensor] = lambda h: h,
) -> Tensor:
    h = silu(group_norm(x, 32, w["in_layers.0.weight"], w["in_layers.0.bias"], 1e-5))
    h = conv(resample(h, how), w["in_layers.2.weight"], w["in_layers.2.bias"])
    e = silu(emb) @ w["emb_layers.1.weight"].T + w["emb_layers.1.bias"]
    e = e.reshape(*e.shape, *[1] * (h.ndim - 2))
    C = h.shape[1]
    norm = ("out_layers.0.weight", "out_layers.0.bias")
    if scale_shift:
        h = group_norm(h, 32, w[norm[0]], w[norm[1]], 1e-5) * (1 + e[:, :C]) + e[:, C:]
    else:
        h = group_norm(h + e, 32, w[norm[0]], w[norm[1]], 1e-5)
    h = conv(drop(silu(h)), w["out_layers.3.weight"], w["out_layers.3.bias"])
    x = resample(x, how)
    if "skip_connection.weight" in w:
        x = conv(x, w["skip_connection.weight"], w["skip_connection.bias"])
    return x + h


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of one sample, a query at a time: q, k, v (c, T) -> (c, T)."""
    out = []
    for t in range(q.shape[1]):
        logits = (q[:, t, None] * k).sum(0) / math.sqrt(q.shape[0])
        odds = torch.exp(logits - logits.max())
        out.append((v * odds).sum(1) / odds.sum())
    return torch.stack(out, 1)


def multihead(qkv: Tensor, heads: int, layout: str) -> Tensor:
    """(N, 3C, T) -> (N, C, T); layout names the nesting of qkv's rows, outermost first."""
    N, C = qkv.shape[0], qkv.shape[1] // 3
    c = C // heads
    result = torch.empty_like(qkv[:, :C])
    for n in range(N):
        for head in range(heads):
            rows = []
            for part in range(3):
                i = torch.arange(c)
                if layout == "heads, qkv, c":
                    row = (head * 3 + part) * c + i
                elif layout == "qkv, heads, c":
                    row = (part * heads + head) * c + i
                else:
                    assert layout == "heads, c, qkv"
                    row = (head * c + i) * 3 + part
                rows.append(qkv[n, row])
            result[n, head * c : (head + 1) * c] = attend(*rows)
    return result


def attention_block(w: Weights, x: Tensor, heads: int, new_order: bool) -> Tensor:
    tokens = x.flatten(2)
    normed = group_norm(tokens, 32, w["norm.weight"], w["norm.bias"], 1e-5)
    layout = "qkv, heads, c" if new_order else "heads, qkv, c"
    a = multihead(conv(normed, w["qkv.weight"], w["qkv.bias"]), heads, layout)
    return (tokens + conv(a, w["proj_out.weight"], w["proj_out.bias"])).reshape(x.shape)


def sinusoids(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    half = dim // 2
    rows = []
    for time in t.tolist():
        angles = [time * max_period ** (-i / half) for i in range(half)]
        row = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        rows.append(row + [0.0] * (dim - 2 * half))
    return torch.tensor(rows, dtype=torch.float64)


def within(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    return SimpleNamespace(
        group_norm=group_norm,
        silu=silu,
        conv=conv,
        resample=resample,
        resblock=resblock,
        multihead=multihead,
        attention_block=attention_block,
        sinusoids=sinusoids,
        within=within,
    )
