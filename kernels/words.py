"""The counters through which the programs of one launch wait for each other: int32 words, all 0.

A launch leaves its words as it found them, so a stream needs no more than one row of them, which is
zeroed once. Launches on one stream run one after the other; other streams have words of their own.
(A stream that was made outside of PyTorch must not be destroyed while its launches run: another one
might get its handle, and so its words.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .launcher import current_stream

_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def words(device: torch.device, count: int, *, own: bool) -> Tensor:
    """`count` zeroed words for the next launch on the current stream.

    own: not those of the stream. Where a launch is recorded, in a CUDA graph or by a compiler that
    makes one, it has words of its own, zeroed in the graph: two graphs may be replayed at once, on
    whatever streams.
    """
    if device.type == "cuda":
        own = own or torch.cuda.is_current_stream_capturing()
    elif not dispatch.settings[2]:
        own = True
    if own:
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, current_stream(device)
    found = _of_stream.get(key)
    if found is None or found.numel() < count:
        found = torch.zeros(max(1024, 2 * count), dtype=torch.int32, device=device)
        _of_stream[key] = found
    return found
