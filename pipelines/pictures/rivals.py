"""Other people's ways to forecast skipped steps, as rivals of `Forecast`: a few lines each, from their papers.

All forecast the guided prediction: a forecast that is linear in the network's outputs gives the same result
from both predictions. They are for contests, not offered as policies.
"""

import itertools
import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from diffusers_guidance.policies import Forecast, Handed
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import History, Step


@dataclass(frozen=True)
class Rival(Forecast):
    """Evaluates as many steps as `Forecast`, and repays nothing."""

    _: KW_ONLY
    is_even: bool = False
    """Whether the evaluated steps are spaced evenly."""

    def pattern(self, count: int, table: tuple[Space, ...] = (), branches: int = 2) -> tuple[bool, ...]:
        if not self.is_even:
            return super().pattern(count, table, branches)
        evaluations = sum(super().pattern(count, table, branches))
        chosen = {round(i * (count - 1) / max(evaluations - 1, 1)) for i in range(evaluations)}
        return tuple(i in chosen for i in range(count))

    def kept(self, step: Step, guided: Tensor) -> Tensor:
        """What the rival keeps of an evaluated step."""
        return guided

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        """The prediction of a skipped step, from what the rival keeps."""
        raise NotImplementedError

    def hand(self, step: Step, history: History, guided: Tensor | None) -> Handed:
        if guided is None:
            return Handed(self.estimate_of(step, history.guided))
        history.keep_guided(step.index, self.kept(step, guided.float()).clone(), bool(step.table))
        return Handed(guided)


@dataclass(frozen=True)
class Held(Rival):
    """The last prediction."""

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        return known[max(known)]


@dataclass(frozen=True)
class TaylorSeer(Rival):
    """A Taylor series in the number of steps, by divided differences (arXiv 2503.06923; diffusers' lite mode)."""

    _: KW_ONLY
    order: int = 1

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        factors: list[Tensor] = []
        before = None
        for i in sorted(known):
            new = [known[i]]
            for j, factor in enumerate(factors[: self.order]):
                new.append((new[j] - factor) / (i - before))  # type: ignore[operator]
            factors, before = new, i
        away = step.index - max(known)
        return sum(factor * away**j / math.factorial(j) for j, factor in enumerate(factors))


@dataclass(frozen=True)
class AdamsBashforth(Rival):
    """Two-step Adams-Bashforth: a line through the last two predictions, over the noise level."""

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        *others, last = sorted(known)
        if not others or step.sigma is None:
            return known[last]
        first, t0, t1 = others[-1], step.table[others[-1]].sigma, step.table[last].sigma
        return known[last] + (known[last] - known[first]) * (step.sigma - t1) / (t1 - t0)


@dataclass(frozen=True)
class Spectrum(Rival):
    """Chebyshev polynomials of degree 4 with ridge 0.1 over all evaluated predictions, blended half and half with a
    line (arXiv 2603.01623)."""

    _: KW_ONLY
    degree: int = 4
    ridge: float = 0.1

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        steps = sorted(known)
        t = torch.tensor([*steps, step.index], dtype=torch.float64) / max(step.count - 1, 1) * 2 - 1
        basis = torch.stack([torch.cos(k * torch.arccos(t.clamp(-1, 1))) for k in range(self.degree + 1)], 1)
        fitted, wanted = basis[:-1], basis[-1]
        gram = fitted.T @ fitted + self.ridge * torch.eye(self.degree + 1, dtype=torch.float64)
        weights = fitted @ torch.linalg.solve(gram, wanted)
        curve = sum(float(w) * known[i] for w, i in zip(weights, steps, strict=True))
        line = TaylorSeer.estimate_of(TaylorSeer(nfe=self.nfe), step, known)
        return 0.5 * curve + 0.5 * line


@dataclass(frozen=True)
class EasyCache(Rival):
    """Holds what the network adds to its input (arXiv 2507.02860), on a fixed schedule."""

    def kept(self, step: Step, guided: Tensor) -> Tensor:
        return guided if step.sample is None else guided - step.sample

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        last = known[max(known)]
        return last if step.sample is None else last + step.sample.float()


@dataclass(frozen=True)
class FoCa(Rival):
    """A forecast by the second backward differentiation formula, corrected by Heun's rule (after arXiv 2508.16211).

    Let k be the number of steps since the last evaluated one, f the slope to it, and f' that slope continued on a line.
    The forecast is 4/3 y(0) - 1/3 y(-k) + 2/3 k f', with y(-k) on the line through the last two. Then Heun's rule
    takes the mean of f and of the forecast's slope.
    """

    def estimate_of(self, step: Step, known: dict[int, Tensor]) -> Tensor:
        steps = sorted(known)[-3:]
        last = known[steps[-1]]
        slopes = [(known[b] - known[a]) / (b - a) for a, b in itertools.pairwise(steps)]
        if not slopes:
            return last
        k, slope = step.index - steps[-1], slopes[-1]
        onward = slope
        if len(slopes) > 1:  # the slopes are those of the middle of each gap
            onward = slope + (slope - slopes[0]) * (k + (steps[-1] - steps[-2]) / 2) / ((steps[-1] - steps[0]) / 2)
        forecast = 4 / 3 * last - 1 / 3 * (last - k * slope) + 2 / 3 * k * onward
        return last + k / 2 * (slope + (forecast - last) / k)
