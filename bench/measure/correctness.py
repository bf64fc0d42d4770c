"""Right before fast: a cell's output and gradients against reference.ResBlock in float64.

    error(t) = ‖t − t64‖ / ‖t64‖

of at most a `limit` that the eager reference sets, at the cell's own dtype on the same inputs.

Some gradients vanish mathematically: a bias before a norm with one channel a group cannot change
the output. Their relative error has no meaning, so where ‖t64‖ is below 1e-9 of what the root mean
square of all the block's gradients would give a tensor of that size, that size is the denominator.
"""

import math
import statistics
from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import Tensor

from resblock_bench.bench.records import Cell, Correctness

from .models import ModelWorkload, draw_model_inputs, draw_model_weights
from .out_of_memory import is_out_of_memory
from .workload import DTYPES, Inputs, Workload, draw_inputs, draw_weights

LAST_INPUTS = 1
"""What is added to the seed for the inputs that a cell is checked with once it was timed."""
_EAGER_FACTOR = 2.0
_FLOOR_EPS = {torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}
_VANISHES = 1e-9
# Blocks treat images independently, so the truth is computed a few images at a time: float64
# activations of a whole batch may not fit where the cell itself does.
_PART_ELEMENTS = 2**22
_PER_IMAGE = ("out", "grad x", "grad emb")
_PIECE_ELEMENTS = 2**20


@dataclass
class Truth:
    """What a site's variants are held against. Tensors are float64 on the CPU."""

    tensors: dict[str, Tensor]
    scales: dict[str, float]
    limits: dict[str, float]


def compute_truth(site: Cell, device: torch.device, seed: int, inputs_seed: int) -> Truth:
    """The float64 results of a site, and the limits that the eager reference's errors set.

    seed   of the weights
    """
    of_kind = _block_results if site.workload == "block" else _model_results
    # Nothing is timed here, so cuDNN need not try all its algorithms.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        tensors, eager = of_kind(site, device, seed, inputs_seed)
    scales = _scales(tensors)
    errors = relative_errors(eager, tensors, scales)
    if site.workload != "block":
        errors = _unlucky(errors)
    limits = {name: limit(error, DTYPES[site.dtype]) for name, error in errors.items()}
    return Truth(tensors, scales, limits)


Results = dict[str, Tensor]


def _block_results(
    site: Cell, device: torch.device, seed: int, inputs_seed: int
) -> tuple[Results, Results]:
    """The reference's results in float64, and eagerly at the site's own dtype."""
    weights = draw_weights(site, seed)
    inputs = draw_inputs(site, device, inputs_seed)
    # The truth starts from the values that the cell starts from: rounded to its dtype.
    rounded = Workload(site, weights, inputs, device).block.state_dict()
    tensors = _results_in_parts(site, rounded, inputs, device, torch.float64)
    try:
        return tensors, Workload(site, weights, inputs, device).results()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # A block that needs less memory may fit where eager does not, and still needs a limit.
    return tensors, _results_in_parts(site, rounded, inputs, device, DTYPES[site.dtype])


def _model_results(
    site: Cell, device: torch.device, seed: int, inputs_seed: int
) -> tuple[Results, Results]:
    """The same of a model, or of all its blocks: float64 an image at a time."""
    weights = draw_model_weights(site, seed)
    inputs = draw_model_inputs(site, device, inputs_seed)
    exact = ModelWorkload(site, weights, inputs, device, exact=True).results()
    tensors = {name: tensor.cpu() for name, tensor in exact.items()}
    del exact
    try:
        return tensors, ModelWorkload(site, weights, inputs, device).results()
    except Exception as error:
        if not is_out_of_memory(error) or site.mode != "train" or site.workload != "model":
            raise
    return tensors, ModelWorkload(replace(site, microbatch=1), weights, inputs, device).results()


def _unlucky(errors: dict[str, float]) -> dict[str, float]:
    """Of the hundreds of results of a model some come out closer than eager's arithmetic is: none
    has to be closer than their median."""
    typical = statistics.median(errors.values())
    return {name: max(error, typical) for name, error in errors.items()}


def limit(eager: float, dtype: torch.dtype) -> float:
    """The error that is allowed where eager PyTorch's is `eager`: max(2 · eager, floor).

    The floor keeps a lucky eager from failing what is equally good: 4 eps of float32, since sums
    are taken in another order, or 1 eps of a 16-bit dtype, since a result is rounded to it. It is
    the limit where eager's error is not finite.
    """
    floor = _FLOOR_EPS[dtype] * torch.finfo(dtype).eps
    return max(_EAGER_FACTOR * eager, floor) if math.isfinite(eager) else floor


def _results_in_parts(
    site: Cell,
    weights: dict[str, Tensor],
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Workload.results of the reference in `dtype`, a few images at a time, as float64 on the CPU.

    Parameter gradients of the parts are summed in float64.
    """
    elements = max(inputs.x[0].numel(), inputs.cotangent[0].numel())
    size = max(1, _PART_ELEMENTS // elements)
    parts: list[dict[str, Tensor]] = []
    for x, emb, cotangent in zip(
        *(torch.split(t, size) for t in (inputs.x, inputs.emb, inputs.cotangent)), strict=True
    ):
        if dtype == torch.float64:
            x, emb, cotangent = x.double(), emb.double(), cotangent.double()
        workload = Workload(site, weights, Inputs(x, emb, cotangent), device)
        if dtype == torch.float64:
            workload.block.double()
            workload.block.load_state_dict(weights)
        parts.append({name: part.double().cpu() for name, part in workload.results().items()})
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        joined[name] = torch.cat(pieces) if name in _PER_IMAGE else torch.stack(pieces).sum(0)
    return joined


def _scales(truth: dict[str, Tensor]) -> dict[str, float]:
    """The denominators: each tensor's norm, or its share of the block's where it vanishes."""
    gradients = [tensor for name, tensor in truth.items() if name.startswith("grad ")]
    squares = sum(float(tensor.square().sum()) for tensor in gradients)
    rms = math.sqrt(squares / max(1, sum(tensor.numel() for tensor in gradients)))
    scales = {}
    for name, tensor in truth.items():
        norm, typical = float(tensor.norm()), rms * math.sqrt(tensor.numel())
        scales[name] = typical if name.startswith("grad ") and norm < _VANISHES * typical else norm
    return scales


def relative_errors(
    results: dict[str, Tensor], truth: dict[str, Tensor], scales: dict[str, float]
) -> dict[str, float]:
    """‖t − t64‖ / scale for each tensor; infinite where a result is missing or misshapen."""
    errors = {}
    for name, expected in truth.items():
        got = results.get(name)
        if got is None or got.shape != expected.shape:
            errors[name] = math.inf
            continue
        # Piece by piece, so that no second float64 copy of a large tensor is needed.
        rows = max(1, _PIECE_ELEMENTS // max(1, expected[0].numel())) if expected.ndim else 1
        pieces = [torch.split(t.reshape(-1, *t.shape[1:]), rows) for t in (got, expected)]
        squares = sum(
            float((part.double() - wanted.to(part.device)).square().sum())
            for part, wanted in zip(*pieces, strict=True)
        )
        errors[name] = math.sqrt(squares) / scales[name] if scales[name] else math.sqrt(squares)
    return errors


def check(results: dict[str, Tensor], truth: Truth) -> tuple[bool, Correctness]:
    """Whether every error is within its limit (NaN is not), and the record of the check."""
    errors = relative_errors(results, truth.tensors, truth.scales)
    # NaN compares false both ways; counting it as infinite makes it the worst and over any limit.
    shares = {
        name: math.inf if math.isnan(error) else error / truth.limits[name]
        for name, error in errors.items()
    }
    right = all(errors[name] <= truth.limits[name] for name in errors)
    record = Correctness(
        errors={name: _finite(error) for name, error in errors.items()},
        limits={name: _finite(limit) for name, limit in truth.limits.items()},
        worst=max(shares, key=lambda name: shares[name]),
        dropout=0.0,
    )
    return right, record


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
