"""The guidance arithmetic in plain torch: the specification that all other backends are tested against.

Every rule is a linear combination, per group, of five vectors

    X = a * sample + b * cond      the conditional prediction, denoised
    c = cond                       the conditional prediction, raw
    d = cond - uncond              the guidance direction
    m                              the momentum, in denoised space
    u = uncond                     c - d would lose it where it is far smaller than c

with coefficients that depend only on the inner products of these vectors. A group is a sample, or with `rule.norm_dim`
what those dimensions span (such as a frame of a video). X and d are formed before anything
is summed. So the cancellation in `a * sample + b * cond` and in `cond - uncond` happens once, elementwise. Inner
products of (sample, cond, uncond) would square it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Gram(NamedTuple):
    """Inner products and sums over each group; all (B, 1, ..., 1) unless `norm_dim` keeps dimensions."""

    XX: Tensor
    Xc: Tensor
    Xd: Tensor
    Xm: Tensor
    cc: Tensor
    cd: Tensor
    cm: Tensor
    dd: Tensor
    dm: Tensor
    mm: Tensor
    uu: Tensor
    cu: Tensor
    sum_X: Tensor
    sum_c: Tensor
    sum_d: Tensor
    sum_m: Tensor
    numel: int


class Coefficients(NamedTuple):
    """prediction = X * X_t + c * c_t + d * d_t + m * m_t + u * u_t; floats, or tensors like the Gram's entries."""

    X: Tensor | float
    c: Tensor | float
    d: Tensor | float
    m: Tensor | float
    u: Tensor | float = 0.0


class Rule(Protocol):
    """What `guide` needs from a rule; `diffusers_guidance.rules` has the real ones."""

    @property
    def momentum(self) -> float: ...
    @property
    def norm_dim(self) -> tuple[int, ...] | None: ...
    @property
    def centred(self) -> bool: ...
    def coefficients(self, gram: Gram, b: float) -> Coefficients: ...


def gram(
    X: Tensor, c: Tensor, u: Tensor, m: Tensor, norm_dim: tuple[int, ...] | None = None, centred: bool = False
) -> Gram:
    """Inner products of the vectors, each (B, ...), over `norm_dim` (default: all but the batch).

    With `centred` the means of c and d are subtracted first: the variances are the same, without the cancellation.
    """
    dim = dims_of(X, norm_dim)
    d = c - u
    of_u = [(p * u).sum(dim, keepdim=True) for p in (u, c)]
    if centred:
        c, d = (p - p.mean(dim, keepdim=True) for p in (c, d))
    vectors = (X, c, d, m)
    products = [(p * q).sum(dim, keepdim=True) for i, p in enumerate(vectors) for q in vectors[i:]]
    sums = [p.sum(dim, keepdim=True) for p in vectors]
    return Gram(*products, *of_u, *sums, group_numel(X, norm_dim))  # type: ignore[arg-type, call-arg]  # by place


def group_numel(x: Tensor, norm_dim: Sequence[int] | None) -> int:
    """The number of numbers in a group of `x`, (B, ...)."""
    return math.prod([x.shape[i] for i in dims_of(x, norm_dim)])


def dims_of(x: Tensor, norm_dim: Sequence[int] | None) -> tuple[int, ...]:
    """The dimensions of `x`, (B, ...), that a group spans, counted from 0."""
    if norm_dim is None:
        return tuple(range(1, x.ndim))
    dims = tuple(i + x.ndim if i < 0 else i for i in norm_dim)
    if not dims or len({*dims}) < len(dims) or not all(0 < i < x.ndim for i in dims):
        raise ValueError(
            f"norm_dim={tuple(norm_dim)}: for a prediction of shape {tuple(x.shape)} choose from the dimensions 1 to "
            f"{x.ndim - 1} (or {1 - x.ndim} to -1), at least one and each once; 0 is the batch"
        )
    return dims


def finite_coefficients(rule: Rule, g: Gram, b: float) -> Coefficients:
    """The rule's coefficients as tensors like the Gram's entries; NaN for groups that stay unguided."""
    # A plain number is filled in on the device. A copy would wait for the device, and a CUDA graph cannot capture it.
    k = Coefficients(*(torch.zeros_like(g.dd) + k_i for k_i in rule.coefficients(g, b)))
    finite = torch.isfinite(k.X + k.c + k.d + k.m + k.u + g.dd + g.mm)
    return Coefficients(*(torch.where(finite, k_i, torch.nan) for k_i in k))


def guide(
    sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float, rule: Rule
) -> tuple[Tensor, Tensor]:
    """One guided prediction per sample, in the space of `cond`, and the new momentum, b d + rule.momentum m.

    Tensors are (B, ...); `denoised = a * sample + b * prediction`. Arithmetic is float32 (float64 for float64
    input). The prediction has the dtype of `cond`; the momentum is float32. If a coefficient or the
    guidance direction is not finite (zero or non-finite predictions), that group gets `cond` unguided and its
    momentum restarts from zero.
    """
    working = torch.promote_types(cond.dtype, torch.float32)
    c, u = cond.to(working), uncond.to(working)
    d = c - u
    X = a * sample.to(working) + b * c
    m = torch.zeros_like(c) if momentum is None else momentum.to(working)

    g = gram(X, c, u, m, rule.norm_dim, rule.centred)
    k = finite_coefficients(rule, g, b)
    finite = torch.isfinite(torch.as_tensor(k.X))
    prediction = torch.where(finite, k.X * X + k.c * c + k.d * d + k.m * m + k.u * u, c)
    new_momentum = torch.where(finite, b * d + rule.momentum * m, 0.0)
    return prediction.to(cond.dtype), new_momentum


class Update(NamedTuple):
    """A first-order scheduler step: (x, p) mean `x * sample + p * prediction`, in the dtype beside it."""

    next: tuple[float, float]
    dtype: torch.dtype
    denoised: tuple[float, float] | None
    denoised_dtype: torch.dtype | None


def step(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor,
    momentum: Tensor | None,
    a: float,
    b: float,
    rule: Rule,
    update: Update,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`guide` and the scheduler's step in one: next sample, denoised sample if wanted (else None), new momentum."""
    working = torch.promote_types(cond.dtype, torch.float32)
    prediction, new_momentum = guide(sample, cond.to(working), uncond, momentum, a, b, rule)
    x = sample.to(working)
    next_sample = (update.next[0] * x + update.next[1] * prediction).to(update.dtype)
    if update.denoised is None:
        return next_sample, None, new_momentum
    denoised = (update.denoised[0] * x + update.denoised[1] * prediction).to(update.denoised_dtype)
    return next_sample, denoised, new_momentum


def extrapolate(history: Tensor, coefficients: Tensor) -> Tensor:
    """Sum over k of `coefficients[k] * history[k]`; history (K, B, C, ...), coefficients (K,) or (K, C).

    With past predictions as the history, it is LinearAG's estimate of a skipped prediction (arXiv 2312.12487).
    """
    working = torch.promote_types(history.dtype, torch.float32)
    factors = coefficients.to(history.device, working)
    if factors.ndim == 1:
        with torch.autocast(history.device.type, enabled=False):  # autocast would lower a matrix product's precision
            return torch.tensordot(factors, history.to(working), dims=1).to(history.dtype)
    factors = factors.reshape(*factors.shape[:1], 1, *factors.shape[1:], *[1] * (history.ndim - 3))
    return (factors * history.to(working)).sum(0).to(history.dtype)


def similarity(sample: Tensor, cond: Tensor, uncond: Tensor, a: float, b: float) -> Tensor:
    """(B,) cosine between `a * sample + b * cond` and `a * sample + b * uncond`.

    With the coefficients (a, b) of denoised space it compares denoised predictions. With those of noise space it
    compares noise predictions (Adaptive Guidance's gamma_t, arXiv 2312.12487). NaN where one of them is 0.
    """
    working = torch.promote_types(cond.dtype, torch.float32)
    c = cond.to(working)
    d = b * (c - uncond.to(working))
    X = a * sample.to(working) + b * c
    dim = tuple(range(1, X.ndim))
    XX, Xd, dd = (X * X).sum(dim), (X * d).sum(dim), (d * d).sum(dim)
    return (XX - Xd) / (XX * (XX - 2 * Xd + dd)).sqrt()


def observe(
    sample: Tensor | None,
    cond: Tensor,
    uncond: Tensor,
    denoised: tuple[float, float] = (0.0, 0.0),
    noise: tuple[float, float] = (0.0, 0.0),
    output: Tensor | None = None,
    expected: Tensor | None = None,
    s: float = 0.0,
) -> Tensor:
    """(B, parts, 9): the measures of one guided step, as sums over numbers; the reader adds up the parts.

        <e, e>  <o, o>  <c, c>  <u, u>    <X, X>  <N, N>  <d, d>  <X, d>  <N, d>

    with d = c - u, X = a x + b c and N = p x + q c for `denoised` (a, b) and `noise` (p, q); and with e the difference
    between `expected` and o, an `output` made from both predictions. In the first four, numbers that are not finite
    count as 0.

    Args:
        sample: x; if None, the last five are 0.
        output: if None, the first four are 0.
        expected: default `u + s (c - u)`, rounded after every operation as torch does in the dtype of c.
    """
    working = torch.promote_types(cond.dtype, torch.float32)
    c, u, dims = cond.to(working), uncond.to(working), tuple(range(2, cond.ndim + 1))
    sums = []
    if output is None:
        sums.append(c.new_zeros(c.shape[0], 4))
    else:
        made = uncond + s * (cond - uncond) if expected is None else expected
        terms = torch.stack([made.to(working), output.to(working), c, u], 1).nan_to_num_(0, 0, 0)
        terms[:, 0].sub_(terms[:, 1])
        sums.append(terms.square_().sum(dims))
    if sample is None:
        sums.append(c.new_zeros(c.shape[0], 5))
    else:
        X, N = ((c * of_c).add_(sample, alpha=of_x) for of_x, of_c in (denoised, noise))
        vectors = torch.stack([X, N, c - u], 1)
        products = (vectors[:, :2] * vectors[:, 2:]).sum(dims)
        sums += [vectors.square_().sum(dims), products]
    return torch.cat(sums, 1)[:, None]


def mix(tensors: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The sum of factors times tensors of one shape, formed in place in at least float32."""
    working = torch.promote_types(dtype, torch.float32)
    for each in tensors:
        working = torch.promote_types(working, each.dtype)
    total = tensors[0].to(working) * factors[0]
    for each, factor in zip(tensors[1:], factors[1:], strict=True):
        total.add_(each, alpha=factor)
    return total.to(dtype)
