"""Some of a step's numbers, on which a search is decided; and all of them, on which it is confirmed."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.residual import Scale

SIZE = 8192
"""About how many numbers a search is decided on."""
_PIECE = 1 << 18
"""About how many numbers the host computes with at a time: for more, new memory costs more than the arithmetic."""


class Sample:
    """Some of the numbers of tensors of one shape, as whole fibers along their last dimension; of few, all."""

    def __init__(self, shape: torch.Size) -> None:
        rows, *inner, width = shape if len(shape) > 1 else (*shape, 1)
        fibers = max(1, SIZE // max(1, rows * width))
        self.shape = shape
        self.whole = math.prod(inner) <= 2 * fibers
        if not self.whole:
            generator = torch.Generator().manual_seed(0)
            places = [torch.randint(n, (rows, fibers), generator=generator) for n in inner]
            self.index = (torch.arange(rows)[:, None], *places)

    def __call__(self, t: Tensor) -> Tensor:
        """(rows, fibers, width) on the host; of few numbers, the tensor itself."""
        if not self.whole:
            t = t.detach()[tuple(i.to(t.device) for i in self.index)]
        return t.detach().cpu()

    def of(self, s: Scale) -> Scale:
        """A scale as it belongs to the sample."""
        return self(s.expand(self.shape)) if isinstance(s, Tensor) else s


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All of tensors of one shape: a few channels at a time if they are contiguous on the host, else at once.

    What is the same for all of a row needs no memory of its own, and is as good as contiguous.
    """
    if tensors[0].ndim < 2 or not all(
        t.device.type == "cpu" and (t.is_contiguous() or not any(t.stride()[1:])) for t in tensors
    ):
        yield tensors
        return
    for row in zip(*(t.split(1) for t in tensors), strict=True):
        channels = max(1, _PIECE * row[0].shape[1] // max(1, row[0].numel()))
        yield from zip(*(t.split(channels, 1) for t in row), strict=True)


def is_finite(t: Tensor) -> bool:
    """Whether all numbers are."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(t))).all())
