"""The norms of the published blocks, as the table of their shapes has them."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

SHAPES = Path(__file__).parents[1] / "data" / "resblock_shapes.csv"


def weighted_sites() -> list[tuple[int, int, int]]:
    """(C, HW) of every norm of every published block, and how often it is there."""
    sites: Counter[tuple[int, int]] = Counter()
    with SHAPES.open() as file:
        for row in csv.DictReader(file):
            factor = {"up": 4, "down": 0.25, "none": 1}[row["updown"]]
            positions = int(row["h"]) * int(row["w"])
            sites[int(row["c_in"]), positions] += int(row["count"])
            sites[int(row["c_out"]), int(positions * factor)] += int(row["count"])
    return sorted((C, HW, count) for (C, HW), count in sites.items())
