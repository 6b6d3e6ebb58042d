"""Formulas written down from their papers; they share nothing with the package."""

import torch
from torch import Tensor


def listing(
    D_c: Tensor, D_u: Tensor, w: float, avg: Tensor, beta: float, r: float | None, eta: float, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2410.02416 (APG) on denoised predictions: what is guided, and the momentum to carry on.

    Args:
        D_c, D_u: The denoised predictions.
        w: Guidance scale.
        avg: The momentum so far; zeros at a first step.
        beta: What of it is kept.
        r: The norm that a difference is capped to; `None` for none.
        eta: What is kept of the difference's parallel part.
        dims: The dimensions that one norm is taken over.
    """

    def norm(x: Tensor) -> Tensor:
        return x.square().sum(dim=dims, keepdim=True).sqrt()

    diff = D_c - D_u
    avg = diff + beta * avg
    update = avg
    if r is not None:
        update = update * torch.clamp(r / norm(update), max=1.0)
    unit = D_c / norm(D_c)
    parallel = (update * unit).sum(dim=dims, keepdim=True) * unit
    return D_c + (w - 1) * (update - parallel + eta * parallel), avg
