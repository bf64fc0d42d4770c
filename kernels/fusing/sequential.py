"""A group norm with the SiLU and the dropout behind it, inside an nn.Sequential.

The sequence computes such a run of layers at once, and the layers stay as they are: whoever takes
one of them out gets what it was. A layer that has hooks, or that was exchanged for one of another
class, is called.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from resblock_bench.kernels.alterations import CONVOLUTIONS, is_exactly
from resblock_bench.kernels.modules import normalise

from .family import Context, Found, parameter_of, random_like
from .norm import channels_of, is_norm, is_silu


class Run(NamedTuple):
    """The classes of a norm and of what follows it directly: a SiLU, a dropout, or both."""

    norm: type[nn.Module]
    activation: type[nn.Module] | None
    dropout: type[nn.Module] | None

    @property
    def kinds(self) -> list[type[nn.Module]]:
        return [kind for kind in self if kind is not None]

    def holds(self, layers: list[nn.Module]) -> bool:
        """Whether these layers are of those classes, and nothing else happens in them."""
        kinds = self.kinds
        return len(layers) == len(kinds) and all(
            is_exactly(layer, (kind,)) for layer, kind in zip(layers, kinds, strict=True)
        )


class FusedSequential:
    """Mixin of an nn.Sequential that has runs, by the place of their norms."""

    _runs: dict[int, Run] = {}  # noqa: RUF012 (none; fusing sets its own on the module)

    def forward(self, input: Any) -> Any:
        layers: list[Any] = list(self)  # type: ignore[call-overload]
        at = 0
        while at < len(layers):
            run = self._runs.get(at)
            end = min(at + (len(run.kinds) if run is not None else 1), len(layers))
            dropout = layers[end - 1] if run is not None and run.dropout is not None else None
            # The operator has no dropout of everything.
            if run is not None and run.holds(layers[at:end]) and (dropout is None or dropout.p < 1):
                input = normalise(
                    layers[at],
                    input,
                    activation="silu" if run.activation is not None else None,
                    dropout_p=dropout.p if dropout is not None and dropout.training else 0.0,
                )
                at = end
            else:
                input = layers[at](input)
                at += 1
        return input


def recognise(module: nn.Module, context: Context) -> Found | None:
    if not isinstance(module, nn.Sequential) or "forward" in vars(module):
        return None
    if type(module).forward not in (nn.Sequential.forward, FusedSequential.forward):
        return None
    layers = list(module)
    runs = {at: run for at in range(len(layers)) if (run := _run(layers[at:])) is not None}
    if not runs:
        return None
    what = ", ".join(
        f"{at}: " + " + ".join(kind.__name__ for kind in run.kinds) for at, run in runs.items()
    )
    return Found(
        FusedSequential,
        f"{type(module).__name__} with {what} in one",
        parts=[layers[at] for at in runs],
        attributes={"_runs": runs},
        inputs=_inputs,
    )


def _run(layers: list[nn.Module]) -> Run | None:
    """The one that begins with the first of these layers."""
    if not is_norm(layers[0]):
        return None
    rest = layers[1:]
    activation = dropout = None
    if rest and is_silu(rest[0]):
        activation = type(rest.pop(0))
    if rest and is_exactly(rest[0], (nn.Dropout,)) and cast(nn.Dropout, rest[0]).p < 1:
        dropout = type(rest[0])
    return None if activation is dropout is None else Run(type(layers[0]), activation, dropout)


def _inputs(sequence: nn.Module) -> tuple[Tensor]:
    """Of the sizes that the first layers with parameters say: positions as a convolution wants."""
    width, dims = None, 0
    for layer in sequence.modules():
        if width is None and isinstance(layer, nn.Linear):
            return (random_like(layer.weight, 2, layer.in_features),)
        if isinstance(layer, CONVOLUTIONS):
            dims = dims or len(layer.kernel_size)
            width = width or layer.in_channels
        elif width is None and is_norm(layer):
            width = channels_of(layer)
    linear = not dims and any(isinstance(layer, nn.Linear) for layer in sequence.modules())
    shape = (2, width or 1, *(8,) * (0 if linear else dims or 2))
    return (random_like(parameter_of(sequence), *shape),)
