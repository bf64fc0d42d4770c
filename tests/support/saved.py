"""What autograd keeps of a block."""

import torch
from torch import Tensor, nn


def saved_bytes(block: nn.Module, x: Tensor, emb: Tensor) -> int:
    """Bytes that autograd keeps for the backward, parameters aside, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    sizes: dict[int, int] = {}
    keep = []

    def pack(t: Tensor) -> Tensor:
        keep.append(t)
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x, emb)
    del y
    return sum(size for pointer, size in sizes.items() if pointer not in own)
