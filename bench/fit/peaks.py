"""From the steps at two batches to the peak at every batch.

Every storage of a step is affine in the batch, so what is alive at each moment is, too, and the
peak, the most over all moments, is a convex line of a few straight pieces. Two steps that make the
same storages in the same order give all of it; a third, at a large batch, confirms it: a convex
line that agrees with a straight one in three points is straight between them.
"""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

MOST_IMAGES = 65536
"""Nobody's batch is larger, on one device; where one would be, it is said to be this one."""


class Piece(Struct, frozen=True, array_like=True):
    """A moment's bytes: `fixed` + batch · `per_image`."""

    fixed: int
    per_image: int

    def at(self, batch: int) -> int:
        return self.fixed + batch * self.per_image


class UnlikeStepsError(Exception):
    """Two steps that do not make the same storages: no line goes through them."""


def pieces(
    live: NDArray[np.int64], one_more: NDArray[np.int64], batch: int, most: int = MOST_IMAGES
) -> list[Piece]:
    """Those moments that are the peak at some batch from 1 to `most`, in order of the batch.

    live, one_more   bytes alive at every moment of the steps at `batch` and `batch` + 1
    """
    if len(live) != len(one_more):
        raise UnlikeStepsError(
            f"the steps at {batch} and {batch + 1} images make {len(live)} and {len(one_more)} "
            "storages, so their peaks say nothing about other batches"
        )
    slopes = one_more - live
    fixed = live - batch * slopes
    found: list[Piece] = []
    at = 1
    while True:
        heights = fixed + at * slopes
        top = np.flatnonzero(heights == heights.max())
        here = int(top[slopes[top].argmax()])
        found.append(Piece(int(fixed[here]), int(slopes[here])))
        steeper = slopes > slopes[here]
        # The first batch at which a steeper moment is higher.
        gaps = (fixed[here] - fixed[steeper]) // (slopes[steeper] - slopes[here]) + 1
        if not len(gaps) or gaps.min() > most:
            return found
        at = int(gaps.min())


def peak_at(found: Sequence[Piece], batch: int) -> int:
    return max(piece.at(batch) for piece in found)


def largest_batch(found: Sequence[Piece], capacity: int, most: int = MOST_IMAGES) -> int:
    """The most images whose step fits; 0 where not even one does."""
    if peak_at(found, 1) > capacity:
        return 0
    room = [(capacity - p.fixed) // p.per_image for p in found if p.per_image > 0]
    return min([most, *room])
