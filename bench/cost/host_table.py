"""Host times as a table of at most 100 columns, and what its columns mean."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .host_time import HostTime, Span


def table(times: Sequence[HostTime]) -> Table:
    """Two lines for each dtype: ours and eager's."""
    view = Table(
        title="host time of a call, no GPU was used", title_justify="left", expand=False,
        pad_edge=False,
    )  # fmt: skip
    view.add_column("scale and shift, forward + backward", max_width=36, overflow="fold")
    for heading in ("forward µs", "backward µs", "both µs", "kernels", "× eager"):
        view.add_column(heading, justify="right", no_wrap=True)
    for found in times:
        view.add_section()
        name = f"{'×'.join(map(str, found.shape))} {found.dtype}"
        view.add_row(f"{name}, fused", *_span(found.ours), f"{found.ratio:.2f}")
        view.add_row(f"{name}, eager", *_span(found.eager), "1")
    return view


def _span(span: Span) -> list[str]:
    times = (f"{us:.1f}" for us in (span.forward_us, span.backward_us, span.both_us))
    return [*times, f"{span.forward_kernels} + {span.backward_kernels}"]


NOTE = (
    "host time: median of calls in turns on this CPU, autograd included. The fused call up to a "
    "driver that launches nothing; eager's on the CPU with 64 elements. Neither has the driver's "
    "own time for a launch, which each of the kernels adds on a GPU."
)
