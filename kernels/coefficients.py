"""The rules' coefficients as Triton functions: scalar algebra on a group's Gram entries.

The same algebra as a rule's `coefficients`, on the same `Gram`, with the rule's settings as scalars. To give
a rule of your own one, write a `@triton.jit` function of the Gram, b and four parameters, put it in
`COEFFICIENTS` under a name, and return that name and up to four parameters from the rule's method
`triton(numel)`, numel being the size of a group. A rule without one works too: torch then computes its
coefficients between two kernels. Divisions need no guard: where a coefficient comes out non-finite, the
group is left unguided.
"""

import triton
import triton.language as tl

from diffusers_guidance.kernels.reference import Coefficients


@triton.jit
def cfg(gram, b, w, rescale, unused_2, unused_3):
    """c' = f (c + (w - 1) d), f = rescale * std(c) / std(c + (w - 1) d) + (1 - rescale); arXiv 2305.08891."""
    v = w - 1
    # Variances times (n - 1), of c and of g = c + (w - 1) d.
    total = gram.sum_c + v * gram.sum_d
    variance_c = gram.cc - gram.sum_c * gram.sum_c / gram.numel
    variance_g = gram.cc + 2 * v * gram.cd + v * v * gram.dd - total * total / gram.numel
    f = rescale * tl.sqrt(variance_c / variance_g) + (1 - rescale)
    f = tl.where(rescale == 0, 1.0, f)  # 0 * NaN where the variance is zero
    return Coefficients(0.0 * f, f, f * v, 0.0 * f)


@triton.jit
def apg(gram, b, w, beta, threshold, eta):
    """X' = X + (w - 1) s (D - (1 - eta) k X), with D = b d + beta m the update before its cap,

    s = min(1, threshold / ||D||) and k = <D, X> / <X, X> (arXiv 2410.02416, Algorithm 1); the prediction that
    denoises to X' is c + (X' - X) / b.
    """
    DD = b * b * gram.dd + 2 * b * beta * gram.dm + beta * beta * gram.mm
    DX = b * gram.Xd + beta * gram.Xm
    s = tl.minimum(1.0, threshold / tl.sqrt(DD))
    k = DX / gram.XX
    strength = (w - 1) * s / b
    noisy = b != 0  # at b = 0 no noise is left: the prediction has no part in the denoised sample
    kX = tl.where(noisy, -strength * (1 - eta) * k, 0.0)
    kd = tl.where(noisy, strength * b, 0.0)
    km = tl.where(noisy, strength * beta, 0.0)
    return Coefficients(kX, 1.0 + 0.0 * b, kd, km)


@triton.jit
def cfg_zero_star(gram, b, w, unused_1, unused_2, unused_3):
    """s u + w (c - s u) with s = <c, u> / <u, u> (arXiv 2503.18886, Algorithm 1), and u = c - d."""
    v = w - 1
    uu = gram.cc - 2 * gram.cd + gram.dd
    return Coefficients(0.0 * uu, 1.0 + v * (gram.dd - gram.cd) / uu, v * (gram.cc - gram.cd) / uu, 0.0 * uu)


@triton.jit
def tcfg(gram, b, w, unused_1, unused_2, unused_3):
    """u' + w (c - u') with u' the part of u along the first right singular vector of (c, u) (arXiv 2503.18137)."""
    v = w - 1
    cu = gram.cc - gram.cd
    excess = 2 * gram.cd - gram.dd  # <c, c> - <u, u>
    R = tl.sqrt(excess * excess + 4 * cu * cu)
    of_c = cu / R
    of_u = (1.0 - excess / R) / 2
    return Coefficients(0.0 * R, w - v * (of_c + of_u), v * of_u, 0.0 * R)


@triton.jit
def magnitude_aware(gram, b, w, alpha, unused_2, unused_3):
    """u + w' (c - u) with w' = 1 + (w - 1) exp(-alpha ||d|| / ||u||) (arXiv 2508.03442)."""
    uu = gram.cc - 2 * gram.cd + gram.dd
    damped = tl.exp(-alpha * tl.sqrt(gram.dd / uu))
    return Coefficients(0.0 * uu, 1.0 + 0.0 * uu, (w - 1) * damped, 0.0 * uu)


COEFFICIENTS = {
    "cfg": cfg,
    "apg": apg,
    "cfg_zero_star": cfg_zero_star,
    "tcfg": tcfg,
    "magnitude_aware": magnitude_aware,
}
