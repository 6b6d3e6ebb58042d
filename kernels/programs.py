"""The Triton kernels: `gram`, `combine`, `guide` (both in one launch), `similarity`, `extrapolate`.

A tensor reaches them as groups of rows x columns numbers. Group g starts at (g // groups_1) * group_stride_0 +
(g % groups_1) * group_stride_1; its number (i, j) lies i * row_stride + j * column_stride further on. All
tensors of a call share these strides. A chunk is TILE columns of one row. Sums run in float32: over the FOLD
neighbours a thread reads at once, the chunks of a program, its threads, then the programs, always in the same
order and without atomics, so that runs repeat bit for bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from diffusers_guidance.kernels.reference import Coefficients, Gram

ENTRIES = tl.constexpr(16)  # a partial Gram: 10 products, 4 sums, 2 of padding
PARTIALS = tl.constexpr(256)  # partial Grams read at once


@triton.jit
def _float32(scalar):
    return tl.cast(scalar, tl.float32)  # Python's floats arrive as float64 where Inductor launches


@triton.jit
def _offsets(group, chunk, groups_1, columns, group_stride_0, group_stride_1, row_stride, column_stride, TILE):
    """Offsets of a chunk's numbers (int64), and which of them exist."""
    per_row = tl.cdiv(columns, TILE)
    column = (chunk % per_row).to(tl.int64) * TILE + tl.arange(0, TILE)
    offsets = (chunk // per_row).to(tl.int64) * row_stride + column * column_stride
    offsets += (group // groups_1).to(tl.int64) * group_stride_0
    offsets += (group % groups_1).to(tl.int64) * group_stride_1
    return offsets, column < columns


@triton.jit
def _vectors(sample, cond, uncond, momentum, offsets, mask, a, b):
    """The sample x, and X = a x + b c, c, d = c - u, m; masked numbers are 0."""
    x = tl.load(sample + offsets, mask, other=0.0).to(tl.float32)
    c = tl.load(cond + offsets, mask, other=0.0).to(tl.float32)
    d = c - tl.load(uncond + offsets, mask, other=0.0).to(tl.float32)
    m = tl.zeros_like(c)
    if momentum is not None:
        m = tl.load(momentum + offsets, mask, other=0.0).to(tl.float32)
    return x, a * x + b * c, c, d, m


@triton.jit
def _zeros(SIZE: tl.constexpr):
    z = tl.zeros([SIZE], tl.float32)
    return Gram(z, z, z, z, z, z, z, z, z, z, z, z, z, z, 0)


@triton.jit
def _fold(x, FOLD: tl.constexpr):
    return tl.sum(tl.reshape(x, [x.shape[0] // FOLD, FOLD]), axis=1)


@triton.jit
def _accumulate(g, X, c, d, m, FOLD: tl.constexpr):
    """g + the products and sums of (X, c, d, m), FOLD neighbours to a number."""
    return Gram(
        g.XX + _fold(X * X, FOLD),
        g.Xc + _fold(X * c, FOLD),
        g.Xd + _fold(X * d, FOLD),
        g.Xm + _fold(X * m, FOLD),
        g.cc + _fold(c * c, FOLD),
        g.cd + _fold(c * d, FOLD),
        g.cm + _fold(c * m, FOLD),
        g.dd + _fold(d * d, FOLD),
        g.dm + _fold(d * m, FOLD),
        g.mm + _fold(m * m, FOLD),
        g.sum_X + _fold(X, FOLD),
        g.sum_c + _fold(c, FOLD),
        g.sum_d + _fold(d, FOLD),
        g.sum_m + _fold(m, FOLD),
        g.numel,
    )


@triton.jit
def _total(g, numel):
    return Gram(
        tl.sum(g.XX),
        tl.sum(g.Xc),
        tl.sum(g.Xd),
        tl.sum(g.Xm),
        tl.sum(g.cc),
        tl.sum(g.cd),
        tl.sum(g.cm),
        tl.sum(g.dd),
        tl.sum(g.dm),
        tl.sum(g.mm),
        tl.sum(g.sum_X),
        tl.sum(g.sum_c),
        tl.sum(g.sum_d),
        tl.sum(g.sum_m),
        numel,
    )


@triton.jit
def _stacked_total(g):
    """(ENTRIES,): the 14 totals in `Gram`'s order by one reduction, where `_total` makes one of each."""
    # tl.join adds a last dimension, so the innermost join sets the highest bit of an entry's index. It
    # pairs entries 8 apart, the next ones 4, 2 and 1 apart.
    z = tl.zeros_like(g.XX)
    even = tl.join(
        tl.join(tl.join(g.XX, g.dm), tl.join(g.cc, g.sum_d)),
        tl.join(tl.join(g.Xd, g.sum_X), tl.join(g.cm, z)),
    )
    odd = tl.join(
        tl.join(tl.join(g.Xc, g.mm), tl.join(g.cd, g.sum_m)),
        tl.join(tl.join(g.Xm, g.sum_c), tl.join(g.dd, z)),
    )
    return tl.sum(tl.reshape(tl.join(even, odd), [g.XX.shape[0], ENTRIES]), axis=0)


@triton.jit
def _entry(partials, parts, index: tl.constexpr):
    """Entry `index` of a group, summed over its partial Grams."""
    total = tl.zeros([PARTIALS], tl.float32)
    for start in range(0, parts, PARTIALS):
        part = start + tl.arange(0, PARTIALS)
        total += tl.load(partials + part * ENTRIES + index, part < parts, other=0.0)
    return tl.sum(total)


@triton.jit
def _read_gram(partials, group, parts, numel):
    p = partials + group.to(tl.int64) * parts * ENTRIES
    return Gram(
        _entry(p, parts, 0),
        _entry(p, parts, 1),
        _entry(p, parts, 2),
        _entry(p, parts, 3),
        _entry(p, parts, 4),
        _entry(p, parts, 5),
        _entry(p, parts, 6),
        _entry(p, parts, 7),
        _entry(p, parts, 8),
        _entry(p, parts, 9),
        _entry(p, parts, 10),
        _entry(p, parts, 11),
        _entry(p, parts, 12),
        _entry(p, parts, 13),
        numel,
    )


@triton.jit
def _combine(
    sample, cond, uncond, momentum, out, denoised, new_momentum, offsets, mask,
    k, finite, a, b, beta, out_x, out_p, denoised_x, denoised_p, STEP: tl.constexpr,
):  # fmt: skip
    """p = kX X + kc c + kd d + km m, or c where that is not finite; out = p, or out_x x + out_p p in a fused step."""
    x, X, c, d, m = _vectors(sample, cond, uncond, momentum, offsets, mask, a, b)
    p = tl.where(finite, k.X * X + k.c * c + k.d * d + k.m * m, c)
    if STEP:
        tl.store(out + offsets, (out_x * x + out_p * p).to(out.dtype.element_ty), mask)
        if denoised is not None:
            tl.store(denoised + offsets, (denoised_x * x + denoised_p * p).to(denoised.dtype.element_ty), mask)
    else:
        tl.store(out + offsets, p.to(out.dtype.element_ty), mask)
    tl.store(new_momentum + offsets, tl.where(finite, b * d + beta * m, 0.0), mask)


@triton.jit
def _is_finite(k, g):
    return tl.abs(k.X + k.c + k.d + k.m + g.dd + g.mm) < float("inf")


@triton.jit
def gram_kernel(
    sample, cond, uncond, momentum, partials, a, b,
    groups_1, rows, columns, group_stride_0, group_stride_1, row_stride, column_stride,
    TILE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """partials[group, part] = the products and sums of (X, c, d, m) over every parts-th chunk of the group."""
    a, b = _float32(a), _float32(b)
    group, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    g = _zeros(TILE // FOLD)
    for chunk in range(part, rows * tl.cdiv(columns, TILE), parts):
        offsets, mask = _offsets(
            group, chunk, groups_1, columns, group_stride_0, group_stride_1, row_stride, column_stride, TILE
        )
        _, X, c, d, m = _vectors(sample, cond, uncond, momentum, offsets, mask, a, b)
        g = _accumulate(g, X, c, d, m, FOLD)
    to = partials + (group.to(tl.int64) * parts + part) * ENTRIES
    tl.store(to + tl.arange(0, ENTRIES), _stacked_total(g))


@triton.jit
def combine_kernel(
    sample, cond, uncond, momentum, gram, out, denoised, new_momentum, parts, numel,
    a, b, beta, p0, p1, p2, p3, out_x, out_p, denoised_x, denoised_p,
    groups_1, rows, columns, group_stride_0, group_stride_1, row_stride, column_stride,
    RULE: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = kX X + kc c + kd d + km m and b d + beta m, with k = RULE(sum of the group's partial Grams).

    Without a RULE, `gram` holds each group's four coefficients, NaN for groups that stay unguided.
    """
    a, b, beta = _float32(a), _float32(b), _float32(beta)
    p0, p1, p2, p3 = _float32(p0), _float32(p1), _float32(p2), _float32(p3)
    out_x, out_p = _float32(out_x), _float32(out_p)
    denoised_x, denoised_p = _float32(denoised_x), _float32(denoised_p)
    group, part, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if RULE is None:
        given = gram + group.to(tl.int64) * 4
        k = Coefficients(tl.load(given), tl.load(given + 1), tl.load(given + 2), tl.load(given + 3))
        finite = tl.abs(k.X + k.c + k.d + k.m) < float("inf")
    else:
        g = _read_gram(gram, group, parts, numel)
        k = RULE(g, b, p0, p1, p2, p3)
        finite = _is_finite(k, g)
    chunks = rows * tl.cdiv(columns, TILE)
    for chunk in range(part, chunks, programs):
        # Backwards: the cache still holds what `gram` read last.
        offsets, mask = _offsets(
            group, chunks - 1 - chunk, groups_1, columns,
            group_stride_0, group_stride_1, row_stride, column_stride, TILE,
        )  # fmt: skip
        _combine(
            sample, cond, uncond, momentum, out, denoised, new_momentum, offsets, mask,
            k, finite, a, b, beta, out_x, out_p, denoised_x, denoised_p, STEP,
        )  # fmt: skip


@triton.jit
def guide_kernel(
    sample, cond, uncond, momentum, out, denoised, new_momentum, numel,
    a, b, beta, p0, p1, p2, p3, out_x, out_p, denoised_x, denoised_p,
    groups_1, rows, columns, group_stride_0, group_stride_1, row_stride, column_stride,
    RULE: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """`gram_kernel` and `combine_kernel` in one program per group, the second pass from the cache."""
    a, b, beta = _float32(a), _float32(b), _float32(beta)
    p0, p1, p2, p3 = _float32(p0), _float32(p1), _float32(p2), _float32(p3)
    out_x, out_p = _float32(out_x), _float32(out_p)
    denoised_x, denoised_p = _float32(denoised_x), _float32(denoised_p)
    group = tl.program_id(0)
    chunks = rows * tl.cdiv(columns, TILE)
    g = _zeros(TILE // FOLD)
    for chunk in range(0, chunks):
        offsets, mask = _offsets(
            group, chunk, groups_1, columns, group_stride_0, group_stride_1, row_stride, column_stride, TILE
        )
        _, X, c, d, m = _vectors(sample, cond, uncond, momentum, offsets, mask, a, b)
        g = _accumulate(g, X, c, d, m, FOLD)
    g = _total(g, numel)
    k = RULE(g, b, p0, p1, p2, p3)
    finite = _is_finite(k, g)
    for chunk in range(0, chunks):
        offsets, mask = _offsets(
            group, chunks - 1 - chunk, groups_1, columns,
            group_stride_0, group_stride_1, row_stride, column_stride, TILE,
        )  # fmt: skip
        _combine(
            sample, cond, uncond, momentum, out, denoised, new_momentum, offsets, mask,
            k, finite, a, b, beta, out_x, out_p, denoised_x, denoised_p, STEP,
        )  # fmt: skip


@triton.jit
def similarity_kernel(partials, out, b, parts):
    """out[group] = <X, X - b d> / sqrt(<X, X> <X - b d, X - b d>), from the group's partial Grams."""
    b = _float32(b)
    group = tl.program_id(0)
    g = _read_gram(partials, group, parts, 0.0)
    Xd, dd = b * g.Xd, b * b * g.dd
    tl.store(out + group, (g.XX - Xd) / tl.sqrt(g.XX * (g.XX - 2 * Xd + dd)))


@triton.jit
def extrapolate_kernel(history, coefficients, out, count, step_stride, channels, columns, TILE: tl.constexpr):
    """out[row, j] = sum_k coefficients[k, row % channels] * history[k, row, j]."""
    row = tl.program_id(1)
    column = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = column < columns
    offsets = row.to(tl.int64) * columns + column
    factor = coefficients + row % channels
    total = tl.zeros([TILE], tl.float32)
    for _ in tl.range(0, count, loop_unroll_factor=4):
        total += tl.load(factor) * tl.load(history + offsets, mask, other=0.0).to(tl.float32)
        factor += channels
        history += step_stride
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask)
