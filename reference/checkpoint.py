"""Gradient checkpointing: keep a block's inputs, recompute its inside in the backward pass.

References
    Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174
    guided-diffusion#167: checkpointing with dropout trains towards wrong gradients
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch.utils.checkpoint
from torch import nn

T = TypeVar("T")


def under_transforms() -> bool:
    """Whether a transform of torch.func is active: vmap, grad, vjp, jacrev or jvp."""
    # torch.compile traces through them, and cannot trace the question.
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active())


def checkpoint(
    func: Callable[..., T],
    inputs: Sequence[Any],
    params: Iterable[nn.Parameter],
    flag: bool,
    **kwargs: Any,
) -> T:
    """``func(*inputs, **kwargs)``, recomputed in the backward pass if ``flag`` is true.

    func     any callable; what its result depends on is found by autograd, not by declaration
    inputs   its positional arguments: tensors, None, numbers, anything
    params   the parameters that func uses. Kept so that calls written for the original signature
             work; not needed and not read, since gradients reach every tensor that func used
    flag     False calls func directly
    kwargs   its keyword arguments; tensors among them are treated as the positional ones are

    Under torch.func's transforms (vmap, grad, …), which PyTorch's checkpoint does not support, func
    is called directly and keeps what it keeps.

    The signature is improved-diffusion's and guided-diffusion's; the mechanism is PyTorch's
    non-reentrant checkpoint. The original was an autograd function which ran func under no_grad,
    kept inputs and parameters as plain attributes, and in its backward ran func again on detached
    inputs before one call of ``torch.autograd.grad``. Against it, each of these holds here and has
    a test (tests/reference/test_checkpoint.py):

    * the random state is restored for the recomputation, so dropout draws the same mask
      (guided-diffusion#167: the original's gradients belong to another mask than its loss);
    * so is autocast: the recomputation runs in the precision that the forward ran in;
    * a frozen parameter is no error;
    * a second backward through a retained graph works, and so does a double backward, which the
      original answered with a wrong number;
    * None, integers and keyword arguments may be inputs;
    * a parameter that func uses gets its gradient whether or not it stands in ``params``;
    * inputs are saved as autograd saves tensors: changing one in place before the backward is an
      error, not a wrong gradient, and ``saved_tensors_hooks`` (offloading, byte counts) see them.
    """
    if not flag or under_transforms():
        return func(*inputs, **kwargs)
    run, arguments = func, tuple(inputs)
    if kwargs:
        # PyTorch saves positional tensors through autograd but keeps keyword ones in a closure,
        # where neither the version check nor the hooks would see them. So all go by position.
        n, names = len(arguments), tuple(kwargs)

        def run(*values: Any) -> T:
            return func(*values[:n], **dict(zip(names, values[n:], strict=True)))

        arguments += tuple(kwargs.values())
    out: T = torch.utils.checkpoint.checkpoint(run, *arguments, use_reentrant=False)
    return out
