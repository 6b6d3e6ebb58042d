"""Spaces: every scheduler's prediction as a denoised sample, and as noise.

A scheduler's sample x and the prediction y made from it are linear in the clean sample x0 and the noise eps:

    x = signal * x0 + noise * eps        the levels of the step
    y = their combination                the meaning of "epsilon", "v_prediction", ...

These are two equations with two unknowns, solved once per run for all its steps:

    x0  = a * x + b * y
    eps = p * x + q * y

`Space` is the solution at one step. `pipelines/attach/schedulers.py` reads it off diffusers' schedulers.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Space:
    """What sample and prediction mean at one step, in plain numbers.

    The sample is the one handed to `scheduler.step`, the prediction its `model_output`. If a model also predicts the
    variance (2C channels), the prediction is the first C channels.

    A space ignores options of a `step` call: `s_churn` makes the sample noisier only inside `step`;
    flow matching's `per_token_timesteps` give every token its own noise level.
    """

    a: float
    b: float
    """denoised = a * sample + b * prediction. Always finite; b is 0 where no noise is left."""
    p: float
    q: float
    """eps = p * sample + q * prediction. Not finite for a "sample" prediction from a sample without noise."""
    signal: float
    noise: float
    """sample = signal * x0 + noise * eps."""
    sigma: float
    """Noise over signal, as in the scheduler's `sigmas`; inf without signal. In flow matching it is the noise."""
    new_step: bool
    """False at the later stages of a solver step; momentum does not advance there."""
    reuse: float = 1.0
    """How far an error of this step's prediction moves the rest of the run, as a multiple of an Euler step's: a
    multistep solver uses a prediction again at later steps."""
    left: float = 0.0
    """Noise over signal after the run's last step; 0 at all other steps. Some runs do not end clean (DDIM with
    `set_alpha_to_one=False`)."""

    @cached_property
    def velocity(self) -> float:
        """The prediction's factor in v = (signal * eps - noise * x0) / hypot(signal, noise) (arXiv 2202.00512).

        For a given sample, d x0 = b d y, and signal * x0 + noise * eps is constant: d v = -b hypot / noise * d y.
        """
        factor = -self.b * math.hypot(self.signal, self.noise) / self.noise if self.noise else 0.0
        return factor or 1.0  # without noise, or with b = 0, any factor will do

    @property
    def predicts_velocity(self) -> bool:
        """Whether the prediction is flow matching's velocity: at 0, clean sample and noise equal the sample."""
        return self.a == self.p == 1


class Spaces(tuple[Space, ...]):
    """The spaces of all steps of a run. What follows from them is looked up at every step, so they are hashed once."""

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    @staticmethod
    @lru_cache(maxsize=64)
    def of(spaces: tuple[Space, ...]) -> "Spaces":
        """One object for equal spaces, which a look-up does not compare one by one."""
        return Spaces(spaces)
