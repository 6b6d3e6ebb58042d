"""What a scheduler's own arithmetic does with predictions, seen by stepping a copy: `Space.reuse` and `Space.left`.

A solver may use a prediction again at later steps, and a run may end with noise. Neither stands in a scheduler's
numbers. So a copy of it steps through samples and predictions that are known, one number for each question.
"""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.spaces import Space

SMALL = 1e-2
"""The size of what a probe holds: some schedulers clip what is larger than 1."""
_FAR = 5.0
"""A solver that uses a prediction this many times as strongly as an Euler step, or as weakly, is not understood."""


def left(s: Any, table: tuple[Space, ...]) -> float:
    """`Space.left`: what the scheduler's own last step makes of a sample of noise alone, over one of signal alone."""
    last = table[-1]

    def probe(s: Any) -> Tensor:
        x0, eps = SMALL * torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1, 1)
        x = last.signal * x0 + last.noise * eps
        return type(s).step(s, (eps - last.p * x) / last.q, s.timesteps[-1], x, return_dict=False)[0].double()

    found = _probed(s, probe)
    if found is None or not last.signal:
        return 0.0
    after, now = float(found[1] / found[0]), last.noise / last.signal
    after = now if math.isclose(after, now, rel_tol=1e-4) else round(after, 6)
    return max(0.0, after) if after <= now else 0.0


def _probed(s: Any, run: Callable[[Any], Tensor]) -> Tensor | None:
    """What `run` makes with a copy of the scheduler. None if it adds noise, or cannot be run for a probe."""
    home = getattr(getattr(type(s), "step", None), "__module__", None) or ""
    if not home.startswith("diffusers."):  # somebody's own step is for the run to call
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            found = run(_fresh(s))
            return found if torch.equal(before, torch.get_rng_state()) else None
    except Exception:  # the scheduler may be any object
        return None


def reuse(s: Any, table: tuple[Space, ...]) -> list[float]:
    """By step, `Space.reuse`: the scheduler's own arithmetic, as far as it is linear; else ones.

    A copy runs from x = 0 with predictions that say eps = 0, except that in row t that of step t denoises to an error.
    An error of x / signal stays what it is then. After an Euler step from rho to rho' it is 1 - rho' / rho of the
    prediction's.
    """
    count = len(table)
    rho = [space.noise / space.signal if space.signal else math.inf for space in table]
    euler = torch.tensor([1 - after / now if now else 0.0 for now, after in pairwise([*rho, table[-1].left])])
    plain = [1.0] * count
    if not isinstance(getattr(s, "model_outputs", None), list):  # it uses none again
        return plain
    if count < 3 or not (all(space.new_step and space.q for space in table) and euler.isfinite().all()):
        return plain
    x = _probed(s, lambda s: _impulses(s, table))
    if x is None:
        return plain
    found = torch.where(euler > 0, x[:-2] / x[-1] / euler, 1.0)  # a step that moves nothing uses nothing again
    is_sound = found.isfinite() & (found > 1 / _FAR) & (found < _FAR)
    is_linear = float((x[-2] / x[-1]).abs()) < 1e-4  # where nothing is off, nothing moves
    return [round(each, 4) for each in found.tolist()] if is_linear and bool(is_sound.all()) else plain


def _impulses(s: Any, table: tuple[Space, ...]) -> Tensor:
    """(T + 2,) where a run ends: if the prediction of step t, in row t, denoises to `SMALL` more; if none does; and if
    x / signal is `SMALL` from the start."""
    x = torch.zeros(len(table) + 2, 1, 1, 1, dtype=torch.float64)
    x[-1] = SMALL * table[0].signal
    for t, space in enumerate(table):
        eps = torch.zeros_like(x)
        eps[t] = -SMALL * space.signal / space.noise
        x = type(s).step(s, (eps - space.p * x) / space.q, s.timesteps[t], x, return_dict=False)[0].double()
    return x.flatten()


def _fresh(scheduler: Any) -> Any:
    """A copy as `set_timesteps` leaves it, which shares nothing that a step changes."""
    s = copy.copy(scheduler)
    for name, value in vars(s).items():
        if isinstance(value, list):
            setattr(s, name, [None] * len(value) if name in _HISTORIES else list(value))
    for name, value in {"_step_index": None, "_begin_index": None, **_BEGINNINGS}.items():
        if hasattr(s, name):
            setattr(s, name, value)
    return s


_HISTORIES = ("model_outputs", "timestep_list")
_BEGINNINGS = {"lower_order_nums": 0, "this_order": 0, "last_sample": None, "is_scale_input_called": True}
"""What multistep schedulers of diffusers keep from step to step, and what it is before the first."""
