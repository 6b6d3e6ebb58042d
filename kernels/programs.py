"""The Triton kernels: `gram`, `combine`, `guide` (both in one launch), `similarity`, `extrapolate`.

A tensor reaches them as groups of rows x columns numbers. Group g starts at (g // groups_1) * group_stride_0 +
(g % groups_1) * group_stride_1; its number (i, j) lies i * row_stride + j * column_stride further on. All
tensors of a call share these strides. A chunk is TILE columns of one row. Sums run in float32: over the FOLD
neighbours a thread reads at once, the chunks of a program, its threads, then the programs, always in the same
order and without atomics, so that runs repeat bit for bit.

A program's sums are one vector of ENTRIES numbers, in `Gram`'s order. One reduction makes it, one store writes it, and
one reduction adds up the vectors of a group. Only then is it taken apart.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from diffusers_guidance.kernels.reference import Coefficients, Gram

ENTRIES = tl.constexpr(16)  # a partial Gram: 12 products, 4 sums
PARTIALS = tl.constexpr(64)  # partial Grams read at once
STAGES = tl.constexpr(2)  # chunks of a loop that are being loaded at once


@triton.jit
def _float32(scalar):
    return tl.cast(scalar, tl.float32)  # Python's floats arrive as float64 if Inductor launches


@triton.jit
def _offsets(group, chunk, groups_1, columns, group_stride_0, group_stride_1, row_stride, column_stride, TILE):
    """Offsets of a chunk's numbers (int64), and a mask of those that exist."""
    per_row = tl.cdiv(columns, TILE)
    column = (chunk % per_row).to(tl.int64) * TILE + tl.arange(0, TILE)
    offsets = (chunk // per_row).to(tl.int64) * row_stride + column * column_stride
    return offsets + _start(group, groups_1, group_stride_0, group_stride_1), column < columns


@triton.jit
def _start(group, groups_1, group_stride_0, group_stride_1):
    return (group // groups_1).to(tl.int64) * group_stride_0 + (group % groups_1).to(tl.int64) * group_stride_1


@triton.jit
def _read(sample, cond, uncond, momentum, offsets, mask):
    """x, c, u, m; masked numbers are 0."""
    x = tl.load(sample + offsets, mask, other=0.0).to(tl.float32)
    c = tl.load(cond + offsets, mask, other=0.0).to(tl.float32)
    u = tl.load(uncond + offsets, mask, other=0.0).to(tl.float32)
    m = tl.zeros_like(c)
    if momentum is not None:
        m = tl.load(momentum + offsets, mask, other=0.0).to(tl.float32)
    return x, c, u, m


@triton.jit
def _pivots(cond, uncond, start, CENTRED: tl.constexpr):
    """A group's first c and d. With them subtracted, variances do not cancel, however large the mean is."""
    c, d = 0.0, 0.0
    if CENTRED:
        c = tl.load(cond + start).to(tl.float32)
        d = c - tl.load(uncond + start).to(tl.float32)
    return c, d


@triton.jit
def _fold(x, FOLD: tl.constexpr):
    return tl.sum(tl.reshape(x, [x.shape[0] // FOLD, FOLD]), axis=1)


@triton.jit
def _sums(x, c, u, m, mask, a, b, pivot_c, pivot_d, CENTRED: tl.constexpr, FOLD: tl.constexpr):
    """The products and sums of X = a x + b c, c, d = c - u, m and u; FOLD neighbours are summed to one number."""
    X, d = a * x + b * c, c - u
    uu, cu = _fold(u * u, FOLD), _fold(c * u, FOLD)
    if CENTRED:
        c, d = tl.where(mask, c - pivot_c, 0.0), tl.where(mask, d - pivot_d, 0.0)
    return Gram(
        _fold(X * X, FOLD),
        _fold(X * c, FOLD),
        _fold(X * d, FOLD),
        _fold(X * m, FOLD),
        _fold(c * c, FOLD),
        _fold(c * d, FOLD),
        _fold(c * m, FOLD),
        _fold(d * d, FOLD),
        _fold(d * m, FOLD),
        _fold(m * m, FOLD),
        uu,
        cu,
        _fold(X, FOLD),
        _fold(c, FOLD),
        _fold(d, FOLD),
        _fold(m, FOLD),
        0,
    )


@triton.jit
def _zeros(SIZE: tl.constexpr):
    z = tl.zeros([SIZE], tl.float32)
    return Gram(z, z, z, z, z, z, z, z, z, z, z, z, z, z, z, z, 0)


@triton.jit
def _plus(g, h):
    return Gram(
        g.XX + h.XX,
        g.Xc + h.Xc,
        g.Xd + h.Xd,
        g.Xm + h.Xm,
        g.cc + h.cc,
        g.cd + h.cd,
        g.cm + h.cm,
        g.dd + h.dd,
        g.dm + h.dm,
        g.mm + h.mm,
        g.uu + h.uu,
        g.cu + h.cu,
        g.sum_X + h.sum_X,
        g.sum_c + h.sum_c,
        g.sum_d + h.sum_d,
        g.sum_m + h.sum_m,
        0,
    )


@triton.jit
def _total(g):
    """(ENTRIES,): a program's sums, by one reduction."""
    # tl.join adds a last dimension, so the innermost join sets the highest bit of an entry's index. It
    # pairs entries 8 apart, the next ones 4, 2 and 1 apart.
    even = tl.join(
        tl.join(tl.join(g.XX, g.dm), tl.join(g.cc, g.sum_X)),
        tl.join(tl.join(g.Xd, g.uu), tl.join(g.cm, g.sum_d)),
    )
    odd = tl.join(
        tl.join(tl.join(g.Xc, g.mm), tl.join(g.cd, g.sum_c)),
        tl.join(tl.join(g.Xm, g.cu), tl.join(g.dd, g.sum_m)),
    )
    return tl.sum(tl.reshape(tl.join(even, odd), [g.XX.shape[0], ENTRIES]), axis=0)


@triton.jit
def _store_total(partials, part, total):
    tl.store(partials + part * ENTRIES + tl.arange(0, ENTRIES), total)


@triton.jit
def _read_total(partials, parts):
    """(ENTRIES,): a group's sums, from those of its programs."""
    total = tl.zeros([PARTIALS, ENTRIES], tl.float32)
    for first in range(0, parts, PARTIALS):
        part = first + tl.arange(0, PARTIALS)[:, None]
        # Do not read the multiprocessor's own cache: other multiprocessors wrote them.
        total += tl.load(partials + part * ENTRIES + tl.arange(0, ENTRIES), part < parts, 0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def _entry(total, index: tl.constexpr):
    # In one row, a single warp holds it: no barrier is needed.
    picked = tl.where(tl.arange(0, ENTRIES)[None, :] == index, total[None, :], 0.0)
    return tl.sum(tl.sum(picked, axis=1), axis=0)


@triton.jit
def _gram(total, numel):
    return Gram(
        _entry(total, 0),
        _entry(total, 1),
        _entry(total, 2),
        _entry(total, 3),
        _entry(total, 4),
        _entry(total, 5),
        _entry(total, 6),
        _entry(total, 7),
        _entry(total, 8),
        _entry(total, 9),
        _entry(total, 10),
        _entry(total, 11),
        _entry(total, 12),
        _entry(total, 13),
        _entry(total, 14),
        _entry(total, 15),
        numel,
    )


@triton.jit
def _meet(counter, part, parts):
    """A barrier among a group's programs, which all run at once: it returns when all of them have arrived.

    Together they add 2^31 to the counter. So its sign changes when the last one arrives, and the other bits are 0 again
    for the next launch.
    """
    tl.debug_barrier()  # every thread of this program has written
    share = tl.where(part == 0, 0x7FFFFFFF - (parts - 2), 1)
    before = tl.atomic_add(counter, share, sem="acq_rel")
    now = before
    while (now ^ before) >= 0:
        now = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _write(
    out, denoised, new_momentum, offsets, mask, x, c, u, m,
    k, finite, a, b, beta, out_x, out_p, denoised_x, denoised_p, STEP: tl.constexpr,
):  # fmt: skip
    """p = kX X + kc c + kd d + km m + ku u, or c if that is not finite.

    out = p, or out_x x + out_p p in a fused step.
    """
    X, d = a * x + b * c, c - u
    p = tl.where(finite, k.X * X + k.c * c + k.d * d + k.m * m + k.u * u, c)
    if STEP:
        tl.store(out + offsets, (out_x * x + out_p * p).to(out.dtype.element_ty), mask)
        if denoised is not None:
            tl.store(denoised + offsets, (denoised_x * x + denoised_p * p).to(denoised.dtype.element_ty), mask)
    else:
        tl.store(out + offsets, p.to(out.dtype.element_ty), mask)
    tl.store(new_momentum + offsets, tl.where(finite, b * d + beta * m, 0.0), mask)


@triton.jit
def gram_kernel(
    sample, cond, uncond, momentum, partials, a, b,
    groups_1, rows, columns, group_stride_0, group_stride_1, row_stride, column_stride,
    CENTRED: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """partials[group, part] = the products and sums of (X, c, d, m) over every parts-th chunk of the group.

    CENTRED: the group's first c and d are subtracted from c and d.
    """
    a, b = _float32(a), _float32(b)
    group, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    pivot_c, pivot_d = _pivots(cond, uncond, _start(group, groups_1, group_stride_0, group_stride_1), CENTRED)
    g = _zeros(TILE // FOLD)
    for chunk in tl.range(part, rows * tl.cdiv(columns, TILE), parts, num_stages=STAGES):
        offsets, mask = _offsets(
            group, chunk, groups_1, columns, group_stride_0, group_stride_1, row_stride, column_stride, TILE
        )
        x, c, u, m = _read(sample, cond, uncond, momentum, offsets, mask)
        g = _plus(g, _sums(x, c, u, m, mask, a, b, pivot_c, pivot_d, CENTRED, FOLD))
    _store_total(partials + group.to(tl.int64) * parts * ENTRIES, part, _total(g))


@triton.jit
def combine_kernel(
    sample, cond, uncond, momentum, gram, out, denoised, new_momentum, parts, numel,
    a, b, beta, p0, p1, p2, p3, out_x, out_p, denoised_x, denoised_p,
    groups_1, rows, columns, group_stride_0, group_stride_1, row_stride, column_stride,
    RULE: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = kX X + kc c + kd d + km m + ku u and b d + beta m, with k = RULE(sum of the group's partial Grams).

    Without a RULE, `gram` holds each group's five coefficients, NaN for groups that stay unguided.
    """
    a, b, beta = _float32(a), _float32(b), _float32(beta)
    p0, p1, p2, p3 = _float32(p0), _float32(p1), _float32(p2), _float32(p3)
    out_x, out_p = _float32(out_x), _float32(out_p)
    denoised_x, denoised_p = _float32(denoised_x), _float32(denoised_p)
    group, part, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if RULE is None:
        given = gram + group.to(tl.int64) * 5
        k = Coefficients(tl.load(given), tl.load(given + 1), tl.load(given + 2), tl.load(given + 3), tl.load(given + 4))
        finite = tl.abs(k.X + k.c + k.d + k.m + k.u) < float("inf")
    else:
        g = _gram(_read_total(gram + group.to(tl.int64) * parts * ENTRIES, parts), numel)
        k = RULE(g, b, p0, p1, p2, p3)
        finite = tl.abs(k.X + k.c + k.d + k.m + k.u + g.dd + g.mm) < float("inf")
    chunks = rows * tl.cdiv(columns, TILE)
    for chunk in tl.range(part, chunks, programs, num_stages=STAGES):
        # Backwards, since the cache still holds what `gram` read last.
        offsets, mask = _offsets(
            group, chunks - 1 - chunk, groups_1, columns,
            group_stride_0, group_stride_1, row_stride, column_stride, TILE,
        )  # fmt: skip
        x, c, u, m = _read(sample, cond, uncond, momentum, offsets, mask)
        _write(
            out, denoised, new_momentum, offsets, mask, x, c, u, m,
            k, finite, a, b, beta, out_x, out_p, denoised_x, denoised_p, STEP,
        )  # fmt: skip


@triton.jit
def guide_kernel(
    sample, cond, uncond, momentum, partials, counters, out, denoised, new_momentum, numel,
    a, b, beta, p0, p1, p2, p3, out_x, out_p, denoised_x, denoised_p,
    groups_1, rows, columns, group_stride_0, group_stride_1, row_stride, column_stride,
    RULE: tl.constexpr, STEP: tl.constexpr, CENTRED: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """`gram_kernel` and `combine_kernel` in one launch: a program reads its only chunk once and holds it in registers.

    Meanwhile the programs of a group add up its Gram. Without `partials` a group has one program.
    """
    a, b, beta = _float32(a), _float32(b), _float32(beta)
    p0, p1, p2, p3 = _float32(p0), _float32(p1), _float32(p2), _float32(p3)
    out_x, out_p = _float32(out_x), _float32(out_p)
    denoised_x, denoised_p = _float32(denoised_x), _float32(denoised_p)
    group, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offsets, mask = _offsets(
        group, part, groups_1, columns, group_stride_0, group_stride_1, row_stride, column_stride, TILE
    )
    x, c, u, m = _read(sample, cond, uncond, momentum, offsets, mask)
    pivot_c, pivot_d = _pivots(cond, uncond, _start(group, groups_1, group_stride_0, group_stride_1), CENTRED)
    total = _total(_sums(x, c, u, m, mask, a, b, pivot_c, pivot_d, CENTRED, FOLD))
    if partials is not None:
        group_partials = partials + group.to(tl.int64) * parts * ENTRIES
        _store_total(group_partials, part, total)
        _meet(counters + group, part, parts)
        total = _read_total(group_partials, parts)
    g = _gram(total, numel)
    k = RULE(g, b, p0, p1, p2, p3)
    finite = tl.abs(k.X + k.c + k.d + k.m + k.u + g.dd + g.mm) < float("inf")
    _write(
        out, denoised, new_momentum, offsets, mask, x, c, u, m,
        k, finite, a, b, beta, out_x, out_p, denoised_x, denoised_p, STEP,
    )  # fmt: skip


@triton.jit
def similarity_kernel(partials, out, b, parts):
    """out[group] = <X, X - b d> / sqrt(<X, X> <X - b d, X - b d>), from the group's partial Grams."""
    b = _float32(b)
    group = tl.program_id(0)
    g = _gram(_read_total(partials + group.to(tl.int64) * parts * ENTRIES, parts), 0.0)
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
    for _ in tl.range(0, count, loop_unroll_factor=2):
        total += tl.load(factor) * tl.load(history + offsets, mask, other=0.0).to(tl.float32)
        factor += channels
        history += step_stride
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask)
