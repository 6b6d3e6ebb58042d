"""Drawn predictions on which float32 loses what it can lose, and the papers' formulas on them in float64.

draw -> (sample, cond, uncond), rule, the guided prediction in float64
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_guidance.rules import CFG, TCFG, CFGZeroStar, MagnitudeAware, Rule

Drawn = tuple[tuple[Tensor, Tensor, Tensor], Rule, Tensor]
SHAPE = (2, 4, 24, 24)  # 2304 numbers: two programs of a kernel


def over(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of each sample's numbers as one row, shaped to multiply it."""
    return function(x.flatten(1)).reshape(-1, *[1] * (x.ndim - 1))


def dot(x: Tensor, y: Tensor) -> Tensor:
    return over(x * y, lambda rows: rows.sum(1))


def zero_star(c: Tensor, u: Tensor, w: float) -> Tensor:
    """arXiv 2503.18886, Algorithm 1."""
    s = dot(c, u) / dot(u, u)
    return s * u + w * (c - s * u)


def tangential(c: Tensor, u: Tensor, w: float) -> Tensor:
    """arXiv 2503.18137, Algorithm 1, by a singular value decomposition."""
    first = torch.linalg.svd(torch.stack([c.flatten(1), u.flatten(1)], 1), full_matrices=False)[2][:, 0].view_as(c)
    part = dot(u, first) * first
    return part + w * (c - part)


def rescaled(c: Tensor, u: Tensor, w: float, phi: float) -> Tensor:
    """arXiv 2305.08891, equations 15 and 16."""
    g = u + w * (c - u)
    f = over(c, lambda rows: rows.std(1)) / over(g, lambda rows: rows.std(1))
    return phi * f * g + (1 - phi) * g


def damped(c: Tensor, u: Tensor, w: float, alpha: float) -> Tensor:
    """MAMBO-G, arXiv 2508.03442."""
    ratio = (dot(c - u, c - u) / dot(u, u)).sqrt()
    return u + (1 + (w - 1) * (-alpha * ratio).exp()) * (c - u)


def drawn(kind: str, seed: int) -> Drawn:
    """Float32 inputs of a kind, and what a rule makes of just these numbers."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sample, c, other = torch.randn(3, *SHAPE, generator=generator)
    w = draw.uniform(1.5, 12.0)
    if kind == "a small unconditional prediction":
        u = 10 ** draw.uniform(-5, -1) * (c + 10 ** draw.uniform(-3, 1) * other)
        rule, formula = draw.choice(
            ((CFGZeroStar(w), zero_star), (MagnitudeAware(w, 0.01), lambda c, u, w: damped(c, u, w, 0.01)))
        )
    elif kind == "a mean far above the deviation":
        mean = 10 ** draw.uniform(1, 3)
        c, u = mean + c, mean * draw.uniform(0.5, 1.5) + c + 0.1 * other
        phi = draw.uniform(0.3, 1.0)
        rule, formula = CFG(w, phi), lambda c, u, w: rescaled(c, u, w, phi)
    else:  # norms from tiny to huge
        size = 10 ** draw.choice((draw.uniform(-17, -8), draw.uniform(8, 15)))
        c, u = size * c, size * draw.uniform(0.3, 3.0) * (c + other)
        rule, formula = draw.choice(((TCFG(w), tangential), (CFGZeroStar(w), zero_star)))
    return (sample, c, u), rule, formula(c.double(), u.double(), w)


KINDS = ("a small unconditional prediction", "a mean far above the deviation", "norms from tiny to huge")
