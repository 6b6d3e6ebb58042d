"""Guidance by hand: what rules and policies come to, in float64, on an untouched pipeline that evaluates everything.

Its scheduler is handed what the papers' formulas make of the denoiser's outputs, in place of the pipeline's own
combination. Nothing of the package has a part in it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from conformance import PARAMETRISATIONS, denoisers, denoising, flowing, is_cond_first, levels, watched
from papers import listing
from tiny import Tiny
from tiny_core import SCALE
from torch import Tensor


@dataclass
class Seen:
    """A sample at a step, all tensors with one row, and what has been seen of it before."""

    index: int
    count: int
    x: Tensor
    a: float
    b: float
    sigma: float
    agreed: float = -1.0
    """The most that its denoised predictions have agreed so far, as a cosine."""
    momentum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def denoised(self, y: Tensor) -> Tensor:
        return self.a * self.x + self.b * y


# Rules: the guided prediction of (c, u)

Rule = Callable[[Tensor, Tensor, Seen], Tensor]


def plain(c: Tensor, u: Tensor, seen: Seen) -> Tensor:
    """arXiv 2207.12598."""
    return u + SCALE * (c - u)


def rescaled(c: Tensor, u: Tensor, seen: Seen, phi: float = 0.7) -> Tensor:
    """arXiv 2305.08891, equations 15 and 16."""
    g = plain(c, u, seen)
    return phi * g * c.std() / g.std() + (1 - phi) * g


def projected(c: Tensor, u: Tensor, seen: Seen, r: float = 15.0, beta: float = -0.5, eta: float = 0.0) -> Tensor:
    """arXiv 2410.02416."""
    D_c, D_u = seen.denoised(c), seen.denoised(u)
    D, seen.momentum = listing(D_c, D_u, SCALE, seen.momentum, beta, r, eta, tuple(range(1, c.ndim)))
    return c + (D - D_c) / seen.b


# Policies: "both", "conditional" or "extrapolate"

Plan = Callable[[Seen], str]


def scheduled(*actions: str) -> Plan:
    return lambda seen: actions[seen.index]


def adaptive(threshold: float) -> Plan:
    """arXiv 2312.12487, section 4."""
    return lambda seen: "conditional" if seen.agreed >= threshold else "both"


def within(low: float, high: float) -> Plan:
    """arXiv 2404.07724, by steps."""
    return lambda seen: "both" if low <= seen.index / seen.count < high else "conditional"


def at_sigmas(low: float, high: float) -> Plan:
    """arXiv 2404.07724, by noise levels."""
    return lambda seen: "both" if low < seen.sigma <= high else "conditional"


# Finishes

Finish = Callable[[Tensor, Tensor], Tensor]


def as_it_is(g: Tensor, c: Tensor) -> Tensor:
    return g


def norm_of_c(g: Tensor, c: Tensor) -> Tensor:
    """Qwen-Image's."""
    return g * c.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True)


@contextmanager
def by_hand(
    pipe: Any, entry: Tiny, count: int, rule: Rule, plan: Plan, finish: Finish = as_it_is
) -> Iterator[list[list[str]]]:
    """Guides a run of `count` steps so; yields what is done at each, by sample.

    Where a denoiser has nothing to extrapolate from, both of its predictions are used. Each of two that take turns has
    a momentum of its own, as each has a guider of its own in diffusers.
    """
    outputs: list[tuple[Any, Tensor]] = []
    done: list[list[str]] = []
    held: dict[Any, tuple[Tensor, float]] = {}
    momenta: dict[Any, Tensor] = {}
    before: dict[int, Seen] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append((module, output[0] if isinstance(output, tuple) else output))

    def halves(target: Tensor) -> tuple[Any, Tensor, Tensor]:
        parts = outputs[0][1].chunk(2) if entry.style == "batched" else [y for _, y in outputs]
        c, u = (y[:, : target.shape[1]].double() for y in (parts if is_cond_first(entry) else reversed(parts)))
        module = outputs[0][0]
        outputs.clear()
        return module, c, u

    def guided(row: int, module: Any, c: Tensor, u: Tensor, seen: Seen, velocity: float) -> Tensor:
        if row in before:
            seen.agreed = before[row].agreed
        if (row, module) in momenta:
            seen.momentum = momenta[row, module]
        before[row], action = seen, plan(seen)
        if action == "extrapolate" and (row, module) not in held:
            action = "both"
        done[-1].append(action)
        if action == "both" or (row, module) not in held:  # a denoiser's first step is evaluated in full
            held[row, module] = (c - u, velocity)
            cosine = torch.cosine_similarity(seen.denoised(c).flatten(), seen.denoised(u).flatten(), 0)
            seen.agreed = max(seen.agreed, float(cosine))
        if action == "conditional":
            return finish(c, c)
        delta, then = held[row, module]
        g = rule(c, c - delta * then / velocity, seen)
        momenta[row, module] = seen.momentum
        return finish(g, c)

    def see(given: dict[str, Any]) -> None:
        target, x, t = given["model_output"], given["sample"].double(), given["timestep"]
        module, c, u = halves(target)
        (signal, noise), (a, b) = levels(pipe.scheduler, t), denoising(pipe.scheduler, t)
        sigma = noise if PARAMETRISATIONS[type(pipe.scheduler).__name__] is flowing else noise / signal
        done.append([])
        step = [Seen(len(done) - 1, count, each, a, b, sigma) for each in x.split(1)]
        # d v of v = (signal eps - noise x0) / size, with the sample given (arXiv 2202.00512).
        velocity = -b * math.hypot(signal, noise) / noise
        rows = zip(c.split(1), u.split(1), step, strict=True)
        made = [guided(i, module, *each, velocity) for i, each in enumerate(rows)]
        given["model_output"] = torch.cat(made).to(target.dtype)

    hooks = [module.register_forward_hook(keep) for module in denoisers(pipe, entry)]
    try:
        with watched(pipe.scheduler, see):
            yield done
    finally:
        for hook in hooks:
            hook.remove()
