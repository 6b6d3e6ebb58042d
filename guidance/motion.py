"""Motion: how the denoised predictions of a model move over a run under full guidance.

Let X_t be the denoised conditional prediction of a step, and B_t = b (c - u) what guidance adds to it. Then the
denoised guided prediction is D_t = X_t + (w - 1) B_t at any scale w. A motion keeps the three variograms

    E |X_t - X_s|^2        E (X_t - X_s) . (B_t - B_s)        E |B_t - B_s|^2

as means over numbers and samples, at the noise levels of the steps. The Gram matrix of all X and B has the same
information, but large terms cancel in its differences. The variogram of D at any scale follows:

    V(t, s) = the first + 2 (w - 1) the second + (w - 1)^2 the third

Steps at other noise levels are interpolated. For this, time runs as fast as predictions move: V^(1/p) passes from one
level to the next, on a straight line over log(noise / signal). In that time the power law |t - s|^p fits neighbouring
levels by construction. It replaces what was not measured. `kriged` estimates a level in between from the measured ones,
and the variance that this estimate has under the power law is added. So a fine grid serves a coarse one as if it had
been measured, and a coarse grid serves a fine one by the power law. The power law also counts as one more run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.spaces import Space
from diffusers_guidance.variogram import ROUGHNESS, Measured, kriged, power

_HOST: dict = {"dtype": torch.float64, "device": "cpu"}
_LEVELS = (1e-4, 1e3)
"""Noise over signal is limited to this range."""


@dataclass(frozen=True, eq=False)
class Motion:
    """The variograms of runs at one scale, at the noise levels of their steps."""

    levels: Tensor
    """(T,) float64: log(noise / signal), falling."""
    variograms: Tensor
    """(3, T, T) float64: of X, of X with B, of B; means over `runs`."""
    scale: float
    """w of the runs."""
    runs: int

    @property
    def is_sound(self) -> bool:
        """Whether its fields fit together and are finite."""
        n = len(self.levels)
        return (
            self.levels.ndim == 1
            and n > 2
            and self.variograms.shape == (3, n, n)
            and bool(self.levels.isfinite().all() and self.variograms.isfinite().all())
            and bool((self.levels.diff() < 0).all())
            and bool((self.at(self.scale).diagonal(1) > 0).all())
            and self.runs > 0
        )

    def at(self, w: float) -> Tensor:
        """(T, T): the variogram of guided predictions at scale w, on its own levels."""
        x, both, b = self.variograms
        return (x + 2 * (w - 1) * both + (w - 1) ** 2 * b).clamp(min=0)

    def is_like(self, other: "Motion") -> bool:
        """Whether both have the same levels and scale."""
        same = len(self.levels) == len(other.levels) and torch.allclose(self.levels, other.levels, rtol=0, atol=1e-4)
        return same and math.isclose(self.scale, other.scale, rel_tol=1e-4)

    def __add__(self, other: "Motion") -> "Motion":
        runs = self.runs + other.runs
        mean = (self.runs * self.variograms + other.runs * other.variograms) / runs
        return Motion(self.levels, mean, self.scale, runs)


def merged(motions: Sequence[Motion]) -> tuple[Motion, ...]:
    """The same motions, with those that are alike added up."""
    found: list[Motion] = []
    for motion in motions:
        like = next((i for i, each in enumerate(found) if each.is_like(motion)), None)
        if like is None:
            found.append(motion)
        else:
            found[like] = found[like] + motion
    return tuple(found)


def level(space: Space) -> float:
    """log(noise / signal) of a step."""
    rho = space.noise / space.signal if space.signal else math.inf
    return math.log(min(max(rho, _LEVELS[0]), _LEVELS[1]))


class Known(NamedTuple):
    """What motions say about a run."""

    variogram: Measured
    doubt: Measured
    """The part of `variogram` that was not measured, but follows from the power law."""
    motion: Motion
    """The motion that says so."""


@lru_cache(maxsize=64)
def known(motions: tuple[Motion, ...], table: tuple[Space, ...], w: float | None) -> Known | None:
    """What the motions know about a run. It uses the nearest scale, and there the motion with the least doubt."""
    if not motions or len(table) < 2:
        return None
    levels = torch.tensor([level(space) for space in table], **_HOST)
    nearest = min(far(motion, w) for motion in motions)
    found = [served(motion, levels, w) for motion in motions if far(motion, w) <= nearest + 1e-6]
    return min(found, key=lambda each: float(each.doubt.values.diagonal(1).sum() / each.variogram.values.sum()))


def far(motion: Motion, w: float | None) -> float:
    """How far a scale is from a motion's scale: the logarithm of the factor by which guidance adds more."""
    return 0.0 if w is None else abs(math.log(max(abs(w - 1), 0.1) / max(abs(motion.scale - 1), 0.1)))


def served(motion: Motion, levels: Tensor, w: float | None = None) -> Known:
    """What a motion knows about steps at other `levels`, and at another scale."""
    own = motion.at(motion.scale if w is None else w)
    moved = own.diagonal(1)
    time = torch.cat([torch.zeros(1, **_HOST), moved.clamp(min=1e-9 * float(moved.max())).pow(1 / ROUGHNESS).cumsum(0)])
    there = _interpolated(levels, motion.levels, time)
    law = power(time, time)
    own = (motion.runs * own + law) / (motion.runs + 1)
    to_known = power(time, there)
    w_known = kriged(law, to_known)  # (T', T)
    products = w_known @ own @ w_known.T
    open_ = w_known @ to_known
    left = (open_ + open_.T - power(there, there) - w_known @ law @ w_known.T) / 2  # covariances
    doubt = (left.diagonal()[:, None] + left.diagonal() - 2 * left).clamp(min=0)
    squares = products.diagonal()
    values = (products - (squares[:, None] + squares) / 2).clamp(min=0) + doubt
    return Known(Measured(_apart(values)), Measured(_apart(doubt)), motion)


def _apart(values: Tensor) -> Tensor:
    """The same values, slightly raised so that no two steps are at the same place."""
    least = 1e-9 * float(values.max()) or 1.0
    return values + least * (1 - torch.eye(len(values), dtype=values.dtype))


def _interpolated(at: Tensor, levels: Tensor, time: Tensor) -> Tensor:
    """Times at other levels, on straight lines between the known ones; the lines continue beyond both ends."""
    i = torch.searchsorted(-levels, -at).clamp(1, len(levels) - 1)
    share = (at - levels[i - 1]) / (levels[i] - levels[i - 1])
    return time[i - 1] + share * (time[i] - time[i - 1])
