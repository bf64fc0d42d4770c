"""A cell's turns without a process: who gives them, and what the cell answers."""

from collections.abc import Callable, Iterable

import msgspec

from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.measure import orders

FINISH = orders.Finish("samples")
SIX = (*[orders.Burst(0.0, 1)] * 6, FINISH)
"""What most tests need of a cell: six samples, a round each."""


class Given(Channel):
    """A channel without a socket, that gives orders in turn.

    before   called before each order, with it: what others do between two turns
    """

    def __init__(
        self,
        given: Iterable[orders.Order] = SIX,
        before: Callable[[orders.Order], object] = lambda order: None,
    ) -> None:
        self.waited_s = 0.0
        self.phases: list[str] = []
        self.answers: list[orders.Response] = []
        self._given, self._before = iter(given), before

    def announce(self, phase: str) -> None:
        self.phases.append(phase)

    def send(self, message: bytes) -> None:
        self.answers.append(msgspec.json.decode(message, type=orders.Response))

    def receive(self) -> bytes:
        order = next(self._given)
        self._before(order)
        return msgspec.json.encode(order)
