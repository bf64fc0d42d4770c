"""What is shown of a run."""

import os

import torch
from rich.console import Console
from support.tuning import PROBLEM

from resblock_bench.bench.runs.table import WIDTH
from resblock_bench.bench.tune import bucket as tune_measure
from resblock_bench.bench.tune import report as tune_report
from resblock_bench.bench.tune.bucket import BucketOutcome
from resblock_bench.bench.tune.choices import BucketWork
from resblock_bench.kernels import tuned
from resblock_bench.kernels.tiers import Choice
from resblock_bench.kernels.tuned import Bucket


def test_the_result_fits_100_columns() -> None:
    bucket = Bucket("backward", "nhwc", 2, 16, 65536, 2048)
    choice = Choice("C", 8192, 16, 12, 32)
    rules = Choice("D", 4096, 8)
    item = BucketWork(bucket, PROBLEM, torch.float32, 1)

    def entry(choice: Choice, time_us: float) -> tuned.Entry:
        fields = choice._asdict()
        return tuned.Entry(bucket=bucket, time_us=time_us, rules_us=123456.78, **fields)

    wrong = tune_measure.Refusal(rules, "y has a relative error", True)
    outcomes = [
        BucketOutcome(item, entry(choice, 98765.43), rules),
        BucketOutcome(item, entry(rules, 123456.78), rules),
        BucketOutcome(item, None, rules, problem="the GPU's memory does not hold it"),
        BucketOutcome(item, None, rules, cut_short=True),
        BucketOutcome(item, None, rules, problem="the rules' own", refused=[wrong]),
    ]
    with open(os.devnull, "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        console.print(tune_report.results_table(outcomes), width=WIDTH)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.strip("│").split("│") for line in lines if "backward" in line]
    name = "backward nhwc 16-bit 16×65536 ×2048"
    assert [[cell.strip() for cell in row] for row in rows] == [
        [name, "123,456.8", "98,765.4", "20%", "C 8192 w16 ×12 t32"],
        [name, "123,456.8", "", "", "the rules'"],
        [name, "–", "–", "–", "not measured"],
        [name, "–", "–", "–", "out of time"],
        [name, "–", "–", "–", "the rules' is WRONG"],
    ]
