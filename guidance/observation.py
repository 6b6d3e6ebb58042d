"""The measures of a guided step, and how its numbers get from the device to the host without a wait.

A device works behind its host. If the host asks for a number of the current step, it waits, and the device runs out of
work. So numbers are sent when they are made (`Arrival`), and read after the next step's networks have been launched: by
then they have arrived. On a CPU numbers have arrived as soon as they are made.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from diffusers_guidance.spaces import Space


def is_here(numbers: Tensor) -> bool:
    """Whether the host may read them without waiting."""
    return numbers.device.type == "cpu"


def send(numbers: Tensor) -> tuple[Tensor, torch.Event | None]:
    """A copy on the host, complete after the event; on a device without events, the numbers themselves."""
    device = numbers.device
    stream = getattr(torch.get_device_module(device), "current_stream", None)
    if stream is None or not hasattr(torch.Stream, "record_event"):
        return numbers, None
    sent = numbers.to("cpu", non_blocking=True)  # into pinned memory
    return sent, stream(device).record_event()


class Arrival:
    """Numbers on their way to the host."""

    def __init__(self, numbers: Tensor):
        self.is_here = is_here(numbers)
        """Whether they were on the host at once."""
        self._numbers, self._event = (numbers.detach(), None) if self.is_here else send(numbers.detach())

    def read(self) -> Tensor:
        """The numbers on the host; waits if they are not there yet."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        self._numbers = self._numbers.cpu()
        return self._numbers

    @property
    def norms(self) -> list[float]:
        """The numbers of a vector; waits for them."""
        return self.read().tolist()


class Observation:
    """The sums of `kernels.observe` for a step's rows.

    Args:
        sums: (rows, parts, 9).
        space: the step's; None if not known.
        evaluated: for each row, whether both predictions are the network's own.
    """

    def __init__(self, sums: Tensor, space: Space | None, evaluated: Sequence[bool]):
        self._sums, self._space, self._evaluated = Arrival(sums), space, evaluated

    @property
    def is_here(self) -> bool:
        """Whether the sums were on the host at once."""
        return self._sums.is_here

    @cached_property
    def _totals(self) -> list[list[float]]:
        """The nine sums of each row."""
        return self._sums.read().double().sum(1).tolist()

    @cached_property
    def similarity(self) -> Tensor:
        """(2, rows): cosines of the denoised predictions and of the noise, NaN where unknown; waits for them.

        With X and d = b (c - u): <X, X - d> / sqrt(<X, X> <X - d, X - d>).
        """
        found = [[math.nan] * len(self._evaluated) for _ in range(2)]
        if self._space is not None and any(self._evaluated):
            for i, was in enumerate(self._evaluated):
                _, _, _, _, XX, NN, dd, Xd, Nd = self._totals[i]
                for each, VV, Vd, b in zip(found, (XX, NN), (Xd, Nd), (self._space.b, self._space.q), strict=True):
                    size = VV * (VV - 2 * b * Vd + b * b * dd)
                    each[i] = (VV - b * Vd) / math.sqrt(size) if was and size > 0 else math.nan
        return torch.tensor(found)

    @property
    def difference(self) -> Tensor:
        """(rows,): `||cond - uncond||` of the noise, NaN where not both were evaluated; waits for it.

        If the noise is not known, it is that of the predictions as they are.
        """
        q = 1.0 if self._space is None or not math.isfinite(self._space.q) else abs(self._space.q)
        rows = zip(self._totals, self._evaluated, strict=True)
        return torch.tensor([q * row[6] ** 0.5 if was else math.nan for row, was in rows])

    @property
    def norms(self) -> list[float]:
        """Over all rows: of the output's deviation from the formula, of the output, of c and of u. Waits for them."""
        return [sum(column) ** 0.5 for column in [*zip(*self._totals, strict=True)][:4]]


def unseen(rows: int) -> Observation:
    """The observation of a step that did not evaluate both predictions."""
    return Observation(torch.zeros(rows, 1, 9), None, [False] * rows)
