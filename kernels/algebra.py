"""A rule's algebra, written once: torch runs it on tensors, Triton compiles the same source.

    @algebra
    def half(gram, b, w, _1, _2, _3):
        return Coefficients(0.0 * w, 1.0 + 0.0 * w, (w - 1) / 2, 0.0 * w)

It is scalar algebra on a group's Gram entries, on b and on four settings of the rule, in operators and the functions
below. Divisions need no guard: where a coefficient comes out non-finite, the group is left unguided. All four
coefficients must depend on something that is not written out (`0.0 * w` for zero), or Triton has no type for them.
"""

from collections.abc import Callable
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.kernels.reference import Coefficients, Gram


def sqrt(x: Any) -> Any:
    return x.sqrt() if isinstance(x, Tensor) else x**0.5


def exp(x: Any) -> Any:
    return torch.exp(torch.as_tensor(x))


def minimum(x: Any, y: Any) -> Any:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.minimum(x, y)
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        tensor, number = (x, y) if isinstance(x, Tensor) else (y, x)
        return tensor.clamp(max=number)
    return min(x, y)


def where(condition: Any, x: Any, y: Any) -> Any:
    return torch.where(condition, x, y) if isinstance(condition, Tensor) else x if condition else y


FUNCTIONS = (sqrt, exp, minimum, where)

ALGEBRAS: dict[str, "Algebra"] = {}
"""By name: what a kernel is asked for."""


class Algebra:
    """A function of (gram, b, and four settings) that gives a rule's `Coefficients`."""

    def __init__(self, function: Callable[..., Coefficients]):
        self.function = function
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.__doc__ = function.__doc__
        ALGEBRAS[self.name] = self

    def __call__(self, gram: Gram, b: Any, *settings: Any) -> Coefficients:
        """In torch; settings that are not given are 0."""
        return self.function(gram, b, *settings, *[0.0] * (4 - len(settings)))

    @cached_property
    def compiled(self) -> Any:
        """The same source as a Triton function, with Triton's functions in the place of those above."""
        import triton
        import triton.language as tl

        own: Any = self.function
        names = {
            name: getattr(tl, value.__name__) if any(value is each for each in FUNCTIONS) else value
            for name, value in own.__globals__.items()
        }
        twin = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        twin.__module__, twin.__qualname__ = own.__module__, own.__qualname__
        return triton.jit(twin)


def algebra(function: Callable[..., Coefficients]) -> Algebra:
    """Declares a rule's algebra; see above."""
    return Algebra(function)
