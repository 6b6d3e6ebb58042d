"""How far a reproduced number is off, and what rounding allows; read from the device when it is asked for."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scale = float | Tensor
"""A pipeline's guidance scale; a tensor where one prediction is guided at several."""


class Fit(NamedTuple):
    """How far a reproduction is off: the error's norm, and the norm rounding allows."""

    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """The error over what is allowed; 0 if nothing is off."""
        return 0.0 if self.error == 0 else self.error / self.allowed if self.allowed else math.inf

    @property
    def fits(self) -> bool:
        return self.error <= self.allowed


class Tolerance(NamedTuple):
    """What rounding may do to a reproduction of an output."""

    s: Scale
    noise: float
    """What rounding may do, as a share of the largest terms."""
    floor: float = 0.0
    """And of the output alone."""

    def fit(self, norms: Sequence[float]) -> Fit:
        """The fit, from the four norms of `residual`, once they have been read."""
        error, output, c, u = norms
        s = self.s
        largest = float(s.abs().max()) if isinstance(s, Tensor) else abs(s)
        # Every order of operations rounds terms no larger than these, each by less than eps.
        return Fit(error, self.noise * (output + largest * (c + u)) + self.floor * output)


def exact(x: Tensor) -> Tensor:
    """In float64 on the host: not every device has it."""
    return x.detach().cpu().double()


def norm(x: Tensor) -> float:
    """Over everything, in float32 where that is more."""
    return float(_norm(x))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32))


def residual(expected: Tensor, output: Tensor, c: Tensor, u: Tensor, is_finite: bool = False) -> Tensor:
    """(4,): the norms of what `expected` is off by from the pipeline's `output`, of that, of c and of u.

    Nobody waits for them until they are read. What is not finite counts as zero, so that the same numbers must be
    broken in both, and the others agree.

    Args:
        is_finite: whether everything is known to be, so that nothing has to be counted as zero.
    """
    if expected.shape != output.shape:
        return torch.tensor([float("inf"), 0, 0, 0])
    if not is_finite:
        expected, output, c, u = (t.nan_to_num(0, 0, 0) for t in (expected, output, c, u))
    # Each in a pass of its own: what is large is not copied to be compared.
    return torch.stack([_norm(t) for t in (expected - output, output, c, u)])


def mixture(output: Tensor, *vectors: Tensor) -> tuple[list[float], Fit]:
    """Least squares of `output` on `vectors`, and how well that explains it.

    Numbers that are not finite must be so in both, and have no say in the rest.
    """
    basis = torch.stack([exact(v).flatten() for v in vectors], 1)
    y = exact(output).flatten()
    finite = torch.isfinite(basis).all(1)
    if not (torch.equal(finite, torch.isfinite(y)) and finite.any()):
        return [float("nan")] * len(vectors), Fit(float("inf"), 0.0)
    basis, y = basis[finite], y[finite]
    factors = torch.linalg.lstsq(basis, y).solution
    terms = float((factors.abs() * basis.norm(dim=0)).sum())
    eps = torch.finfo(output.dtype).eps
    error = float((basis @ factors - y).norm())
    return factors.tolist(), Fit(error, 2 * eps * (float(y.norm()) + terms))
