"""The verbs for a GPU that is there for minutes: gpu-results and gpu-report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, path, progress_console, result_console

FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        parser=path,
        metavar="DIR",
        help="Default: results/gpu/MACHINE under the checkout. The same folder goes on.",
    ),
]
PartsOption = Annotated[
    str | None, typer.Option(metavar="1,2,3", help="Parts, by number. Default: all.")
]


@app.command("gpu-results")
def gpu_results(
    minutes: Annotated[
        float, typer.Option(min=0.1, max=9, help="Of this slice; the next one goes on.")
    ] = 9,
    parts: PartsOption = None,
    again: Annotated[
        str | None,
        typer.Option(metavar="1,2,3", help="Parts whose outcomes do not count any more."),
    ] = None,
    output: FolderOption = None,
    device: Annotated[
        str,
        typer.Option(metavar="cuda|cpu", help="cpu: try the way, on tiny problems, interpreted."),
    ] = "cuda",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List parts and estimated minutes; run nothing.")
    ] = False,
) -> None:
    """Measure all that is worth measuring on a GPU, in slices, whatever fails on the way.

    Tests and sanitizer, the operator at published sites, blocks, tune, whole models, calibration.
    Each step is a process of its own, and its outcome a line in steps.jsonl. The same command goes
    on until all is over (exit code 0), or over with steps that failed (3; 5 where results are
    wrong).
    """
    from resblock_bench.bench.gpu import parts as of_gpu
    from resblock_bench.bench.gpu import steps
    from resblock_bench.bench.measure.devices import device_kind

    stage = device_kind(device)
    known = of_gpu.parts(stage)
    chosen = of_gpu.selected(known, parts)
    voided = [] if again is None else of_gpu.selected(known, again, "--again")
    folder = output or steps.default_output(Path.cwd())
    console = result_console()
    if dry_run:
        console.print(steps.listing(chosen, folder))
        return
    request = steps.SliceRequest(
        parts=chosen, output=folder, stage=stage, seconds=60 * minutes, again=voided
    )
    raise typer.Exit(steps.carry_out(request, console))


@app.command("gpu-report")
def gpu_report(
    results: Annotated[
        Path | None,
        typer.Argument(
            parser=path, metavar="DIR", help="Default: the only folder under results/gpu."
        ),
    ] = None,
    document: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Default: docs/gpu.md.")
    ] = None,
    no_prediction: Annotated[
        bool,
        typer.Option("--no-prediction", help="Compile nothing: leave out what was predicted."),
    ] = False,
) -> None:
    """Draw docs/gpu.md and a page from what gpu-results has left; needs no GPU.

    What contradicts a prediction stands on top.
    """
    from resblock_bench.bench.gpu import report

    here = Path.cwd()
    request = report.GpuReportRequest(
        folder=results or report.only_folder(here),
        document=document or report.default_document(here),
        predict=not no_prediction,
    )
    raise typer.Exit(report.carry_out(request, result_console(), progress_console()))
