"""The rules' coefficients: the factors of X, c, d, m and u in the guided prediction, from a group's Gram entries.

Torch and Triton both run this source; see `algebra`.
"""

from diffusers_guidance.kernels import ops
from diffusers_guidance.kernels.algebra import algebra
from diffusers_guidance.kernels.reference import Coefficients


@algebra(centred=True)
def cfg(gram, b, w, rescale, _2, _3):
    """c' = f (c + (w - 1) d), f = rescale * std(c) / std(c + (w - 1) d) + (1 - rescale)

    (arXiv 2305.08891, eq. 15-16).
    """
    v = w - 1
    # Variances of c and of g = c + (w - 1) d, times (n - 1). To subtract any number from c, and any from d, does not
    # change them.
    total = gram.sum_c + v * gram.sum_d
    variance_c = gram.cc - gram.sum_c * gram.sum_c / gram.numel
    variance_g = gram.cc + 2 * v * gram.cd + v * v * gram.dd - total * total / gram.numel
    f = rescale * ops.sqrt(variance_c / variance_g) + (1 - rescale)
    f = ops.where(rescale == 0, 1.0, f)  # 0 * NaN where the variance is zero
    return Coefficients(0.0 * f, f, f * v, 0.0 * f)


@algebra
def apg(gram, b, w, beta, threshold, eta):
    """X' = X + (w - 1) s (D - (1 - eta) k X), with D = b d + beta m the update before its cap,

    s = min(1, threshold / ||D||) and k = <D, X> / <X, X> (arXiv 2410.02416, Algorithm 1); the prediction that
    denoises to X' is c + (X' - X) / b.
    """
    DD = b * b * gram.dd + 2 * b * beta * gram.dm + beta * beta * gram.mm
    DX = b * gram.Xd + beta * gram.Xm
    s = 1.0 / ops.sqrt(
        ops.maximum(1.0, DD / threshold / threshold)
    )  # this form has a gradient for any threshold, and at DD = 0
    k = DX / gram.XX
    strength = (w - 1) * s / b
    noisy = b != 0  # at b = 0 no noise is left, and the denoised sample does not depend on the prediction
    kX = ops.where(noisy, -strength * (1 - eta) * k, 0.0)
    kd = ops.where(noisy, strength * b, 0.0)
    km = ops.where(noisy, strength * beta, 0.0)
    return Coefficients(kX, 1.0 + 0.0 * b, kd, km)


@algebra
def cfg_zero_star(gram, b, w, _1, _2, _3):
    """s u + w (c - s u) with s = <c, u> / <u, u> (arXiv 2503.18886, Algorithm 1).

    It is w c - (w - 1) s u, and c + (w - 1) ((1 - s) c + s d) with 1 - s = (<d, d> - <c, d>) / <u, u>. The first form
    is exact where c and u are far apart, the second where they nearly agree.
    """
    v = w - 1
    s = gram.cu / gram.uu
    near = gram.dd < gram.uu
    of_c = ops.where(near, 1.0 + v * (gram.dd - gram.cd) / gram.uu, w)
    return Coefficients(0.0 * s, of_c, ops.where(near, v * s, 0.0), 0.0 * s, ops.where(near, 0.0, -v * s))


@algebra
def tcfg(gram, b, w, _1, _2, _3):
    """u' + w (c - u') with u' the part of u along the first right singular vector of (c, u) (arXiv 2503.18137).

    The singular values and left vectors of the rows (c, u) are those of their Gram matrix, whose first vector
    (cos t, sin t) has tan 2t = 2 <c, u> / (<c, c> - <u, u>). So u' = sin t (cos t c + sin t u). Divided by the trace,
    huge and tiny predictions stay within float32.
    """
    v = w - 1
    trace = gram.cc + gram.uu
    cosine = (2 * gram.cd - gram.dd) / trace  # <c, c> - <u, u>
    sine = 2 * gram.cu / trace
    R = ops.sqrt(cosine * cosine + sine * sine)
    return Coefficients(0.0 * R, w - v * sine / R / 2, 0.0 * R, 0.0 * R, -v * (1.0 - cosine / R) / 2)


@algebra
def magnitude_aware(gram, b, w, alpha, _2, _3):
    """u + w' (c - u) with w' = 1 + (w - 1) exp(-alpha ||d|| / ||u||) (arXiv 2508.03442)."""
    damped = ops.exp(-alpha * ops.sqrt(gram.dd / gram.uu))
    return Coefficients(0.0 * damped, 1.0 + 0.0 * damped, (w - 1) * damped, 0.0 * damped)


@algebra
def renormed(gram, b, w, most, _2, _3):
    """g sqrt(<c, c> / <g, g>) with g = c + (w - 1) d: CFG with the length of c; with `most`, at most that length."""
    v = w - 1
    f = ops.sqrt(gram.cc / (gram.cc + 2 * v * gram.cd + v * v * gram.dd))
    f = ops.where(most != 0, ops.minimum(1.0, f), f)
    return Coefficients(0.0 * f, f, v * f, 0.0 * f)


@algebra
def beta_cfg(gram, b, w, gamma, _2, _3):
    """u + w (c - u) / ||c - u||^gamma (arXiv 2502.10574); w already contains the factor of the beta distribution."""
    scaled = w * ops.exp(-0.5 * gamma * ops.log(gram.dd))
    return Coefficients(0.0 * scaled, 1.0 + 0.0 * scaled, scaled - 1, 0.0 * scaled)


@algebra
def tag(gram, b, w, eta, _2, _3):
    """g + (eta - 1) (g - <g, x> / <x, x> x) with g = c + (w - 1) d (arXiv 2510.04533, Algorithm 1).

    The sample x is proportional to X - b c, and its length does not matter.
    """
    v = w - 1
    xx = gram.XX - 2 * b * gram.Xc + b * b * gram.cc
    gx = gram.Xc - b * gram.cc + v * (gram.Xd - b * gram.cd)
    k = (eta - 1) * gx / xx
    return Coefficients(-k, eta + b * k, eta * v + 0.0 * k, 0.0 * k)


@algebra
def apg_from_u(gram, b, w, beta, threshold, eta):
    """u + w s (D - (1 - eta) k c), with D = d + beta m and s, k of `apg`: APG on predictions as they are, as in
    diffusers' guiders.
    """
    DD = gram.dd + 2 * beta * gram.dm + beta * beta * gram.mm
    Dc = gram.cd + beta * gram.cm
    s = ops.minimum(1.0, threshold / ops.sqrt(DD))
    k = Dc / gram.cc
    return Coefficients(0.0 * k, 1.0 - w * s * (1 - eta) * k, w * s - 1, w * s * beta + 0.0 * k)


@algebra
def momentum_guidance(gram, b, w, alpha, _2, _3):
    """v + alpha (v - m) with v = c + (w - 1) d, and m the average of earlier steps; v at the first step."""
    carried = ops.where(gram.mm > 0, alpha, 0.0)
    return Coefficients(0.0 * carried, 1.0 + carried, (1.0 + carried) * (w - 1), -carried)
