"""The launchers of the Triton kernels, as torch ops: `torch.ops.diffusers_guidance.guide`, `step`, ...

Each op has a fake implementation, so `torch.compile` passes through it without a break. The ops have no
gradient; the dispatcher sends tensors that need one to the reference.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import prod
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from diffusers_guidance.kernels import programs
from diffusers_guidance.kernels.algebra import ALGEBRAS
from diffusers_guidance.kernels.reference import dims_of

if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
    raise ImportError("named tuples in kernels need triton 3.3 or newer")

TILE, THREADS = 2048, 256
"""Numbers a program reads at once, and its threads: each takes 8 numbers, 16 bytes of half precision."""
GUIDE_TILE, GUIDE_THREADS = 4096, 512
"""The same for the kernel that handles a group alone."""
GUIDE_NUMEL = 32768
"""In the single launch, the most numbers of a group for each of its multiprocessors."""
SHORT = 256
"""A copy gathers rows of fewer numbers: a chunk for each row would leave most of its threads idle."""
CLUSTER = 8
"""In the single launch, the most multiprocessors that share a group, on hardware with clusters."""

ENTRIES = int(programs.ENTRIES.value)


class Layout(NamedTuple):
    """How a call's tensors lie in memory, and how the kernels walk them; see programs.py."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    group_dims: tuple[int, ...]
    groups: tuple[int, int]
    rows: int
    columns: int
    walk: tuple[int, int, int, int]
    """Strides from group to group (outer, inner), row to row, column to column."""

    @property
    def numel(self) -> int:
        return self.rows * self.columns


def layout_of(cond: Tensor, norm_dim: Sequence[int] | None = None) -> Layout:
    """The dense layout that follows `cond`'s own order of dimensions, where the kernels can walk it."""
    shape = tuple(cond.shape)
    normed = set(dims_of(cond, norm_dim))
    group_dims = tuple(i for i in range(cond.ndim) if i not in normed)
    present = cond.stride()
    order = sorted(range(cond.ndim), key=lambda i: -present[i])
    runs = _runs(order, shape, normed)
    in_order = [i for i in order if i in group_dims and shape[i] > 1]
    scattered = len(runs[True]) > 1 and prod(shape[i] for i in runs[True][-1]) < SHORT
    if in_order != sorted(in_order) or scattered or any(len(run) > 2 for run in runs.values()):
        order = [*group_dims, *sorted(normed)]
        runs = _runs(order, shape, normed)
    strides = [0] * cond.ndim
    step = 1
    for i in reversed(order):
        strides[i] = step
        step *= max(shape[i], 1)
    (outer, outer_stride), (inner, inner_stride) = _two(runs[False], strides, shape)
    (rows, row_stride), (columns, column_stride) = _two(runs[True], strides, shape)
    walk = (outer_stride, inner_stride, row_stride, column_stride)
    return Layout(shape, tuple(strides), group_dims, (outer, inner), rows, columns, walk)


def _runs(order: Sequence[int], shape: Sequence[int], normed: set[int]) -> dict[bool, list[list[int]]]:
    """Neighbouring dimensions of one kind, summed over (True) or not, merged; skips those of size 1."""
    runs: dict[bool, list[list[int]]] = {True: [], False: []}
    last = None
    for i in order:
        if shape[i] == 1:
            continue
        kind = i in normed
        if kind == last:
            runs[kind][-1].append(i)
        else:
            runs[kind].append([i])
        last = kind
    return runs


def _two(runs: list[list[int]], strides: Sequence[int], shape: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of up to two runs, padded in front to two."""
    pairs = [(prod(shape[i] for i in run), strides[run[-1]]) for run in runs]
    return [(1, 0)] * (2 - len(pairs)) + pairs


def _in(layout: Layout, x: Tensor) -> Tensor:
    """`x` itself if it has this layout, else a copy that has."""
    if tuple(x.shape) != layout.shape:
        raise ValueError(f"the tensors must have one shape; these have {tuple(x.shape)} and {layout.shape}")
    if all(n == 1 or s == t for n, s, t in zip(layout.shape, x.stride(), layout.strides, strict=True)):
        return x
    return x.new_empty_strided(layout.shape, layout.strides).copy_(x)


def _new(layout: Layout, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(layout.shape, layout.strides, dtype=dtype, device=like.device)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 4  # Triton's interpreter


@cache
def _warp(device: torch.device) -> int:
    """Threads in a warp: 64 on AMD's data-centre GPUs."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


@cache
def _cluster(device: torch.device) -> int:
    """How many multiprocessors can work as one program."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 1
    versions = tuple(int(n) for n in triton.__version__.split(".")[:2])
    return CLUSTER if torch.cuda.get_device_capability(device)[0] in (9, 10) and versions >= (3, 9) else 1


def ctas_of(numel: int, device: torch.device) -> int:
    """How many multiprocessors share a group of `numel` numbers."""
    return min(triton.next_power_of_2(triton.cdiv(numel, GUIDE_TILE)), _cluster(device))


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: makes that `device`."""
    return getattr(torch, device.type).device(device) if device.type in ("cuda", "xpu") else nullcontext()


def _parts(layout: Layout, device: torch.device) -> int:
    """Programs per group: over all groups two a multiprocessor, so that all run at once."""
    chunks = layout.rows * triton.cdiv(layout.columns, TILE)
    return max(1, min(chunks, 2 * _multiprocessors(device) // max(1, prod(layout.groups))))


def fold(x: Tensor) -> int:
    """Neighbours a thread reads at once."""
    return 16 // x.element_size()


def _gram(
    sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float, layout: Layout
) -> Tensor:
    """(groups, parts, ENTRIES) partial Grams."""
    groups, parts = prod(layout.groups), _parts(layout, cond.device)
    partials = torch.empty(groups, parts, ENTRIES, dtype=torch.float32, device=cond.device)
    programs.gram_kernel[(groups, parts)](
        sample, cond, uncond, momentum, partials, a, b,
        layout.groups[1], layout.rows, layout.columns, *layout.walk,
        TILE=TILE, FOLD=fold(cond), num_warps=THREADS // _warp(cond.device),
    )  # fmt: skip
    return partials


def _guide(
    sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None,
    a: float, b: float, beta: float, rule: str, parameters: Sequence[float], coefficients: Tensor | None,
    layout: Layout, out: Tensor, denoised: Tensor | None = None, update: Sequence[float] | None = None,
) -> Tensor:  # fmt: skip
    """Fills `out` (the prediction, or with an `update` the next sample) and `denoised`; returns the new momentum."""
    new_momentum = _new(layout, cond, torch.float32)
    if cond.numel() == 0:
        return new_momentum
    sample, cond, uncond = (_in(layout, x) for x in (sample, cond, uncond))
    momentum = None if momentum is None else _in(layout, momentum)
    groups, numel = prod(layout.groups), layout.numel
    outputs = (out, denoised, new_momentum)
    scalars = (
        a, b, beta, *(*parameters, 0.0, 0.0, 0.0, 0.0)[:4], *(update or (0.0, 1.0, 0.0, 1.0)),
        layout.groups[1], layout.rows, layout.columns, *layout.walk,
    )  # fmt: skip
    options = {"RULE": ALGEBRAS[rule].compiled if coefficients is None else None, "STEP": update is not None}
    ctas = ctas_of(numel, cond.device)
    with _on(cond.device):
        if coefficients is None and numel <= GUIDE_NUMEL * ctas:
            programs.guide_kernel[(groups,)](
                sample, cond, uncond, momentum, *outputs, float(numel), *scalars, **options,
                TILE=GUIDE_TILE * ctas, FOLD=fold(cond), num_warps=GUIDE_THREADS // _warp(cond.device),
                **({"num_ctas": ctas} if ctas > 1 else {}),
            )  # fmt: skip
        else:
            gram = _gram(sample, cond, uncond, momentum, a, b, layout) if coefficients is None else coefficients
            parts = _parts(layout, cond.device)
            programs.combine_kernel[(groups, parts)](
                sample, cond, uncond, momentum, gram, *outputs, parts, float(numel), *scalars, **options,
                TILE=TILE, num_warps=THREADS // _warp(cond.device),
            )  # fmt: skip
    return new_momentum


def guide(
    sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float,
    beta: float, rule: str, parameters: Sequence[float], coefficients: Tensor | None,
    norm_dim: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.guide` with the coefficients of `ALGEBRAS[rule]`, or with those given as (groups, 4)."""
    layout = layout_of(cond, norm_dim)
    out = _new(layout, cond, cond.dtype)
    new_momentum = _guide(sample, cond, uncond, momentum, a, b, beta, rule, parameters, coefficients, layout, out)
    return out, new_momentum


def step(
    sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float,
    beta: float, rule: str, parameters: Sequence[float], coefficients: Tensor | None,
    norm_dim: Sequence[int] | None, update: Sequence[float], dtype: torch.dtype, denoised_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.step`: (next sample, denoised sample or an empty tensor if not wanted, new momentum)."""
    layout = layout_of(cond, norm_dim)
    out = _new(layout, cond, dtype)
    denoised = None if denoised_dtype is None else _new(layout, cond, denoised_dtype)
    new_momentum = _guide(
        sample, cond, uncond, momentum, a, b, beta, rule, parameters, coefficients,
        layout, out, denoised, update,
    )  # fmt: skip
    return out, cond.new_empty(0) if denoised is None else denoised, new_momentum


def gram(
    sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float,
    norm_dim: Sequence[int] | None,
) -> Tensor:  # fmt: skip
    """(14, ...) the entries of `reference.gram`, in its order and shape."""
    layout = layout_of(cond, norm_dim)
    sample, cond, uncond = (_in(layout, x) for x in (sample, cond, uncond))
    momentum = None if momentum is None else _in(layout, momentum)
    with _on(cond.device):
        partials = _gram(sample, cond, uncond, momentum, a, b, layout)
    return partials.sum(1)[:, :14].T.contiguous().view(_gram_shape(layout))


def _gram_shape(layout: Layout) -> list[int]:
    return [14, *(n if i in layout.group_dims else 1 for i, n in enumerate(layout.shape))]


def similarity(sample: Tensor, cond: Tensor, uncond: Tensor, a: float, b: float) -> Tensor:
    """`reference.similarity`."""
    layout = layout_of(cond)
    sample, cond, uncond = (_in(layout, x) for x in (sample, cond, uncond))
    out = torch.empty(cond.shape[0], dtype=torch.float32, device=cond.device)
    with _on(cond.device):
        partials = _gram(sample, cond, uncond, None, a, b, layout)
        programs.similarity_kernel[(cond.shape[0],)](partials, out, b, partials.shape[1])
    return out


def extrapolate(history: Tensor, coefficients: Tensor) -> Tensor:
    """`reference.extrapolate`."""
    if not history[0].is_contiguous():
        history = history.contiguous()
    count, channels = coefficients.shape[0], coefficients[0].numel()
    rows = history.shape[1] * channels
    out = history.new_empty(history.shape[1:])
    if out.numel() == 0:
        return out
    columns = out.numel() // rows
    coefficients = coefficients.to(history.device, torch.float32).contiguous()
    with _on(history.device):
        # CUDA allows only 65535 programs along any axis but the first: a video's numbers go on the first.
        programs.extrapolate_kernel[(triton.cdiv(columns, TILE), rows)](
            history, coefficients, out, count, history.stride(0), channels, columns,
            TILE=TILE, num_warps=THREADS // _warp(history.device),
        )  # fmt: skip
    return out


def _guide_fake(sample, cond, uncond, momentum, a, b, beta, rule, parameters, coefficients, norm_dim):
    layout = layout_of(cond, norm_dim)
    return _new(layout, cond, cond.dtype), _new(layout, cond, torch.float32)


def _step_fake(
    sample, cond, uncond, momentum, a, b, beta, rule, parameters, coefficients, norm_dim,
    update, dtype, denoised_dtype,
):  # fmt: skip
    layout = layout_of(cond, norm_dim)
    denoised = cond.new_empty(0) if denoised_dtype is None else _new(layout, cond, denoised_dtype)
    return _new(layout, cond, dtype), denoised, _new(layout, cond, torch.float32)


def _gram_fake(sample, cond, uncond, momentum, a, b, norm_dim):
    return cond.new_empty(_gram_shape(layout_of(cond, norm_dim)), dtype=torch.float32)


def _similarity_fake(sample, cond, uncond, a, b):
    return cond.new_empty(cond.shape[0], dtype=torch.float32)


def _extrapolate_fake(history, coefficients):
    return history.new_empty(history.shape[1:])


_SAMPLES = "Tensor sample, Tensor cond, Tensor uncond"
_INPUTS = f"{_SAMPLES}, Tensor? momentum, float a, float b"
_RULE = "float beta, str rule, float[] parameters, Tensor? coefficients, int[]? norm_dim"
_UPDATE = "float[] update, ScalarType dtype, ScalarType? denoised_dtype"

for _schema, _launcher, _fake in (
    (f"guide({_INPUTS}, {_RULE}) -> (Tensor, Tensor)", guide, _guide_fake),
    (f"step({_INPUTS}, {_RULE}, {_UPDATE}) -> (Tensor, Tensor, Tensor)", step, _step_fake),
    (f"gram({_INPUTS}, int[]? norm_dim) -> Tensor", gram, _gram_fake),
    (f"similarity({_SAMPLES}, float a, float b) -> Tensor", similarity, _similarity_fake),
    ("extrapolate(Tensor history, Tensor coefficients) -> Tensor", extrapolate, _extrapolate_fake),
):  # fmt: skip
    _name, _arguments = _schema.split("(", 1)
    torch.library.define(f"diffusers_guidance::{_name}", f"({_arguments}")
    torch.library.impl(f"diffusers_guidance::{_name}", "CompositeExplicitAutograd", _launcher)
    torch.library.register_fake(f"diffusers_guidance::{_name}", _fake)
