"""The cell that tests start from."""

from resblock_bench.bench.records import Cell

TINY = Cell(
    model=None,
    dims=2,
    resolution=8,
    channels=32,
    out_channels=32,
    emb_channels=16,
    conditioning="scale_shift",
    dropout=0.0,
    updown="none",
    batch=2,
    dtype="fp32",
    layout="nchw",
    mode="train",
    impl="reference",
    checkpoint="none",
)
