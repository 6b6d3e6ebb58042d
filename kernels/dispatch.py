"""The choice of backend for the guidance arithmetic: Triton for tensors on a GPU, the reference for all others.

`backend="torch"` or `"triton"` in a call, or `with use_backend(...)` around it, overrides that.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from diffusers_guidance.kernels import reference
from diffusers_guidance.kernels.algebra import algebra_of
from diffusers_guidance.kernels.reference import Gram, Rule, Update

try:
    from diffusers_guidance.kernels import launch, passes  # registers torch.ops.diffusers_guidance
except ImportError:
    launch = passes = None  # type: ignore[assignment]

_forced: ContextVar[str | None] = ContextVar("backend", default=None)


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Inside the block, calls without a `backend` of their own use this one; None leaves the choice to the tensors.

    Other threads and tasks keep their own choice.
    """
    token = _forced.set(_checked(backend))
    try:
        yield
    finally:
        _forced.reset(token)


def _choice() -> str | None:
    """The choice of `use_backend` in this context. `torch.compile` keeps its value at compile time."""
    return _forced.get()


# All that `torch.compiler.assume_constant_result` does, except that it imports the whole compiler, for seconds.
_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backend_of(*tensors: Tensor | None, backend: str | None = None) -> str:
    """`"torch"` or `"triton"`: the call's `backend`, else that of `use_backend`, else what suits the tensors."""
    chosen = _checked(backend) or _choice()
    if chosen is not None:
        return chosen
    present = [x for x in tensors if x is not None]
    if launch is None or any(x.device.type not in ("cuda", "xpu") for x in present):
        return "torch"
    # The kernels sum in float32 and have no gradient.
    plain = all(x.dtype in (torch.float32, torch.float16, torch.bfloat16) for x in present)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in present)
    return "triton" if plain and not trained else "torch"


def _checked(backend: str | None) -> str | None:
    if backend not in (None, "torch", "triton"):
        raise ValueError(f'backend={backend!r}: "torch", "triton", or None for the one that suits the tensors')
    if backend == "triton" and launch is None:
        raise ValueError('backend="triton" needs the package triton, 3.5 or newer')
    return backend


def guide(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor,
    momentum: Tensor | None,
    a: float,
    b: float,
    rule: Rule,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The guided prediction and the new momentum; see `reference.guide` for shapes and dtypes."""
    if backend_of(sample, cond, uncond, momentum, backend=backend) == "torch":
        return reference.guide(sample, cond, uncond, momentum, a, b, rule)
    settings = _settings(sample, cond, uncond, momentum, a, b, rule)
    return torch.ops.diffusers_guidance.guide(sample, cond, uncond, momentum, a, b, *settings)


def step(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor,
    momentum: Tensor | None,
    a: float,
    b: float,
    rule: Rule,
    update: Update,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`guide` and a scheduler's first-order step in one; see `reference.step`."""
    if backend_of(sample, cond, uncond, momentum, backend=backend) == "torch":
        return reference.step(sample, cond, uncond, momentum, a, b, rule, update)
    settings = _settings(sample, cond, uncond, momentum, a, b, rule)
    factors = [*update.next, *(update.denoised or (0.0, 0.0))]
    next_sample, denoised, new_momentum = torch.ops.diffusers_guidance.step(
        sample, cond, uncond, momentum, a, b, *settings, factors, update.dtype, update.denoised_dtype
    )
    return next_sample, None if update.denoised is None else denoised, new_momentum


def similarity(sample: Tensor, cond: Tensor, uncond: Tensor, a: float, b: float, backend: str | None = None) -> Tensor:
    """(B,) cosine between the two predictions in the space of (a, b); see `reference.similarity`."""
    if backend_of(sample, cond, uncond, backend=backend) == "torch":
        return reference.similarity(sample, cond, uncond, a, b)
    return torch.ops.diffusers_guidance.similarity(sample, cond, uncond, a, b)


def extrapolate(history: Tensor, coefficients: Tensor, backend: str | None = None) -> Tensor:
    """The history's linear combination; see `reference.extrapolate`."""
    if backend_of(history, backend=backend) == "torch":
        return reference.extrapolate(history, coefficients)
    return torch.ops.diffusers_guidance.extrapolate(history, coefficients)


def observe(
    sample: Tensor | None,
    cond: Tensor,
    uncond: Tensor,
    denoised: tuple[float, float] = (0.0, 0.0),
    noise: tuple[float, float] = (0.0, 0.0),
    output: Tensor | None = None,
    expected: Tensor | None = None,
    s: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """(B, parts, 9): sums that verify and measure a guided step; see `reference.observe`."""
    if backend_of(sample, cond, uncond, output, expected, backend=backend) == "torch":
        return reference.observe(sample, cond, uncond, denoised, noise, output, expected, s)
    return torch.ops.diffusers_guidance.observe(sample, cond, uncond, [*denoised, *noise], output, expected, s)


def mix(tensors: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """The sum of factors times tensors; see `reference.mix`."""
    if backend_of(*tensors, backend=backend) == "torch":
        return reference.mix(tensors, factors, dtype)
    return torch.ops.diffusers_guidance.mix([*tensors], [*factors], dtype)


def _settings(
    sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float, rule: Rule
) -> tuple[float, str, list[float], Tensor | None, list[int] | None]:
    """A rule in the form that the ops take: (beta, its algebra's name, parameters, or its coefficients, norm_dim)."""
    norm_dim = None if rule.norm_dim is None else list(rule.norm_dim)
    numel = reference.group_numel(cond, rule.norm_dim)
    compiled = algebra_of(type(rule))
    if compiled is not None:
        settings = [float(each) for each in rule.settings(numel)]  # type: ignore[attr-defined]
        return rule.momentum, compiled.name, settings + [0.0] * (4 - len(settings)), None, norm_dim
    entries = torch.ops.diffusers_guidance.gram(sample, cond, uncond, momentum, a, b, norm_dim)
    g = Gram._make([*entries.unbind(0), numel])
    k = reference.finite_coefficients(rule, g, b)
    return rule.momentum, "", [], torch.stack(torch.broadcast_tensors(*k), -1).reshape(-1, 5), norm_dim
