"""The versions of torch and Triton that the kernels are tested with: listed here and nowhere else.

`make test-versions` (tests/versions.py) goes by these tables, `explain` and `resblock-bench env`
say whether what is installed is in them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .dispatch import triton_installed


class Pair(NamedTuple):
    """A torch and a Triton. The tests of the kernels and of the reference pass with both."""

    torch: str
    triton: str


PAIRS = (
    Pair("2.6.0", "3.2.0"),
    Pair("2.11.0", "3.6.0"),
    Pair("2.13.0", "3.2.0"),
    Pair("2.13.0", "3.6.0"),
    Pair("2.13.0", "3.7.1"),
)
"""The last is the locked one (constraints.txt)."""

COMPILING = ("3.2.0", "3.4.0", "3.6.0", "3.7.1")
"""The Tritons that compile every kernel for every architecture that they know. So does the newest
one on the registry, whichever that is when the tests run."""

LOCKED = PAIRS[-1]


def installed() -> Pair | None:
    """What is installed here, without build labels such as +cu124; None without Triton."""
    if not triton_installed():
        return None
    import triton

    return Pair(*(str(v).partition("+")[0] for v in (torch.__version__, triton.__version__)))


def tested(pair: Pair | None) -> bool:
    """Whether the tests ran with these two; without Triton there is no pair to get wrong."""
    return pair is None or pair in PAIRS


def describe(pair: Pair | None) -> str:
    """The pair, and whether it was tested."""
    if pair is None:
        return f"torch {torch.__version__}, no Triton"
    names = f"torch {pair.torch}, triton {pair.triton}"
    if tested(pair):
        return f"{names}: tested together"
    known = "; this Triton compiles the kernels" if pair.triton in COMPILING else ""
    return f"{names}: not tested together{known}"


def advice() -> str:
    """What is tested, for who has something else."""
    pairs = ", ".join(f"{pair.torch} with {pair.triton}" for pair in PAIRS)
    return (
        f"the tests ran with torch and Triton {pairs}: install such a pair, or run them with yours "
        "(make test, in a checkout)"
    )
