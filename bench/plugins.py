"""The names that other packages may import, to offer blocks and kernels of their own.

An Implementation, built with `block_arguments` of a Cell, goes by the entry point group
`resblock_bench.implementations`, where its Ability says which cells it is made for; functions that
return KernelCases go by `resblock_bench.static`.
Nothing else here is promised to stay.
"""

from resblock_bench.bench.compiled.cases import KernelCase
from resblock_bench.bench.measure.implementations import Implementation, block_arguments
from resblock_bench.bench.measure.peers import Ability

from .records import Cell

__all__ = ["Ability", "Cell", "Implementation", "KernelCase", "block_arguments"]
