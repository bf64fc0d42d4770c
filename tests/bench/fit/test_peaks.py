import numpy as np
import pytest

from resblock_bench.bench.fit.peaks import (
    MOST_IMAGES,
    UnlikeStepsError,
    largest_batch,
    peak_at,
    pieces,
)


def moments(fixed: list[int], slopes: list[int], batch: int) -> np.ndarray:
    return np.array(fixed) + batch * np.array(slopes)


@pytest.mark.parametrize("seed", range(5))
def test_two_steps_tell_the_peak_at_every_batch(seed: int) -> None:
    draw = np.random.default_rng(seed)
    slopes = draw.integers(0, 50, 40)
    fixed = 2000 - slopes * draw.integers(1, 60, 40) + draw.integers(0, 300, 40)
    both = [moments(list(fixed), list(slopes), batch) for batch in (7, 8)]
    found = pieces(*both, 7)
    assert len(found) < 12
    for batch in range(1, 200):
        assert peak_at(found, batch) == moments(list(fixed), list(slopes), batch).max()


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    fixed, slopes = [1000, 100, 0], [1, 70, 90]
    found = pieces(moments(fixed, slopes, 2), moments(fixed, slopes, 3), 2)
    for capacity in range(0, 5000, 7):
        largest = largest_batch(found, capacity)
        assert peak_at(found, largest + 1) > capacity
        assert largest == 0 or peak_at(found, largest) <= capacity


def test_a_step_that_does_not_grow_has_the_largest_batch_of_all() -> None:
    found = pieces(np.array([10, 20]), np.array([10, 20]), 1)
    assert largest_batch(found, 20) == MOST_IMAGES
    assert largest_batch(found, 19) == 0


def test_steps_that_make_other_storages_are_refused() -> None:
    with pytest.raises(UnlikeStepsError, match="2 and 3 images make 2 and 1 storages"):
        pieces(np.array([1, 2]), np.array([1]), 2)
