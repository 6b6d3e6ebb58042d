"""Variograms: how far apart the guided predictions of two steps are. Every forecast rests on this alone.

Let D_t be the guided prediction of step t as a denoised sample. Its variogram is V(t, s) = E |D_t - D_s|^2, up to a
factor. Without measured runs it is taken as a power of the number of steps between the two (`PowerLaw`). Measured runs
give it directly (`Measured`, see `motion.py`). A sum of variograms is a variogram, so both can be blended.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROUGHNESS = 1.4
"""p: over t steps a guided prediction moves by about t^(p/2). Measured values lie between 1.3 and 1.7."""


@dataclass(frozen=True)
class PowerLaw:
    """|t - s|^p: it depends only on the distance between two steps."""

    roughness: float = ROUGHNESS

    is_measured = False
    """Whether it knows where in a run predictions move much; otherwise it is the same everywhere."""

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """(n, m) float64 from each of n steps to each of m."""
        return power(first, second, self.roughness)


@dataclass(frozen=True, eq=False)
class Measured:
    """The measured variogram of a run's steps."""

    values: Tensor
    """(T, T) float64"""

    is_measured = True

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """(n, m) float64 from each of n steps to each of m."""
        return self.values[first[:, None], second]


def power(first: Tensor, second: Tensor, roughness: float = ROUGHNESS) -> Tensor:
    """(n, m) the power law between times."""
    return (first.double()[:, None] - second.double()).abs() ** roughness


def kriged(known: Tensor, wanted: Tensor) -> Tensor:
    """(m, n): the weights of n known predictions in the best linear estimates of m wanted ones. Each row sums to 1.

    Args:
        known: (n, n), the variogram between the known ones.
        wanted: (n, m), from the known to the wanted ones.
    """
    n, one = len(known), known.new_ones(1, 1)
    row = one.expand(1, n)
    system = torch.cat([torch.cat([known, row.T], 1), torch.cat([row, 0 * one], 1)])
    return torch.linalg.solve(system, torch.cat([wanted, one.expand(1, wanted.shape[1])]))[:n].T
