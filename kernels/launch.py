"""The launchers of the Triton kernels, as torch ops: `torch.ops.diffusers_guidance.guide`, `step`, ...

Each op has a fake implementation, so `torch.compile` passes through it without a break. The ops have no
gradient; the dispatcher sends tensors that need one to the reference.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from diffusers_guidance.kernels import programs
from diffusers_guidance.kernels.algebra import ALGEBRAS
from diffusers_guidance.kernels.reference import dims_of

if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 5):
    raise ImportError("named tuples with defaults in kernels need triton 3.5 or newer")

TILE, THREADS = 2048, 256
"""Numbers a program reads at once, and its threads: each takes 8 numbers, 16 bytes of half precision."""
RESIDENT, REGISTERS = 3, 80
"""Programs of 256 threads that run at once on a multiprocessor of 65536 registers, if a thread takes 80 at most."""
SHORT = 256
"""Rows with fewer numbers are gathered by a copy: a chunk for each row would leave most of its threads idle."""

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
    """The dense layout with `cond`'s own order of dimensions, if the kernels can walk it."""
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
    """Merges neighbouring dimensions of one kind, summed over (True) or not; skips those of size 1."""
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
    """(size, stride) of up to two runs, padded to two at the front."""
    pairs = [(prod(shape[i] for i in run), strides[run[-1]]) for run in runs]
    return [(1, 0)] * (2 - len(pairs)) + pairs


def _in(layout: Layout, cond: Tensor, x: Tensor) -> Tensor:
    """`x` itself if it has this layout, else a copy with it; on the device of `cond`."""
    if x.device != cond.device:
        raise ValueError(f"the tensors must be on one device; these are on {x.device} and {cond.device}")
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
def _together(device: torch.device) -> int:
    """How many programs can wait for one another in a cooperative launch. The interpreter runs programs one by one."""
    return RESIDENT * _multiprocessors(device) if device.type == "cuda" else 0


def fits_one_launch(groups: int, chunks: int, device: torch.device) -> bool:
    """Whether all chunks of all groups fit into the registers of the programs that run at once."""
    return chunks == 1 or groups * chunks <= _together(device)


def guiding(backend: str, together: bool) -> dict[str, int]:
    """Options of a launch of `guide`. If `together`, `RESIDENT` programs on a multiprocessor wait for one another."""
    registers = {"maxnreg": REGISTERS} if backend == "cuda" else {}
    return registers | ({"launch_cooperative_grid": True} if together else {})


class Counters:
    """Counters in a device's memory, at which programs meet (`programs._meet`); 0 before and after every launch.

    Launches that may overlap never share a counter. Launches of one stream follow one another. A captured launch, which
    a graph may replay on any stream, keeps its own forever.
    """

    COUNT = 2**18

    def __init__(self, device: torch.device):
        # Another thread allocates them, since a thread that captures a CUDA graph may allocate from the graph's memory.
        with ThreadPoolExecutor(1) as other:
            self.numbers = other.submit(self._zeros, device).result()
        self.taken = 0
        self.of_stream: dict[int, int] = {}
        self.lock = Lock()

    @classmethod
    def _zeros(cls, device: torch.device) -> Tensor:
        zeros = torch.zeros(cls.COUNT, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return zeros

    def take(self, groups: int, most: int, stream: int | None) -> Tensor | None:
        """Counters for a launch on this stream (None: a captured one) of up to `most` groups; None if used up."""
        wanted = 4 * triton.cdiv(groups if stream is None else most, 4)  # 16 bytes: Triton compiles for an alignment
        with self.lock:
            first = self.taken if stream is None else self.of_stream.setdefault(stream, self.taken)
            if first == self.taken:
                if first + wanted > self.COUNT:
                    self.of_stream = {s: at for s, at in self.of_stream.items() if s != stream}
                    return None
                self.taken += wanted
        return self.numbers[first : first + groups]


_counters: dict[torch.device, Counters] = {}


def _meeting_place(groups: int, device: torch.device) -> Tensor | None:
    """A counter for each group of a launch whose programs meet; None, for two launches, if none are left."""
    captured, stream = False, 0
    if device.type == "cuda":
        captured = torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream
    if device not in _counters:
        if captured:
            return None
        _counters.setdefault(device, Counters(device))
    return _counters[device].take(groups, _together(device), None if captured else stream)


def _on(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current device, on which Triton launches."""
    return getattr(torch, device.type).device(device) if device.type in ("cuda", "xpu") else nullcontext()


def _chunks(layout: Layout) -> int:
    """The number of chunks in a group."""
    return layout.rows * triton.cdiv(layout.columns, TILE)


def _parts(layout: Layout, device: torch.device) -> int:
    """Programs per group if each takes several chunks: all of them run at once."""
    return max(1, min(_chunks(layout), RESIDENT * _multiprocessors(device) // max(1, prod(layout.groups))))


def fold(x: Tensor) -> int:
    """Neighbours a thread reads at once."""
    return 16 // x.element_size()


def _gram(
    sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float, layout: Layout,
    centred: bool = False,
) -> Tensor:  # fmt: skip
    """(groups, parts, ENTRIES) partial Grams."""
    groups, parts = prod(layout.groups), _parts(layout, cond.device)
    partials = torch.empty(groups, parts, ENTRIES, dtype=torch.float32, device=cond.device)
    programs.gram_kernel[(groups, parts)](
        sample, cond, uncond, momentum, partials, a, b,
        layout.groups[1], layout.rows, layout.columns, *layout.walk,
        CENTRED=centred, TILE=TILE, FOLD=fold(cond), num_warps=THREADS // _warp(cond.device),
    )  # fmt: skip
    return partials


def _guide(
    sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None,
    a: float, b: float, beta: float, rule: str, parameters: Sequence[float], coefficients: Tensor | None,
    layout: Layout, out: Tensor, denoised: Tensor | None = None, update: Sequence[float] | None = None,
) -> Tensor:  # fmt: skip
    """Fills `out` (the prediction, or with `update` the next sample) and `denoised`; returns the new momentum."""
    new_momentum = _new(layout, cond, torch.float32)
    sample, uncond = _in(layout, cond, sample), _in(layout, cond, uncond)
    momentum = None if momentum is None else _in(layout, cond, momentum)
    cond = _in(layout, cond, cond)
    if cond.numel() == 0:
        return new_momentum
    groups, chunks, device = prod(layout.groups), _chunks(layout), cond.device
    inputs, outputs = (sample, cond, uncond, momentum), (out, denoised, new_momentum)
    scalars = (
        a, b, beta, *(*parameters, 0.0, 0.0, 0.0, 0.0)[:4], *(update or (0.0, 1.0, 0.0, 1.0)),
        layout.groups[1], layout.rows, layout.columns, *layout.walk,
    )  # fmt: skip
    algebra = None if coefficients is not None else ALGEBRAS[rule]
    options: dict[str, Any] = {"RULE": algebra and algebra.compiled, "STEP": update is not None, "TILE": TILE}
    options["num_warps"] = THREADS // _warp(device)
    with _on(device):
        in_one = algebra is not None and fits_one_launch(groups, chunks, device)
        counters = _meeting_place(groups, device) if in_one and chunks > 1 else None
        if algebra is not None and in_one and (chunks == 1 or counters is not None):
            partials = None
            if counters is not None:
                partials = torch.empty(groups, chunks, ENTRIES, dtype=torch.float32, device=device)
            options |= guiding("hip" if torch.version.hip else "cuda", counters is not None)
            programs.guide_kernel[(groups, chunks)](
                *inputs, partials, counters, *outputs, float(layout.numel), *scalars,
                CENTRED=algebra.centred, FOLD=fold(cond), **options,
            )  # fmt: skip
        else:
            gram = _gram(*inputs, a, b, layout, algebra.centred) if algebra is not None else coefficients
            parts = _parts(layout, device)
            programs.combine_kernel[(groups, parts)](
                *inputs, gram, *outputs, parts, float(layout.numel), *scalars, **options
            )
    return new_momentum


def guide(
    sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float,
    beta: float, rule: str, parameters: Sequence[float], coefficients: Tensor | None,
    norm_dim: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.guide` with the coefficients of `ALGEBRAS[rule]`, or with given coefficients (groups, 5)."""
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
    """(16, ...) the entries of `reference.gram`, in its order and shape."""
    layout = layout_of(cond, norm_dim)
    sample, cond, uncond = (_in(layout, cond, x) for x in (sample, cond, uncond))
    momentum = None if momentum is None else _in(layout, cond, momentum)
    with _on(cond.device):
        partials = _gram(sample, cond, uncond, momentum, a, b, layout)
    return partials.sum(1).T.contiguous().view(_gram_shape(layout))


def _gram_shape(layout: Layout) -> list[int]:
    return [ENTRIES, *(n if i in layout.group_dims else 1 for i, n in enumerate(layout.shape))]


def similarity(sample: Tensor, cond: Tensor, uncond: Tensor, a: float, b: float) -> Tensor:
    """`reference.similarity`."""
    layout = layout_of(cond)
    sample, cond, uncond = (_in(layout, cond, x) for x in (sample, cond, uncond))
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
        # CUDA allows only 65535 programs along the second and third axis, so a video's numbers go along the first.
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
