"""The kernels that pass over a step's tensors once: `observe`, which verifies and measures it, and `mix`, a plain sum.

Programs and launchers are in one file, since each is one loop. The head of programs.py says how a tensor reaches them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_guidance.kernels import launch
from diffusers_guidance.kernels.programs import _float32, _fold, _offsets

SUMS = 9
TERMS = 8
"""The number of tensors that one launch of `mix` adds up."""


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)  # false for NaN too


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def observe_kernel(
    sample, cond, uncond, output, expected, sums, a, b, p, q, s,
    groups_1, rows, columns, group_stride_0, group_stride_1, row_stride, column_stride,
    TILE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """sums[group, part] = `reference.observe` over every parts-th chunk of the group.

    It is launched without fused multiply-adds, so that `u + s (c - u)` rounds like a pipeline's own three operations.
    """
    a, b, p, q, s = _float32(a), _float32(b), _float32(p), _float32(q), _float32(s)
    group, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    z = tl.zeros([TILE // FOLD], tl.float32)
    ee, oo, cc, uu, XX, NN, dd, Xd, Nd = z, z, z, z, z, z, z, z, z
    for chunk in range(part, rows * tl.cdiv(columns, TILE), parts):
        offsets, mask = _offsets(
            group, chunk, groups_1, columns, group_stride_0, group_stride_1, row_stride, column_stride, TILE
        )
        c = tl.load(cond + offsets, mask, other=0.0).to(tl.float32)
        u = tl.load(uncond + offsets, mask, other=0.0).to(tl.float32)
        d = c - u
        if output is not None:
            o = _finite(tl.load(output + offsets, mask, other=0.0).to(tl.float32))
            if expected is not None:
                e = tl.load(expected + offsets, mask, other=0.0).to(tl.float32)
            else:
                dtype = cond.dtype.element_ty
                e = _rounded(u + _rounded(s * _rounded(d, dtype), dtype), dtype)
            e = _finite(e) - o
            ee += _fold(e * e, FOLD)
            oo += _fold(o * o, FOLD)
            cc += _fold(_finite(c) * _finite(c), FOLD)
            uu += _fold(_finite(u) * _finite(u), FOLD)
        if sample is not None:
            x = tl.load(sample + offsets, mask, other=0.0).to(tl.float32)
            X, N = a * x + b * c, p * x + q * c
            XX += _fold(X * X, FOLD)
            NN += _fold(N * N, FOLD)
            dd += _fold(d * d, FOLD)
            Xd += _fold(X * d, FOLD)
            Nd += _fold(N * d, FOLD)
    to = sums + (group.to(tl.int64) * parts + part) * 9
    tl.store(to, tl.sum(ee))
    tl.store(to + 1, tl.sum(oo))
    tl.store(to + 2, tl.sum(cc))
    tl.store(to + 3, tl.sum(uu))
    tl.store(to + 4, tl.sum(XX))
    tl.store(to + 5, tl.sum(NN))
    tl.store(to + 6, tl.sum(dd))
    tl.store(to + 7, tl.sum(Xd))
    tl.store(to + 8, tl.sum(Nd))


@triton.jit
def mix_kernel(
    t0, t1, t2, t3, t4, t5, t6, t7, out, f0, f1, f2, f3, f4, f5, f6, f7, size, TILE: tl.constexpr
):  # fmt: skip
    """out = f0 t0 + f1 t1 + ..., over the tensors that are given."""
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offsets < size
    total = _float32(f0) * tl.load(t0 + offsets, mask, other=0.0).to(tl.float32)
    if t1 is not None:
        total += _float32(f1) * tl.load(t1 + offsets, mask, other=0.0).to(tl.float32)
    if t2 is not None:
        total += _float32(f2) * tl.load(t2 + offsets, mask, other=0.0).to(tl.float32)
    if t3 is not None:
        total += _float32(f3) * tl.load(t3 + offsets, mask, other=0.0).to(tl.float32)
    if t4 is not None:
        total += _float32(f4) * tl.load(t4 + offsets, mask, other=0.0).to(tl.float32)
    if t5 is not None:
        total += _float32(f5) * tl.load(t5 + offsets, mask, other=0.0).to(tl.float32)
    if t6 is not None:
        total += _float32(f6) * tl.load(t6 + offsets, mask, other=0.0).to(tl.float32)
    if t7 is not None:
        total += _float32(f7) * tl.load(t7 + offsets, mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask)


def observe(
    sample: Tensor | None, cond: Tensor, uncond: Tensor, factors: Sequence[float],
    output: Tensor | None, expected: Tensor | None, s: float,
) -> Tensor:  # fmt: skip
    """`reference.observe`; `factors` are for the denoised predictions, then for the noise."""
    layout = launch.layout_of(cond)
    tensors = [None if t is None else launch._in(layout, cond, t) for t in (sample, cond, uncond, output, expected)]
    groups, parts = prod(layout.groups), launch._parts(layout, cond.device)
    sums = torch.empty(groups, parts, SUMS, dtype=torch.float32, device=cond.device)
    if sums.numel() == 0:
        return sums
    with launch._on(cond.device):
        observe_kernel[(groups, parts)](
            *tensors, sums, *factors, s,
            layout.groups[1], layout.rows, layout.columns, *layout.walk,
            TILE=launch.TILE, FOLD=launch.fold(cond), num_warps=launch.THREADS // launch._warp(cond.device),
            enable_fp_fusion=False,
        )  # fmt: skip
    return sums


def mix(tensors: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype) -> Tensor:
    """`reference.mix`, in one launch for up to `TERMS` tensors."""
    first = tensors[0]
    layout = launch.layout_of(first)
    given = [*zip((launch._in(layout, first, t) for t in tensors), factors, strict=True)]
    numel = first.numel()
    out = launch._new(layout, first, dtype)
    while numel and given:
        now, given = given[:TERMS], given[TERMS:]
        to = launch._new(layout, first, torch.float32) if given else out
        missing = TERMS - len(now)
        with launch._on(first.device):
            mix_kernel[(triton.cdiv(numel, launch.TILE),)](
                *(t for t, _ in now), *[None] * missing, to, *(f for _, f in now), *[0.0] * missing, numel,
                TILE=launch.TILE, num_warps=launch.THREADS // launch._warp(first.device),
            )  # fmt: skip
        given = [(to, 1.0), *given] if given else []
    return out


def _observe_fake(sample, cond, uncond, factors, output, expected, s):
    layout = launch.layout_of(cond)
    groups, parts = prod(layout.groups), launch._parts(layout, cond.device)
    return cond.new_empty(groups, parts, SUMS, dtype=torch.float32)


def _mix_fake(tensors, factors, dtype):
    return launch._new(launch.layout_of(tensors[0]), tensors[0], dtype)


_OBSERVED = "Tensor? sample, Tensor cond, Tensor uncond, float[] factors, Tensor? output, Tensor? expected, float s"

for _schema, _launcher, _fake in (
    (f"observe({_OBSERVED}) -> Tensor", observe, _observe_fake),
    ("mix(Tensor[] tensors, float[] factors, ScalarType dtype) -> Tensor", mix, _mix_fake),
):
    _name, _arguments = _schema.split("(", 1)
    torch.library.define(f"diffusers_guidance::{_name}", f"({_arguments}")
    torch.library.impl(f"diffusers_guidance::{_name}", "CompositeExplicitAutograd", _launcher)
    torch.library.register_fake(f"diffusers_guidance::{_name}", _fake)
