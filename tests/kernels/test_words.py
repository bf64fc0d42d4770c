"""Whose counters a launch gets."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from resblock_bench.kernels import dispatch, words


@pytest.fixture
def on_stream(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """CPU tensors stand for a GPU's; the stream is the last of the list."""
    streams = [1]
    monkeypatch.setattr(dispatch, "settings", (None, None, True))
    monkeypatch.setattr(words, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(words, "_of_stream", {})
    return streams


def test_a_stream_has_words_of_its_own_which_it_keeps(on_stream: list[int]) -> None:
    device = torch.device("cpu")
    first = words.words(device, 5, own=False)
    assert not first.any() and first.dtype == torch.int32
    assert words.words(device, 3, own=False) is first
    on_stream.append(2)
    second = words.words(device, 5, own=False)
    assert second.data_ptr() != first.data_ptr()
    on_stream.append(1)
    assert words.words(device, 5, own=False) is first


def test_a_launch_with_more_units_gets_more_words(on_stream: list[int]) -> None:
    device = torch.device("cpu")
    few = words.words(device, 5, own=False)
    many = words.words(device, 2 * few.numel(), own=False)
    assert many.numel() >= 2 * few.numel() and not many.any()
    assert words.words(device, 5, own=False) is many


def test_a_recorded_launch_shares_its_words_with_nobody(on_stream: list[int]) -> None:
    device = torch.device("cpu")
    kept = words.words(device, 5, own=False)
    own = [words.words(device, 5, own=True) for _ in range(2)]
    assert len({t.data_ptr() for t in (kept, *own)}) == 3
    assert all(t.numel() == 5 and not t.any() for t in own)


def test_interpreted_launches_share_nothing() -> None:
    """An interrupted one may leave its words as they were."""
    device = torch.device("cpu")
    one, other = (words.words(device, 5, own=False) for _ in range(2))
    assert one.data_ptr() != other.data_ptr()
